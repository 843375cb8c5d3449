"""Chooses an engine's kernels once, when a model is loaded, from the device, the model's data type and the float32 of
its logits.
"""

import functools
import importlib.util

import torch

from kraken.engine.kernels.cpu.library import load_library
from kraken.engine.kernels.torch.kernels import TorchKernels

CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_TYPES = (torch.float32, torch.bfloat16)


@functools.cache
def choose_kernels(device: torch.device, dtype: torch.dtype) -> TorchKernels:
    """The fastest kernels for a device and a type: Triton's on CUDA, C on a CPU, where Triton or a C compiler is
    installed; torch's operators otherwise. Compiles the C kernels, which takes about a second."""
    if device.type == "cuda" and dtype in CUDA_TYPES and _has_triton():
        from kraken.engine.kernels.cuda.kernels import CudaKernels  # imports Triton

        return CudaKernels()
    if device.type == "cpu" and dtype in CPU_TYPES and (library := load_library(dtype)) is not None:
        from kraken.engine.kernels.cpu.kernels import CpuKernels

        return CpuKernels(library)
    return TorchKernels()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
