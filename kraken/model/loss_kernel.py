"""The GPU kernels of `kraken/model/loss.py`, in Triton. Sums are in float32. V is the vocabulary, or this process's
part.

For a whole vocabulary one program a token reads its logits twice, the second time from the cache, and writes once. For
a divided one the processes exchange what each knows of a token's logits between the two readings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192
"""Logits that a program holds at a time."""
NUM_WARPS = 16


@triton.jit
def _chunk_gradient(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, losses_ptr, row_stride, V: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    largest = float("-inf")
    total = 0.0  # of the exponentials, less the largest so far
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), axis=0)
        largest = new_largest
    target = tl.load(targets_ptr + row)
    tl.store(losses_ptr + row, largest + tl.log(total) - tl.load(row_ptr + target).to(tl.float32))
    tl.debug_barrier()  # the target's logit has been read before it is written over
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logits - largest) / total - tl.where(columns == target, 1.0, 0.0)
        tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < V)


def chunk_gradient(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """See `kraken.model.loss.chunk_gradient`; the gradient takes the place of the logits."""
    T, V = logits_TV.shape
    losses_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
    _chunk_gradient[(T,)](
        logits_TV, targets_T, losses_T, logits_TV.stride(0), V=V, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return losses_T.sum(), logits_TV


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    logits_ptr, columns_ptr, statistics_ptr, row_stride, V: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    largest = float("-inf")
    total = 0.0  # of the exponentials, less the largest so far
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), axis=0)
        largest = new_largest
    target = tl.load(columns_ptr + row)
    tl.store(statistics_ptr + 3 * row, largest)
    tl.store(statistics_ptr + 3 * row + 1, total)
    is_here = (target >= 0) & (target < V)
    tl.store(statistics_ptr + 3 * row + 2, tl.load(row_ptr + target, mask=is_here, other=0.0).to(tl.float32))


def row_statistics(logits_TV: Tensor, columns_T: Tensor) -> Tensor:
    """See `kraken.model.loss.row_statistics`."""
    T, V = logits_TV.shape
    statistics_T3 = torch.empty(T, 3, dtype=torch.float32, device=logits_TV.device)
    _row_statistics[(T,)](
        logits_TV, columns_T, statistics_T3, logits_TV.stride(0), V=V, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return statistics_T3


@triton.jit
def _softmax_less_target(  # type: ignore[no-untyped-def]
    logits_ptr, columns_ptr, log_totals_ptr, row_stride, V: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = logits_ptr + row.to(tl.int64) * row_stride + columns
    logits = tl.load(places, mask=columns < V, other=0.0).to(tl.float32)
    gradient = tl.exp(logits - tl.load(log_totals_ptr + row)) - tl.where(
        columns == tl.load(columns_ptr + row), 1.0, 0.0
    )
    tl.store(places, gradient.to(logits_ptr.dtype.element_ty), mask=columns < V)


def softmax_less_target(logits_TV: Tensor, columns_T: Tensor, log_total_T: Tensor) -> Tensor:
    """See `kraken.model.loss.softmax_less_target`; the gradient takes the place of the logits."""
    T, V = logits_TV.shape
    _softmax_less_target[(T, triton.cdiv(V, COLUMNS))](
        logits_TV, columns_T, log_total_T.contiguous(), logits_TV.stride(0), V=V, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return logits_TV
