"""Arguments of the LLM API; unknown ones are refused with ValueError, as pydantic does in the real package."""

import json
import os
from dataclasses import dataclass
from typing import Any

import kraken.trtllm

FIELDS = frozenset(
    json.loads(
        open(os.path.join(os.path.dirname(kraken.trtllm.__file__), "signatures.json")).read()  # noqa: SIM115
    )["symbols"]["tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields"]
)


class TorchLlmArgs:
    """Only its field names, as pydantic shows them."""

    model_fields = dict.fromkeys(FIELDS)


def has(word: str) -> bool:
    """Whether FAKE_TRTLLM holds this word."""
    return word in os.environ.get("FAKE_TRTLLM", "").split(",")


def step_delay_s() -> float:
    return float(os.environ.get("FAKE_TRTLLM_DELAY_S", "0"))


def require_known(arguments: dict[str, Any]) -> None:
    unknown = sorted(arguments.keys() - FIELDS)
    if unknown:
        raise ValueError(f"TorchLlmArgs got invalid argument(s): {unknown}")


@dataclass(kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float = 0.9
    dtype: str = "auto"
    tokens_per_block: int = 32
    host_cache_size: int | None = None


@dataclass(kw_only=True)
class CudaGraphConfig:
    batch_sizes: list[int] | None = None
    max_batch_size: int = 0
    enable_padding: bool = False


@dataclass(kw_only=True)
class RayPlacementConfig:
    defer_workers_init: bool = False
    placement_groups: list[Any] | None = None
    placement_bundle_indices: list[list[int]] | None = None
    per_worker_gpu_share: float | None = None
