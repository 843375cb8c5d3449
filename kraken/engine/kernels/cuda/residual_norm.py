"""What stands between the products of a layer, on CUDA: one Triton kernel, which also writes and reads sums of devices.

`advance` is the end of a layer and the beginning of the next, `see` the middle of one;
`kraken/engine/model/residual.py` has
their equations. A program computes one token, in float32.

With several devices whose memory is shared, `advance` also writes the ways' sum where the others read it, and `see`
reads what they wrote, in *rounds*: `kraken/engine/distributed/signals.py` says what these are. A program of `see` waits
after it has done all that needs nobody else.

Shape letters as in `kraken/model.py`, and: P ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.cuda.quantization import store_quantized
from kraken.engine.model.norm import Norm, Normed
from kraken.engine.model.quantized import LARGEST, SMALLEST_SCALE, empty_quantized
from kraken.residual_norm import LAYER_NORM_EPSILON

MAX_WAITING_PROGRAMS = 512
"""Programs of a kernel that wait for the others. More would fill no GPU better, and each of them asks."""


@dataclass(frozen=True, slots=True)
class Signals:
    """Where one rank counts its rounds, and where it tells the others.

    The number of a round is written in the cell of its turn, 0 or 1, while the kernel that begins the round reads the
    other cell: so it does not matter which of its programs run first.

    Args:
        cells: int64 [3, 2] of this rank: the last round of either turn, and how many programs of a kernel are done; two
            values wide, so that kernels are compiled once for all.
        flags_P: int64 in this rank's memory, the last round of each other rank, written by them.
        flags_of_others: this rank's entry, int64 [1], of every other rank's flags.
    """

    rank: int
    counters: Tensor
    flags_P: Tensor
    peer_flags: tuple[Tensor, ...]

    def pointers(self, buffer_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This round's cell and the one before it, the count of programs, the flags."""
        return self.counters[buffer_index], self.counters[1 - buffer_index], self.counters[2], self.flags_P

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return {"rank": self.rank, "num_ranks": len(self.flags_P)}


