"""Sums over peer memory on CUDA, as Triton kernels: publishing a part, and reading all parts where they are needed.

Rounds are counted on the device, so that a kernel in a CUDA graph knows which one it is in. A rank's *cells* hold the
number of its last rounds and a count of the programs that are done; its *flags* hold, for every rank, the last round
that this rank has published, and are written by the others. `kraken/engine/distributed/peer_all_reduce.py` says why
nothing is
written over while somebody reads it.

A wait is a loop, in every program that needs it.

Shape letters as in `kraken/model.py`, and: P ranks' parts, R rows of any message, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.cuda import residual_norm as residual_kernel
from kraken.engine.kernels.cuda.residual_norm import (
    Handshake,
    Signals,
    num_warps,
    signal,
    signal_when_done,
    store_norm,
    wait_signal,
)
from kraken.engine.model.norm import Norm, Normed

MAX_COLUMNS = 4096
"""Columns that one program publishes."""


@triton.jit
def _publish(  # type: ignore[no-untyped-def]
    x_ptr, buffer_ptr, counter_ptr, last_counter_ptr, done_ptr, flags_ptr, peer_flag_ptrs,
    rank: tl.constexpr, num_ranks: tl.constexpr, waits: tl.constexpr, num_columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    message = tl.load(last_counter_ptr) + 1
    if waits:
        # whoever has published the last round has read the one before it, which is what the slot holds
        wait_signal(flags_ptr, message - 1, rank, num_ranks)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = columns < num_columns
    offsets = tl.program_id(0).to(tl.int64) * num_columns + columns
    tl.store(buffer_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)
    signal_when_done(counter_ptr, done_ptr, peer_flag_ptrs, message, tl.num_programs(0) * tl.num_programs(1))


@triton.jit
def _skip(counter_ptr, last_counter_ptr, peer_flag_ptrs):  # type: ignore[no-untyped-def]
    message = tl.load(last_counter_ptr) + 1
    tl.store(counter_ptr, message)
    signal(peer_flag_ptrs, message)


@triton.jit
def _wait(counter_ptr, flags_ptr, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_signal(flags_ptr, tl.load(counter_ptr), rank, num_ranks)


@triton.jit
def _add_parts(  # type: ignore[no-untyped-def]
    x_ptr, part_ptrs, out_ptr, normed_ptr, scales_ptr, gain_ptr, bias_ptr, counter_ptr, flags_ptr,
    rank: tl.constexpr, num_ranks: tl.constexpr, has_x: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr,
    is_quantized: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, epsilon: tl.constexpr,
    largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    wait_signal(flags_ptr, tl.load(counter_ptr), rank, num_ranks)
    columns = tl.arange(0, tile)
    mask = columns < width
    token = tl.program_id(0).to(tl.int64)
    offsets = token * width + columns
    total = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(len(part_ptrs)):  # in the order of the ranks, so that all get the same bits
        total += tl.load(part_ptrs[index] + offsets, mask=mask, other=0.0).to(tl.float32)
    if has_x:
        total += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, rounded, mask=mask)
    if has_norm:
        store_norm(
            rounded.to(tl.float32), normed_ptr, scales_ptr, gain_ptr, bias_ptr, 0, token, 0, columns, mask,
            has_bias, is_quantized, width, epsilon, largest, smallest_scale,
        )  # fmt: skip


class PeerKernels:
    """Where one rank counts its rounds, and where it tells the others.

    Args:
        flags_P: int64 in this rank's memory, written by the others.
        flags_of_others: this rank's entry, int64 [1], of every other rank's flags.
    """

    def __init__(self, rank: int, flags_P: Tensor, peer_flags: tuple[Tensor, ...]):
        counters = torch.zeros(3, 2, dtype=torch.int64, device=flags_P.device)
        self._signals = Signals(rank, counters, flags_P, peer_flags)

    def publish(self, x_RC: Tensor, buffer: Tensor, buffer_index: int, waits: bool) -> None:
        """Begin a round with x, at the start of a slot of its type, and tell the others.

        Args:
            awaits: whether the others may still be reading the slot.
        """
        R, C = x_RC.shape
        tile = min(triton.next_power_of_2(C), MAX_COLUMNS)
        _publish[R, triton.cdiv(C, tile)](
            x_RC.contiguous(), buffer, *self._signals.pointers(buffer_index), self._signals.peer_flags,
            **self._signals.constants, waits=waits, num_columns=C, tile=tile, num_warps=num_warps(tile),
        )  # fmt: skip

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, targets: tuple[Tensor, ...],
        out_buffer: Tensor | None, buffer_index: int, waits: bool, sends_signal: bool,
    ) -> tuple[Tensor, Normed | None]:  # fmt: skip
        """Begin a round with the sum over W of x + addend, in float32 and rounded, at the start of each target of x's
        type; gives x + addend, in the slot where there is one, and its norm.

        Args:
            awaits: whether the others may still be reading what is there.
            tells: whether the others are told; else `tell` must follow.
        """
        message = Handshake(self._signals, buffer_index, waits, sends_signal)
        return residual_kernel.add_norm(x_WTD, addend_WTD, norm, message, targets, out_buffer)

    def signal(self, buffer_index: int) -> None:
        """Tell the others that what was written in this round, before this in the order of streams, is there.

        By a copy of the round's number, which needs no multiprocessor.
        """
        counter = self._signals.pointers(buffer_index)[0]
        for flag in self._signals.peer_flags:
            flag.copy_(counter[:1], non_blocking=True)

    def skip(self, buffer_index: int) -> None:
        """A round without a part."""
        _skip[(1,)](*self._signals.pointers(buffer_index)[:2], self._signals.peer_flags, num_warps=1)

    def wait(self, buffer_index: int) -> None:
        """Hold the stream until every rank has published this round."""
        counter, _, _, flags_P = self._signals.pointers(buffer_index)
        _wait[(1,)](counter, flags_P, **self._signals.constants, num_warps=1)

    def add_parts(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None, buffer_index: int
    ) -> Normed | None:
        """Wait for this round, and write x plus the parts; gives the norm of it as of one way, where there is one."""
        T, D = out_TD.shape
        tile = triton.next_power_of_2(D)
        normed = None if norm is None else residual_kernel.empty_normed(out_TD[None], norm)
        pointers, constants = residual_kernel.norm_arguments(norm, normed, out_TD)
        counter, _, _, flags_P = self._signals.pointers(buffer_index)
        _add_parts[(T,)](
            out_TD if x_TD is None else x_TD.contiguous(), parts, out_TD, *pointers, counter, flags_P,
            **self._signals.constants, has_x=x_TD is not None, has_norm=norm is not None,
            width=D, tile=tile, num_warps=num_warps(tile), **constants,
        )  # fmt: skip
        return normed

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, buffer_index: int | None
    ) -> tuple[Tensor, Normed]:
        """x + addend, and of each way held here, the norm of that, the other ways' x and the parts.

        Args:
            turn: of the round that the parts are of, to be waited for; None where they are there.
        """
        message = None if buffer_index is None else Handshake(self._signals, buffer_index)
        return residual_kernel.add_reduced_norm(x_WTD, addend_WTD, norm, parts, message=message)
