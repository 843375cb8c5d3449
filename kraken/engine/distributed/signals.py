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
    Round,
    Rounds,
    await_round,
    num_warps,
    store_norm,
    tell_round,
    tell_when_all_are_done,
)
from kraken.engine.model.norm import Norm, Normed

MAX_COLUMNS = 4096
"""Columns that one program publishes."""


@triton.jit
def _publish(  # type: ignore[no-untyped-def]
    x_ptr, slot_ptr, cell_ptr, last_cell_ptr, done_ptr, flags_ptr, flag_ptrs,
    rank: tl.constexpr, num_ranks: tl.constexpr, awaits: tl.constexpr, num_columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    round = tl.load(last_cell_ptr) + 1
    if awaits:
        # whoever has published the last round has read the one before it, which is what the slot holds
        await_round(flags_ptr, round - 1, rank, num_ranks)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = columns < num_columns
    places = tl.program_id(0).to(tl.int64) * num_columns + columns
    tl.store(slot_ptr + places, tl.load(x_ptr + places, mask=mask), mask=mask)
    tell_when_all_are_done(cell_ptr, done_ptr, flag_ptrs, round, tl.num_programs(0) * tl.num_programs(1))


@triton.jit
def _skip(cell_ptr, last_cell_ptr, flag_ptrs):  # type: ignore[no-untyped-def]
    round = tl.load(last_cell_ptr) + 1
    tl.store(cell_ptr, round)
    tell_round(flag_ptrs, round)


@triton.jit
def _wait(cell_ptr, flags_ptr, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    await_round(flags_ptr, tl.load(cell_ptr), rank, num_ranks)


@triton.jit
def _add_parts(  # type: ignore[no-untyped-def]
    x_ptr, part_ptrs, out_ptr, normed_ptr, scales_ptr, gain_ptr, bias_ptr, cell_ptr, flags_ptr,
    rank: tl.constexpr, num_ranks: tl.constexpr, has_x: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr,
    is_quantized: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, epsilon: tl.constexpr,
    largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    await_round(flags_ptr, tl.load(cell_ptr), rank, num_ranks)
    columns = tl.arange(0, tile)
    mask = columns < width
    token = tl.program_id(0).to(tl.int64)
    places = token * width + columns
    total = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(len(part_ptrs)):  # in the order of the ranks, so that all get the same bits
        total += tl.load(part_ptrs[index] + places, mask=mask, other=0.0).to(tl.float32)
    if has_x:
        total += tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, rounded, mask=mask)
    if has_norm:
        store_norm(
            rounded.to(tl.float32), normed_ptr, scales_ptr, gain_ptr, bias_ptr, 0, token, 0, columns, mask,
            has_bias, is_quantized, width, epsilon, largest, smallest_scale,
        )  # fmt: skip


class Signals:
    """Where one rank counts its rounds, and where it tells the others.

    Args:
        flags_P: int64 in this rank's memory, written by the others.
        flags_of_others: this rank's entry, int64 [1], of every other rank's flags.
    """

    def __init__(self, rank: int, flags_P: Tensor, flags_of_others: tuple[Tensor, ...]):
        cells = torch.zeros(3, 2, dtype=torch.int64, device=flags_P.device)
        self._rounds = Rounds(rank, cells, flags_P, flags_of_others)

    def publish(self, x_RC: Tensor, slot: Tensor, turn: int, awaits: bool) -> None:
        """Begin a round with x, at the start of a slot of its type, and tell the others.

        Args:
            awaits: whether the others may still be reading the slot.
        """
        R, C = x_RC.shape
        tile = min(triton.next_power_of_2(C), MAX_COLUMNS)
        _publish[R, triton.cdiv(C, tile)](
            x_RC.contiguous(), slot, *self._rounds.pointers(turn), self._rounds.flags_of_others,
            **self._rounds.constants, awaits=awaits, num_columns=C, tile=tile, num_warps=num_warps(tile),
        )  # fmt: skip

    def advance(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, targets: tuple[Tensor, ...],
        out_slot: Tensor | None, turn: int, awaits: bool, tells: bool,
    ) -> tuple[Tensor, Normed | None]:  # fmt: skip
        """Begin a round with the sum over W of x + addend, in float32 and rounded, at the start of each target of x's
        type; gives x + addend, in the slot where there is one, and its norm.

        Args:
            awaits: whether the others may still be reading what is there.
            tells: whether the others are told; else `tell` must follow.
        """
        round = Round(self._rounds, turn, awaits, tells)
        return residual_kernel.advance(x_WTD, addend_WTD, norm, round, targets, out_slot)

    def tell(self, turn: int) -> None:
        """Tell the others that what was written in this round, before this in the order of streams, is there.

        By a copy of the round's number, which needs no multiprocessor.
        """
        cell = self._rounds.pointers(turn)[0]
        for flag in self._rounds.flags_of_others:
            flag.copy_(cell[:1], non_blocking=True)

    def skip(self, turn: int) -> None:
        """A round without a part."""
        _skip[(1,)](*self._rounds.pointers(turn)[:2], self._rounds.flags_of_others, num_warps=1)

    def wait(self, turn: int) -> None:
        """Hold the stream until every rank has published this round."""
        cell, _, _, flags_P = self._rounds.pointers(turn)
        _wait[(1,)](cell, flags_P, **self._rounds.constants, num_warps=1)

    def add_parts(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None, turn: int
    ) -> Normed | None:
        """Wait for this round, and write x plus the parts; gives the norm of it as of one way, where there is one."""
        T, D = out_TD.shape
        tile = triton.next_power_of_2(D)
        normed = None if norm is None else residual_kernel.empty_normed(out_TD[None], norm)
        pointers, constants = residual_kernel.norm_arguments(norm, normed, out_TD)
        cell, _, _, flags_P = self._rounds.pointers(turn)
        _add_parts[(T,)](
            out_TD if x_TD is None else x_TD.contiguous(), parts, out_TD, *pointers, cell, flags_P,
            **self._rounds.constants, has_x=x_TD is not None, has_norm=norm is not None,
            width=D, tile=tile, num_warps=num_warps(tile), **constants,
        )  # fmt: skip
        return normed

    def see(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, turn: int | None
    ) -> tuple[Tensor, Normed]:
        """x + addend, and of each way held here, the norm of that, the other ways' x and the parts.

        Args:
            turn: of the round that the parts are of, to be waited for; None where they are there.
        """
        round = None if turn is None else Round(self._rounds, turn)
        return residual_kernel.see(x_WTD, addend_WTD, norm, parts, round=round)
