"""Sums over peer memory on CUDA, as Triton kernels: publishing a part, and reading the others' where they are needed.

Rounds are counted on the device, so that a kernel in a CUDA graph knows which one it is in. A rank's *state* is the
number of its last round and a count of the programs that are done; its *flags* hold, for every rank, the last round
that this rank has published, and are written by the others. `kraken/engine/devices/peer_sums.py` says why a slot is
never written while somebody reads it.

A wait is a loop, in every program that needs it. It cannot block what it waits for: that runs on another device, or, in
tests, in another process on the same one, which takes turns with this process.

Shape letters as in `kraken/model.py`, and: P ranks' parts, R rows of any message, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.norm import Norm
from kraken.residual_norm import LAYER_NORM_EPSILON

MAX_COLUMNS = 4096
"""Columns that one program publishes."""


@triton.jit
def _await(flags_ptr, round, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until every other rank has published this round; what it wrote before can then be read."""
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            # an atomic that adds nothing: one thread asks, all wait for the answer, and nothing is read before it
            while tl.atomic_add(flags_ptr + peer, 0, sem="acquire", scope="sys") < round:
                pass
    tl.debug_barrier()


@triton.jit
def _signal(state_ptr, flag_ptrs, round):  # type: ignore[no-untyped-def]
    """Tell every other rank that this one has published a round, and has read all before it."""
    tl.store(state_ptr, round)
    for index in tl.static_range(len(flag_ptrs)):
        tl.atomic_xchg(flag_ptrs[index], round, sem="release", scope="sys")


