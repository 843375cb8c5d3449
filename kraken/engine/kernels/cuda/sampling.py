"""Greedy and random sampling without truncation on CUDA: one Triton kernel with a program per row. torch needs five
kernels for a greedy token and thirty for a random one.

Called by CUDA graphs, and by `CudaKernels.sample` for steps without a graph. Shape letters as in
`kraken/engine/kernels/torch/sampling.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.torch.sampling import IDS_PER_GROUP

TILE = 4096
"""Ids that a program holds at a time; a multiple of the ids per group."""


@triton.jit
def _next(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_uniform_ptr, totals_ptr, next_ptr, row_stride, num_ids,
    tile: tl.constexpr, group: tl.constexpr, num_groups: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    largest = tl.full((tile,), float("-inf"), tl.float32)
    ids = tl.zeros((tile,), tl.int32)
    is_number = tl.full((tile,), 1, tl.int1)
    for start in range(0, num_ids, tile):
        columns = start + tl.arange(0, tile)
        values = tl.load(logits_ptr + columns, mask=columns < num_ids, other=float("-inf"))
        is_number = is_number & (values == values)
        ids = tl.where(values > largest, columns, ids)  # of equal logits a lane keeps the first
        largest = tl.maximum(largest, values)
    top = tl.max(largest, axis=0)
    chosen = tl.min(tl.where(largest == top, ids, num_ids), axis=0)
    is_sound = (tl.min(is_number.to(tl.int32), axis=0) == 1) & (tl.abs(top) < float("inf"))
    temperature = tl.load(temperature_uniform_ptr + 2 * row).to(tl.float32)
    if is_sound & (temperature > 0):
        totals_ptr += row * num_groups
        for start in range(0, num_ids, tile):
            columns = start + tl.arange(0, tile)
            values = tl.load(logits_ptr + columns, mask=columns < num_ids, other=float("-inf"))
            weights = tl.exp((values - top) / temperature).to(tl.float64)
            sums = tl.sum(tl.reshape(weights, (tile // group, group)), axis=1)
            groups = start // group + tl.arange(0, tile // group)
            tl.store(totals_ptr + groups, sums, mask=groups < num_groups)
        tl.debug_barrier()  # the sums were written by other threads of this program
        groups = tl.arange(0, num_groups)
        totals = tl.load(totals_ptr + groups, mask=groups * group < num_ids, other=0.0)
        mass = tl.cumsum(totals, axis=0)
        target = tl.load(temperature_uniform_ptr + 2 * row + 1) * tl.max(mass, axis=0)
        # the first group at which the mass exceeds the target; rounding may leave none, then the last with a positive
        # sum
        last = tl.max(tl.where(totals > 0, groups, 0), axis=0)
        found = tl.minimum(tl.sum((mass <= target).to(tl.int32), axis=0), last)
        rest = target - tl.sum(tl.where(groups == found, mass - totals, 0.0), axis=0)
        lanes = tl.arange(0, group)
        columns = found * group + lanes
        values = tl.load(logits_ptr + columns, mask=columns < num_ids, other=float("-inf"))
        weights = tl.exp((values - top) / temperature).to(tl.float64)
        last = tl.max(tl.where(weights > 0, lanes, 0), axis=0)
        lane = tl.minimum(tl.sum((tl.cumsum(weights, axis=0) <= rest).to(tl.int32), axis=0), last)
        chosen = found * group + lane
    tl.store(next_ptr + row, tl.where(is_sound, chosen, -1).to(tl.int64))


def sample_ids(logits_BV: Tensor, temperature_uniform_B2: Tensor) -> Tensor:
    """int64 [B]: the next token of every row, sampled without truncation; -1 where the logits are not finite.

    Args:
        logits_BV: float32.
        temperature_uniform_B2: float64; see `SamplingInput.temperature_and_uniform`.
    """
    logits_BV = logits_BV if logits_BV.stride(-1) == 1 else logits_BV.contiguous()
    num_rows, num_ids = logits_BV.shape
    num_groups = triton.next_power_of_2(-(-num_ids // IDS_PER_GROUP))
    totals_BG = torch.empty(num_rows, num_groups, dtype=torch.float64, device=logits_BV.device)
    next_B = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    _next[(num_rows,)](
        logits_BV, temperature_uniform_B2, totals_BG, next_B, logits_BV.stride(0), num_ids,
        tile=TILE, group=IDS_PER_GROUP, num_groups=num_groups, num_warps=32,
    )  # fmt: skip
    return next_B
