"""Arguments of the LLM API; unknown ones are refused with ValueError, as pydantic does in the real package."""

import os
from dataclasses import dataclass
from typing import Any

FIELDS = """
model tokenizer skip_tokenizer_init trust_remote_code tensor_parallel_size dtype model_kwargs kv_cache_config
cuda_graph_config enable_chunked_prefill max_batch_size max_input_len max_seq_len max_num_tokens max_beam_width
gather_generation_logits num_postprocess_workers scheduler_config return_perf_metrics orchestrator_type
attn_backend sampler_type disable_overlap_scheduler enable_autotuner load_format stream_interval
allreduce_strategy ray_worker_extension_cls ray_placement_config
"""


class TorchLlmArgs:
    """Only names of its fields, as pydantic shows them."""

    model_fields = dict.fromkeys(FIELDS.split())


def has(word: str) -> bool:
    """Whether FAKE_TRTLLM holds this word."""
    return word in os.environ.get("FAKE_TRTLLM", "").split(",")


def step_delay_s() -> float:
    return float(os.environ.get("FAKE_TRTLLM_DELAY_S", "0"))


def require_known(arguments: dict[str, Any]) -> None:
    unknown = sorted(arguments.keys() - TorchLlmArgs.model_fields.keys())
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
