"""Where TensorRT-LLM runs and finds its model: shared by `choose`, serving and `kraken/trtllm`. Imports neither torch
nor TensorRT-LLM.
"""

from dataclasses import dataclass
from typing import Any

TENSORRT_LLM_FOLDER = "tensorrt_llm"
"""Folder of the TensorRT-LLM checkpoint, inside the exchange folder."""
REPLICA_ENVIRONMENT = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "TLLM_DISABLE_MPI": "1",
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "1",
}
"""Environment variables that a Serve replica needs before TensorRT-LLM is imported in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where TensorRT-LLM puts its Ray workers. The placement group belongs to Ray; the engine never removes it."""

    group: Any
    bundle_indices: tuple[int, ...]
    """One bundle of the group per way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a machine offers to TensorRT-LLM."""

    version: str | None
    """Of TensorRT-LLM, if it imports and is supported; else None."""
    problem: str = ""
    """Why `version` is None."""
    num_gpus: int | None = None
    """GPUs that a process may use; None if they were not counted because TensorRT-LLM is missing."""
