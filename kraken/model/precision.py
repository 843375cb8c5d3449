"""Precision: the types of master weights and of the computation."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of the master weights and of the computation."""

    master: torch.dtype
    compute: torch.dtype

    @property
    def name(self) -> str:
        return str(self.compute).removeprefix("torch.")

    def autocast(self, device: torch.device) -> Any:
        """The context a forward pass runs in."""
        return torch.autocast(device.type, self.compute) if self.compute != self.master else nullcontext()


def choose_precision(setting: str, device: torch.device) -> Precision:
    """Resolve `train.precision` for a device.

    A CPU without bfloat16 instructions emulates them, some fifty times slower than float32.
    """
    if setting == "float64":
        return Precision(torch.float64, torch.float64)
    if setting == "auto":
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = device.type == "cuda" or capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        setting = "bfloat16" if fast else "float32"
    return Precision(torch.float32, torch.bfloat16 if setting == "bfloat16" else torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a product of x is computed in here: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype
