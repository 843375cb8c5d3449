"""Where the engine's Triton kernels run."""

import functools
import importlib.util

import torch
from torch import Tensor

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for the device and the type of x: on CUDA, where Triton is installed."""
    return x.is_cuda and x.dtype in KERNEL_TYPES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
