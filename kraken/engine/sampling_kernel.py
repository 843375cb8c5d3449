"""The most likely token of every row on CUDA: one Triton kernel where torch takes five.

Shape letters as in `kraken/engine/sampling.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Ids that a program holds at a time."""


@triton.jit
def _best(logits_ptr, best_ptr, row_stride, num_ids, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((tile,), float("-inf"), tl.float32)
    ids = tl.zeros((tile,), tl.int32)
    is_number = tl.full((tile,), 1, tl.int1)
    for start in range(0, num_ids, tile):
        columns = start + tl.arange(0, tile)
        values = tl.load(logits_ptr + row * row_stride + columns, mask=columns < num_ids, other=float("-inf"))
        is_number = is_number & (values == values)
        ids = tl.where(values > largest, columns, ids)  # of equal ones a lane keeps the first
        largest = tl.maximum(largest, values)
    top = tl.max(largest, axis=0)
    best = tl.min(tl.where(largest == top, ids, num_ids), axis=0)
    is_sound = (tl.min(is_number.to(tl.int32), axis=0) == 1) & (tl.abs(top) < float("inf"))
    tl.store(best_ptr + row, tl.where(is_sound, best, -1).to(tl.int64))


def best_ids(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the id of the largest logit of every row, the first of equal ones; -1 where the logits are no numbers.

    Args:
        logits_BV: float32.
    """
    logits_BV = logits_BV if logits_BV.stride(-1) == 1 else logits_BV.contiguous()
    best_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    _best[(len(logits_BV),)](logits_BV, best_B, logits_BV.stride(0), logits_BV.shape[1], tile=TILE, num_warps=32)
    return best_B