@triton.jit
def wait_signal(flags_ptr, message, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until every other rank has published this round; what it wrote before can then be read."""
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            # an atomic that adds nothing: one thread asks, all wait for the answer, and nothing is read before it
            while tl.atomic_add(flags_ptr + peer, 0, sem="acquire", scope="sys") < message:
                pass
    tl.debug_barrier()


@triton.jit
def signal(peer_flag_ptrs, message):  # type: ignore[no-untyped-def]
    """Tell every other rank that this one has published a round, and has read all before it."""
    for index in tl.static_range(len(peer_flag_ptrs)):
        tl.atomic_xchg(peer_flag_ptrs[index], message, sem="release", scope="sys")


@triton.jit
def signal_when_done(counter_ptr, done_ptr, peer_flag_ptrs, message, num_programs):  # type: ignore[no-untyped-def]
    """The last of a kernel's programs tells the round, after everything that all of them have written."""
    tl.debug_barrier()  # every thread has written before one says so
    # among these programs the device's order is enough: what the last one has seen, its signal carries to the others
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
        tl.store(done_ptr, 0)  # everybody else is done with it, and with reading the round
        tl.store(counter_ptr, message)
        signal(peer_flag_ptrs, message)


@triton.jit
def store_norm(  # type: ignore[no-untyped-def]
    row, normed_ptr, scales_ptr, gain_ptr, bias_ptr, way: tl.constexpr, token, num_tokens, columns, mask,
    has_bias: tl.constexpr, is_quantized: tl.constexpr, width: tl.constexpr, epsilon: tl.constexpr,
    largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    """The norm of a row whose lanes behind the end are zero, as a token's of a way."""
    gain = tl.load(gain_ptr + way * width + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros_like(gain)
    if has_bias:
        bias = tl.load(bias_ptr + way * width + columns, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, row - tl.sum(row, axis=0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + epsilon) * gain + bias
    offset = token + way * num_tokens
    row_ptr = normed_ptr + offset * tl.full((), width, tl.int64)
    if is_quantized:
        store_quantized(normed, row_ptr, scales_ptr + offset, columns, mask, largest, smallest_scale)
    else:
        tl.store(row_ptr + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, addend_ptr, out_ptr, normed_ptr, scales_ptr, gain_ptr, bias_ptr, target_ptrs,
    counter_ptr, last_counter_ptr, done_ptr, flags_ptr, peer_flag_ptrs,
    num_tokens, x_way_stride,
    rank: tl.constexpr, num_ranks: tl.constexpr, is_message: tl.constexpr, waits: tl.constexpr,
    sends_signal: tl.constexpr,
    num_targets: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr, is_quantized: tl.constexpr,
    num_ways: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, epsilon: tl.constexpr,
    largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, tile)
    mask = columns < width
    message = tl.full((), 0, tl.int64)
    if is_message:
        message = tl.load(last_counter_ptr) + 1
        if waits:
            # whoever has published the last round has read the one before it, which is what is written over here
            wait_signal(flags_ptr, message - 1, rank, num_ranks)
    way_stride = num_tokens * tl.full((), width, tl.int64)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        offsets = token * tl.full((), width, tl.int64) + columns
        total = tl.zeros((tile,), tl.float32)
        for way in tl.static_range(num_ways):
            x = tl.load(x_ptr + way * x_way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            addend = tl.load(addend_ptr + way * way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            out = (x + addend).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + way * way_stride + offsets, out, mask=mask)
            total += out.to(tl.float32)
            if num_targets > 0 and way == num_ways - 1:  # before the norm, so that it is on its way meanwhile
                for index in tl.static_range(num_targets):
                    tl.store(target_ptrs[index] + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
            if has_norm:
                store_norm(
                    out.to(tl.float32), normed_ptr, scales_ptr, gain_ptr, bias_ptr, way, token, num_tokens, columns,
                    mask, has_bias, is_quantized, width, epsilon, largest, smallest_scale,
                )  # fmt: skip
    if is_message:
        if sends_signal:
            signal_when_done(counter_ptr, done_ptr, peer_flag_ptrs, message, tl.num_programs(0))
        elif tl.program_id(0) == 0:
            tl.store(counter_ptr, message)


@triton.jit
def _add_reduced_norm(  # type: ignore[no-untyped-def]
    x_ptr, addend_ptr, part_ptrs, a_ptr, normed_ptr, scales_ptr, gain_ptr, bias_ptr, counter_ptr, flags_ptr,
    num_tokens, x_way_stride,
    rank: tl.constexpr, num_ranks: tl.constexpr, waits: tl.constexpr, num_parts: tl.constexpr, is_total: tl.constexpr,
    has_bias: tl.constexpr, is_quantized: tl.constexpr, num_ways: tl.constexpr, width: tl.constexpr,
    tile: tl.constexpr, epsilon: tl.constexpr, largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, tile)
    mask = columns < width
    way_stride = num_tokens * tl.full((), width, tl.int64)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        offsets = token * tl.full((), width, tl.int64) + columns
        held = tl.zeros((tile,), tl.float32)  # the sum over the ways held here
        for way in tl.static_range(num_ways):
            x = tl.load(x_ptr + way * x_way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            addend = tl.load(addend_ptr + way * way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            a = (x + addend).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + way * way_stride + offsets, a, mask=mask)
            held += x
        if waits:  # noqa: SIM102 - which the compiler knows, and of the other it does not
            if token == tl.program_id(0):
                wait_signal(flags_ptr, tl.load(counter_ptr), rank, num_ranks)
        parts = tl.zeros((tile,), tl.float32)
        for index in tl.static_range(num_parts):
            parts += tl.load(part_ptrs[index] + offsets, mask=mask, other=0.0).to(tl.float32)
        if num_ways == 1:
            # of what each program has still in its registers
            seen = a.to(tl.float32) + parts
            if is_total:
                seen -= x
            store_norm(
                seen, normed_ptr, scales_ptr, gain_ptr, bias_ptr, 0, token, num_tokens, columns, mask,
                has_bias, is_quantized, width, epsilon, largest, smallest_scale,
            )  # fmt: skip
        else:
            if not is_total:
                parts += held
            for way in tl.static_range(num_ways):
                x = tl.load(x_ptr + way * x_way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
                addend = tl.load(addend_ptr + way * way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
                seen = (x + addend).to(a_ptr.dtype.element_ty).to(tl.float32) + (parts - x)
                store_norm(
                    seen, normed_ptr, scales_ptr, gain_ptr, bias_ptr, way, token, num_tokens, columns, mask,
                    has_bias, is_quantized, width, epsilon, largest, smallest_scale,
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Handshake:
    """One round, as the kernel knows it that begins it or that reads its parts.

    Args:
        turn: 0 or 1, of one round and the next.
        awaits: whether what the others were given two rounds ago may not have been read by all of them.
        tells: whether the kernel that begins the round tells the others; else somebody does who comes after it.
    """

    signals: Signals
    buffer_index: int
    waits: bool = True
    sends_signal: bool = True


def add_norm(
    x_WTD: Tensor,
    addend_WTD: Tensor,
    norm: Norm | None,
    message: Handshake | None = None,
    targets: tuple[Tensor, ...] = (),
    out_buffer: Tensor | None = None,
) -> tuple[Tensor, Normed | None]:
    """x + addend, and its norm where there is one; in a round the targets are given its part, the sum over W.

    Args:
        x_WTD: of equal ways where its first stride is 0.
        targets: of x's type, [T * D] or longer.
        out_slot: likewise, where the first output is to be.
    """
    W, T, D = x_WTD.shape
    x_WTD, addend_WTD = _with_plain_rows(x_WTD), addend_WTD.contiguous()
    out_WTD = torch.empty_like(addend_WTD) if out_buffer is None else out_buffer[: W * T * D].view(W, T, D)
    normed = None if norm is None else empty_normed(addend_WTD, norm)
    pointers, constants = norm_arguments(norm, normed, out_WTD)
    tile = triton.next_power_of_2(D)
    _add_norm[(T if message is None else min(T, MAX_WAITING_PROGRAMS),)](
        x_WTD, addend_WTD, out_WTD, *pointers, targets or (out_WTD,),
        *_pointers(message, out_WTD), (out_WTD,) if message is None else message.signals.peer_flags,
        T, x_WTD.stride(0),
        **_constants(message), is_message=message is not None, waits=message is not None and message.waits,
        sends_signal=message is not None and message.sends_signal, num_targets=len(targets), has_norm=norm is not None,
        num_ways=W, width=D, tile=tile, num_warps=num_warps(tile), **constants,
    )  # fmt: skip
    return out_WTD, normed


def add_reduced_norm(
    x_WTD: Tensor,
    addend_WTD: Tensor,
    norm: Norm,
    parts: tuple[Tensor, ...] = (),
    is_total: bool = False,
    message: Handshake | None = None,
) -> tuple[Tensor, Normed]:
    """a = x + addend, and of each way held here the norm of a, the other ways' x and the parts.

    Args:
        parts: of x's type, [T * D] values or more each.
        is_total: whether the ways held here are in the parts.
        round: whose parts they are, to be waited for; None where they are there.
    """
    W, T, D = x_WTD.shape
    x_WTD, addend_WTD = _with_plain_rows(x_WTD), addend_WTD.contiguous()
    a_WTD, normed = torch.empty_like(addend_WTD), empty_normed(addend_WTD, norm)
    pointers, constants = norm_arguments(norm, normed, a_WTD)
    counter, _, _, flags_P = _pointers(message, a_WTD)
    tile = triton.next_power_of_2(D)
    _add_reduced_norm[(T if message is None else min(T, MAX_WAITING_PROGRAMS),)](
        x_WTD, addend_WTD, parts or (x_WTD,), a_WTD, *pointers, counter, flags_P, T, x_WTD.stride(0),
        **_constants(message), waits=message is not None, num_parts=len(parts), is_total=is_total,
        num_ways=W, width=D, tile=tile, num_warps=num_warps(tile), **constants,
    )  # fmt: skip
    return a_WTD, normed


def empty_normed(like_WTD: Tensor, norm: Norm) -> Normed:
    """What the norm of such states is written to."""
    W, T, D = like_WTD.shape
    return empty_quantized(W, T, D, like_WTD.device) if norm.is_quantized else torch.empty_like(like_WTD)


def norm_arguments(
    norm: Norm | None, normed: Normed | None, anything: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """What `store_norm` wants: where it writes, gains and biases; and constants."""
    values = scales = gain = bias = anything
    if norm is not None and normed is not None:
        values, scales = (normed, anything) if isinstance(normed, Tensor) else (normed.values_WTI, normed.scales_WT1)
        gain = norm.weight_WD
        bias = gain if norm.bias_WD is None else norm.bias_WD
    constants = {
        "has_bias": norm is not None and norm.bias_WD is not None,
        "is_quantized": norm is not None and norm.is_quantized,
        "epsilon": LAYER_NORM_EPSILON,
        "largest": LARGEST,
        "smallest_scale": SMALLEST_SCALE,
    }
    return (values, scales, gain, bias), constants


def num_warps(tile: int) -> int:
    """For a row of so many values, eight a thread."""
    return min(16, max(1, tile // 256))


def _with_plain_rows(x_WTD: Tensor) -> Tensor:
    """Tokens one after the other; the ways may be one in memory."""
    return x_WTD if x_WTD[0].is_contiguous() else x_WTD.contiguous()


def _pointers(message: Handshake | None, anything: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (anything,) * 4 if message is None else message.signals.pointers(message.buffer_index)


def _constants(message: Handshake | None) -> dict[str, int]:
    return {"rank": 0, "num_ranks": 1} if message is None else message.signals.constants
