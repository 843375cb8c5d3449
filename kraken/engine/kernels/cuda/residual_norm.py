"""The Triton kernels between the linears of a layer: residual addition, LayerNorm, and what they do for an all-reduce.

`kraken/engine/kernels/torch/kernels.py` has the equations of `add_norm` and `add_reduced_norm`. A program computes one
token, in float32.

With several devices whose memory is shared, `add_norm` also stores the ways' sum into the other ranks' buffers, and
`add_reduced_norm` reads what the others stored; `signals.py` has the flags that they exchange. A program of
`add_reduced_norm` waits for the others after it has done all that needs none of them.

Shape letters as in `kraken/model/architecture.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.cuda.quantization import store_quantized
from kraken.engine.kernels.cuda.signals import Handshake, signal_when_done, wait_signal
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.quantized_tensor import LARGEST, SMALLEST_SCALE, empty_quantized
from kraken.model.residual_norm import LAYER_NORM_EPSILON

MAX_WAITING_PROGRAMS = 512
"""Programs of a kernel that waits for other ranks. More would not fill a GPU better, and each of them polls."""


@triton.jit
def store_norm(  # type: ignore[no-untyped-def]
    row, normed_ptr, scales_ptr, gain_ptr, bias_ptr, way: tl.constexpr, token, num_tokens, columns, mask,
    has_bias: tl.constexpr, is_quantized: tl.constexpr, width: tl.constexpr, epsilon: tl.constexpr,
    largest: tl.constexpr, smallest_scale: tl.constexpr,
):  # fmt: skip
    """Normalise a row and store it for a token of a way. Lanes beyond the width must be zero."""
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
            # a rank that has signalled the last message has read the one before it, which is overwritten here
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
            if num_targets > 0 and way == num_ways - 1:  # before the norm, so that the link is busy meanwhile
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
        local = tl.zeros((tile,), tl.float32)  # the sum over the ways of this rank
        for way in tl.static_range(num_ways):
            x = tl.load(x_ptr + way * x_way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            addend = tl.load(addend_ptr + way * way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            a = (x + addend).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + way * way_stride + offsets, a, mask=mask)
            local += x
        if waits:  # noqa: SIM102 - known when the kernel is compiled, unlike the other
            if token == tl.program_id(0):
                wait_signal(flags_ptr, tl.load(counter_ptr), rank, num_ranks)
        parts = tl.zeros((tile,), tl.float32)
        for index in tl.static_range(num_parts):
            parts += tl.load(part_ptrs[index] + offsets, mask=mask, other=0.0).to(tl.float32)
        if num_ways == 1:
            # a and x of this token are still in registers
            summed = a.to(tl.float32) + parts
            if is_total:
                summed -= x
            store_norm(
                summed, normed_ptr, scales_ptr, gain_ptr, bias_ptr, 0, token, num_tokens, columns, mask,
                has_bias, is_quantized, width, epsilon, largest, smallest_scale,
            )  # fmt: skip
        else:
            if not is_total:
                parts += local
            for way in tl.static_range(num_ways):
                x = tl.load(x_ptr + way * x_way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
                addend = tl.load(addend_ptr + way * way_stride + offsets, mask=mask, other=0.0).to(tl.float32)
                summed = (x + addend).to(a_ptr.dtype.element_ty).to(tl.float32) + (parts - x)
                store_norm(
                    summed, normed_ptr, scales_ptr, gain_ptr, bias_ptr, way, token, num_tokens, columns, mask,
                    has_bias, is_quantized, width, epsilon, largest, smallest_scale,
                )  # fmt: skip


def add_norm(
    x_WTD: Tensor,
    addend_WTD: Tensor,
    norm: Norm | None,
    handshake: Handshake | None = None,
    targets: tuple[Tensor, ...] = (),
    out_buffer: Tensor | None = None,
) -> tuple[Tensor, Normed | None]:
    """x + addend, and the norm of that if there is a norm.

    Args:
        x_WTD: its first stride may be 0, if all ways are equal.
        handshake: signals of the message that the kernel sends; None sends none.
        targets: buffers for the message, the sum over W of x + addend in float32, rounded to x's type; each [T * D] or
            longer.
        out_buffer: memory for the first result, [W * T * D] or longer; None allocates it.
    """
    W, T, D = x_WTD.shape
    x_WTD, addend_WTD = _with_plain_rows(x_WTD), addend_WTD.contiguous()
    out_WTD = torch.empty_like(addend_WTD) if out_buffer is None else out_buffer[: W * T * D].view(W, T, D)
    normed = None if norm is None else empty_normed(addend_WTD, norm)
    pointers, constants = norm_arguments(norm, normed, out_WTD)
    tile = triton.next_power_of_2(D)
    _add_norm[(T if handshake is None else min(T, MAX_WAITING_PROGRAMS),)](
        x_WTD, addend_WTD, out_WTD, *pointers, targets or (out_WTD,),
        *_pointers(handshake, out_WTD), (out_WTD,) if handshake is None else handshake.signals.peer_flags,
        T, x_WTD.stride(0),
        **_constants(handshake), is_message=handshake is not None, waits=handshake is not None and handshake.waits,
        sends_signal=handshake is not None and handshake.sends_signal, num_targets=len(targets),
        has_norm=norm is not None,
        num_ways=W, width=D, tile=tile, num_warps=num_warps(tile), **constants,
    )  # fmt: skip
    return out_WTD, normed


def add_reduced_norm(
    x_WTD: Tensor,
    addend_WTD: Tensor,
    norm: Norm,
    parts: tuple[Tensor, ...] = (),
    is_total: bool = False,
    handshake: Handshake | None = None,
) -> tuple[Tensor, Normed]:
    """a = x + addend, and for each way of this rank norm(a + the sum of x over the rank's other ways + the parts).

    Args:
        parts: sums over other ranks' ways, of x's type, [T * D] or longer each.
        is_total: the parts include the ways of this rank.
        handshake: signals of the message that holds the parts; None if the stream has waited for them.
    """
    W, T, D = x_WTD.shape
    x_WTD, addend_WTD = _with_plain_rows(x_WTD), addend_WTD.contiguous()
    a_WTD, normed = torch.empty_like(addend_WTD), empty_normed(addend_WTD, norm)
    pointers, constants = norm_arguments(norm, normed, a_WTD)
    counter, _, _, flags_P = _pointers(handshake, a_WTD)
    tile = triton.next_power_of_2(D)
    _add_reduced_norm[(T if handshake is None else min(T, MAX_WAITING_PROGRAMS),)](
        x_WTD, addend_WTD, parts or (x_WTD,), a_WTD, *pointers, counter, flags_P, T, x_WTD.stride(0),
        **_constants(handshake), waits=handshake is not None, num_parts=len(parts), is_total=is_total,
        num_ways=W, width=D, tile=tile, num_warps=num_warps(tile), **constants,
    )  # fmt: skip
    return a_WTD, normed


def empty_normed(like_WTD: Tensor, norm: Norm) -> Normed:
    """Memory for the norm of tensors of this shape."""
    W, T, D = like_WTD.shape
    return empty_quantized(W, T, D, like_WTD.device) if norm.is_quantized else torch.empty_like(like_WTD)


def norm_arguments(
    norm: Norm | None, normed: Normed | None, anything: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """Arguments of a kernel that calls `store_norm`: pointers to output, scales, gains and biases; and constants.

    Args:
        anything: a tensor whose pointer stands for those that the kernel does not use.
    """
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
    """Warps for a row of so many values: eight values a thread."""
    return min(16, max(1, tile // 256))


def _with_plain_rows(x_WTD: Tensor) -> Tensor:
    """x with contiguous tokens; the ways may share memory."""
    return x_WTD if x_WTD[0].is_contiguous() else x_WTD.contiguous()


def _pointers(handshake: Handshake | None, anything: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (anything,) * 4 if handshake is None else handshake.signals.pointers(handshake.buffer_index)


def _constants(handshake: Handshake | None) -> dict[str, int]:
    return {"rank": 0, "num_ranks": 1} if handshake is None else handshake.signals.constants
