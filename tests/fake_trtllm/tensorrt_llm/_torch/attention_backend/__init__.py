"""What attention has to know of a step, and a toy cache."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tensorrt_llm.mapping import Mapping


@dataclass
class KVCacheManager:
    """(layer, request) -> keys and values [T, N, H] of the tokens so far, this rank's heads only.

    It takes its sizes from the pretrained configuration, whose counts are those of all ranks together.
    """

    num_kv_heads: int
    head_dim: int
    blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def num_cached(self, request_id: int) -> int:
        cached = [keys.shape[0] for (layer, request), (keys, _) in self.blocks.items() if request == request_id]
        return cached[0] if cached else 0

    def free_resources(self, request_id: int) -> None:
        self.blocks = {key: block for key, block in self.blocks.items() if key[1] != request_id}


@dataclass
class AttentionMetadata:
    """One step: the requests in order, how many new tokens each brings; those being prefilled come first."""

    seq_lens: list[int]
    request_ids: list[int]
    num_contexts: int
    kv_cache_manager: KVCacheManager
    mapping: Mapping | None = None
    is_cuda_graph: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def num_ctx_tokens(self) -> int:
        return sum(self.seq_lens[: self.num_contexts])
