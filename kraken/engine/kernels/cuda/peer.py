"""Triton kernels of the all-reduce over the memory of peers: publish a part, wait, and reduce the parts.

`PeerKernels` is what `PeerChannel` and its backends launch, see `kraken/engine/distributed/peer_all_reduce.py`. The
kernels that also belong to a layer without an all-reduce are in `residual_norm.py`.

Shape letters as in `kraken/model/architecture.py`, and: P ranks, R rows of a message, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.cuda import residual_norm
from kraken.engine.kernels.cuda.residual_norm import empty_normed, norm_arguments, num_warps, store_norm
from kraken.engine.kernels.cuda.signals import Handshake, Signals, signal, signal_when_done, wait_signal
from kraken.engine.kernels.norm import Norm, Normed

MAX_COLUMNS = 4096
"""Most columns that one program publishes."""


@triton.jit
def _publish(  # type: ignore[no-untyped-def]
    x_ptr, buffer_ptr, counter_ptr, last_counter_ptr, done_ptr, flags_ptr, peer_flag_ptrs,
    rank: tl.constexpr, num_ranks: tl.constexpr, waits: tl.constexpr, num_columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    message = tl.load(last_counter_ptr) + 1
    if waits:
        # a rank that has signalled the last message has read the one before it, which is what the buffer holds
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
def _reduce_add_norm(  # type: ignore[no-untyped-def]
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
    for index in tl.static_range(len(part_ptrs)):  # in the order of the ranks, so that all of them get the same bits
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
    """Launches the kernels of one rank, on the current stream.

    Args:
        flags_P: int64 in this rank's memory, written by the other ranks.
        peer_flags: this rank's entry, int64 [1], in every other rank's flags.
    """

    def __init__(self, rank: int, flags_P: Tensor, peer_flags: tuple[Tensor, ...]):
        counters = torch.zeros(3, 2, dtype=torch.int64, device=flags_P.device)
        self._signals = Signals(rank, counters, flags_P, peer_flags)

    def publish(self, x_RC: Tensor, buffer: Tensor, buffer_index: int, waits: bool) -> None:
        """Send a message: write x to the start of the buffer, and signal.

        Args:
            waits: wait until all ranks have read what the buffer holds.
        """
        R, C = x_RC.shape
        tile = min(triton.next_power_of_2(C), MAX_COLUMNS)
        _publish[R, triton.cdiv(C, tile)](
            x_RC.contiguous(), buffer, *self._signals.pointers(buffer_index), self._signals.peer_flags,
            **self._signals.constants, waits=waits, num_columns=C, tile=tile, num_warps=num_warps(tile),
        )  # fmt: skip

    def skip(self, buffer_index: int) -> None:
        """Send an empty message."""
        _skip[(1,)](*self._signals.pointers(buffer_index)[:2], self._signals.peer_flags, num_warps=1)

    def signal(self, buffer_index: int) -> None:
        """Signal a message whose parts the current stream has brought, by copies that need no multiprocessor."""
        counter = self._signals.pointers(buffer_index)[0]
        for flag in self._signals.peer_flags:
            flag.copy_(counter[:1], non_blocking=True)

    def wait(self, buffer_index: int) -> None:
        """Make the stream wait until every rank has signalled this message."""
        counter, _, _, flags_P = self._signals.pointers(buffer_index)
        _wait[(1,)](counter, flags_P, **self._signals.constants, num_warps=1)

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, targets: tuple[Tensor, ...],
        out_buffer: Tensor | None, buffer_index: int, waits: bool, sends_signal: bool,
    ) -> tuple[Tensor, Normed | None]:  # fmt: skip
        """Send a message with the sum over W of x + addend; see `residual_norm.add_norm` and `Handshake`."""
        handshake = Handshake(self._signals, buffer_index, waits, sends_signal)
        return residual_norm.add_norm(x_WTD, addend_WTD, norm, handshake, targets, out_buffer)

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, buffer_index: int | None
    ) -> tuple[Tensor, Normed]:
        """See `residual_norm.add_reduced_norm`.

        Args:
            buffer_index: of the message that holds the parts, to wait for it; None if the stream has waited.
        """
        handshake = None if buffer_index is None else Handshake(self._signals, buffer_index)
        return residual_norm.add_reduced_norm(x_WTD, addend_WTD, norm, parts, handshake=handshake)

    def reduce_add_norm(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None, buffer_index: int
    ) -> Normed | None:
        """Wait for the message, store x plus the sum of its parts in `out_TD`, and return the norm of that, if any."""
        T, D = out_TD.shape
        tile = triton.next_power_of_2(D)
        normed = None if norm is None else empty_normed(out_TD[None], norm)
        pointers, constants = norm_arguments(norm, normed, out_TD)
        counter, _, _, flags_P = self._signals.pointers(buffer_index)
        _reduce_add_norm[(T,)](
            out_TD if x_TD is None else x_TD.contiguous(), parts, out_TD, *pointers, counter, flags_P,
            **self._signals.constants, has_x=x_TD is not None, has_norm=norm is not None,
            width=D, tile=tile, num_warps=num_warps(tile), **constants,
        )  # fmt: skip
        return normed