@triton.jit
def _publish(  # type: ignore[no-untyped-def]
    x_ptr, slot_ptr, state_ptr, flags_ptr, flag_ptrs, way_stride,
    rank: tl.constexpr, num_ranks: tl.constexpr, num_ways: tl.constexpr, num_columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    round = tl.load(state_ptr) + 1
    # whoever has published the last round has read the one before it, which is what the slot holds
    _await(flags_ptr, round - 1, rank, num_ranks)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = columns < num_columns
    part = tl.zeros((tile,), tl.float32)
    for way in tl.static_range(num_ways):
        part += tl.load(x_ptr + way * way_stride + row * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(slot_ptr + row * num_columns + columns, part.to(slot_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # every thread has written before one says so
    last = tl.num_programs(0) * tl.num_programs(1) - 1
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="sys") == last:
        tl.store(state_ptr + 1, 0)  # everybody else is done with it, and with reading the round
        _signal(state_ptr, flag_ptrs, round)


@triton.jit
def _skip(state_ptr, flag_ptrs):  # type: ignore[no-untyped-def]
    _signal(state_ptr, flag_ptrs, tl.load(state_ptr) + 1)


@triton.jit
def _wait(state_ptr, flags_ptr, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    _await(flags_ptr, tl.load(state_ptr), rank, num_ranks)


@triton.jit
def _normed(row, mask, gain, bias, width: tl.constexpr, epsilon: tl.constexpr):  # type: ignore[no-untyped-def]
    """LayerNorm of a row whose lanes behind the end are zero."""
    centred = tl.where(mask, row - tl.sum(row, axis=0) / width, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + epsilon) * gain + bias


@triton.jit
def _add_parts(  # type: ignore[no-untyped-def]
    x_ptr, part_ptrs, out_ptr, normed_ptr, gain_ptr, bias_ptr, state_ptr, flags_ptr,
    rank: tl.constexpr, num_ranks: tl.constexpr, has_x: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr,
    width: tl.constexpr, tile: tl.constexpr, epsilon: tl.constexpr,
):  # fmt: skip
    _await(flags_ptr, tl.load(state_ptr), rank, num_ranks)
    columns = tl.arange(0, tile)
    mask = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    total = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(len(part_ptrs)):  # in the order of the ranks, so that all get the same bits
        total += tl.load(part_ptrs[index] + places, mask=mask, other=0.0).to(tl.float32)
    if has_x:
        total += tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, rounded, mask=mask)
    if has_norm:
        gain = tl.load(gain_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        bias = tl.zeros((tile,), tl.float32)
        if has_bias:
            bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        normed = _normed(rounded.to(tl.float32), mask, gain, bias, width, epsilon)
        tl.store(normed_ptr + places, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_seen(  # type: ignore[no-untyped-def]
    a_ptr, x_ptr, part_ptrs, normed_ptr, gain_ptr, bias_ptr, state_ptr, flags_ptr, way_stride,
    rank: tl.constexpr, num_ranks: tl.constexpr, waits: tl.constexpr, has_bias: tl.constexpr,
    num_ways: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, epsilon: tl.constexpr,
):  # fmt: skip
    if waits:
        _await(flags_ptr, tl.load(state_ptr), rank, num_ranks)
    columns = tl.arange(0, tile)
    mask = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    others = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(len(part_ptrs)):
        others += tl.load(part_ptrs[index] + places, mask=mask, other=0.0).to(tl.float32)
    if num_ways > 1:
        for way in tl.static_range(num_ways):
            others += tl.load(x_ptr + way * way_stride + places, mask=mask, other=0.0).to(tl.float32)
    for way in tl.static_range(num_ways):
        seen = others + tl.load(a_ptr + way * way_stride + places, mask=mask, other=0.0).to(tl.float32)
        if num_ways > 1:  # without its own output, which is in a
            seen -= tl.load(x_ptr + way * way_stride + places, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + way * width + columns, mask=mask, other=0.0).to(tl.float32)
        bias = tl.zeros((tile,), tl.float32)
        if has_bias:
            bias = tl.load(bias_ptr + way * width + columns, mask=mask, other=0.0).to(tl.float32)
        normed = _normed(seen, mask, gain, bias, width, epsilon)
        tl.store(normed_ptr + way * way_stride + places, normed.to(normed_ptr.dtype.element_ty), mask=mask)


class Signals:
    """Where one rank counts its rounds, and where it tells the others.

    Args:
        flags_P: int64 in this rank's memory, written by the others.
        flags_of_others: this rank's entry, int64 [1], of every other rank's flags.
    """

    def __init__(self, rank: int, flags_P: Tensor, flags_of_others: tuple[Tensor, ...]):
        self.rank, self.num_ranks = rank, len(flags_P)
        self._flags_P, self._flags_of_others = flags_P, flags_of_others
        self._state = torch.zeros(2, dtype=torch.int64, device=flags_P.device)

    def publish(self, x_WRC: Tensor, slot: Tensor) -> None:
        """Begin a round with the sum of x over W, in float32 and rounded, at the start of a slot of x's type."""
        W, R, C = x_WRC.shape
        tile = min(triton.next_power_of_2(C), MAX_COLUMNS)
        _publish[R, triton.cdiv(C, tile)](
            x_WRC.contiguous(), slot, self._state, self._flags_P, self._flags_of_others, R * C,
            rank=self.rank, num_ranks=self.num_ranks, num_ways=W, num_columns=C, tile=tile, num_warps=_num_warps(tile),
        )  # fmt: skip

    def skip(self) -> None:
        """A round without a part."""
        _skip[(1,)](self._state, self._flags_of_others, num_warps=1)

    def wait(self) -> None:
        """Hold the stream until every rank has published this round."""
        _wait[(1,)](self._state, self._flags_P, rank=self.rank, num_ranks=self.num_ranks, num_warps=1)

    def add_parts(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None
    ) -> Tensor | None:
        """Wait for this round, and write x plus the parts; gives the norm of it, of one way, where there is one."""
        T, D = out_TD.shape
        tile = triton.next_power_of_2(D)
        normed_TD = torch.empty_like(out_TD) if norm is not None else None
        bias = None if norm is None else norm.bias_WD
        gain = out_TD if norm is None else norm.weight_WD
        _add_parts[(T,)](
            out_TD if x_TD is None else x_TD.contiguous(), parts, out_TD, out_TD if normed_TD is None else normed_TD,
            gain, gain if bias is None else bias, self._state, self._flags_P,
            rank=self.rank, num_ranks=self.num_ranks, has_x=x_TD is not None, has_norm=norm is not None,
            has_bias=bias is not None, width=D, tile=tile, epsilon=LAYER_NORM_EPSILON, num_warps=_num_warps(tile),
        )  # fmt: skip
        return normed_TD

    def norm_seen(
        self, a_WTD: Tensor, x_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, is_waiting: bool
    ) -> Tensor:
        """Of each way held here, the norm of a, the other ways' x and the parts; [W, T, D].

        Args:
            is_waiting: whether the parts are the others' of this round, to be waited for.
        """
        W, T, D = a_WTD.shape
        tile = triton.next_power_of_2(D)
        a_WTD, x_WTD = a_WTD.contiguous(), x_WTD.contiguous()
        normed_WTD = torch.empty_like(a_WTD)
        gain, bias = norm.weight_WD, norm.bias_WD
        _norm_seen[(T,)](
            a_WTD, x_WTD, parts, normed_WTD, gain, gain if bias is None else bias, self._state, self._flags_P, T * D,
            rank=self.rank, num_ranks=self.num_ranks, waits=is_waiting, has_bias=bias is not None,
            num_ways=W, width=D, tile=tile, epsilon=LAYER_NORM_EPSILON, num_warps=_num_warps(tile),
        )  # fmt: skip
        return normed_WTD


def _num_warps(tile: int) -> int:
    return min(16, max(1, tile // 256))
