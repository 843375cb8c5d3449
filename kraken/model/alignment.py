"""Alignment: sizes rounded up inside a forward pass, with zeros that change no result."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Alignment:
    """What sizes are rounded up to.

    Tensor cores want widths that are multiples of 8, fused attention wants few head sizes; parameters, checkpoints and
    the optimizer keep the true sizes.
    """

    width: int = 1
    head_size: int = 1

    def padded_width(self, size: int) -> int:
        return -(-size // self.width) * self.width

    def padded_head_size(self, size: int) -> int:
        return -(-size // self.head_size) * self.head_size


def pad(x: Tensor, *sizes: int | None) -> Tensor:
    """Zeros at the end of the last dimensions, up to `sizes`; None leaves a dimension as it is."""
    amounts: list[int] = []
    for size, found in zip(reversed(sizes), reversed(x.shape), strict=False):
        amounts += [0, 0 if size is None else size - found]
    return F.pad(x, amounts) if any(amounts) else x
