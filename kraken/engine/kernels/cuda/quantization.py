"""Quantization to float8 on CUDA, with or without GELU before: one Triton kernel with a program per row, in float32.
Called by `CudaKernels.quantize`; `store_quantized` also by the kernels of LayerNorm."""

import triton
import triton.language as tl
from torch import Tensor

from kraken.engine.kernels.quantized_tensor import LARGEST, SMALLEST_SCALE, QuantizedTensor, empty_quantized


@triton.jit
def store_quantized(  # type: ignore[no-untyped-def]
    row, values_ptr, scale_ptr, columns, mask, largest: tl.constexpr, smallest_scale: tl.constexpr
):
    """Quantize and store one row. Lanes past its end must be zero."""
    scale = tl.maximum(tl.max(tl.abs(row), axis=0) / largest, smallest_scale)
    tl.store(values_ptr + columns, (row / scale).to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr, scale)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_ptr, values_ptr, scales_ptr, x_way_stride, x_token_stride, num_rows,
    width: tl.constexpr, tile: tl.constexpr, with_gelu: tl.constexpr, largest: tl.constexpr,
    smallest_scale: tl.constexpr,
):  # fmt: skip
    token, way = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, tile)
    mask = columns < width
    row = tl.load(x_ptr + way * x_way_stride + token * x_token_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if with_gelu:  # the tanh form: x / (1 + exp(-2u))
        row = row * tl.sigmoid(2 * 0.7978845608028654 * (row + 0.044715 * row * row * row))
    place = way * num_rows + token
    store_quantized(row, values_ptr + place * width, scales_ptr + place, columns, mask, largest, smallest_scale)


def quantize(x_WTI: Tensor, with_gelu: bool) -> QuantizedTensor:
    """See `TorchKernels.quantize`."""
    W, T, D = x_WTI.shape
    x_WTI = x_WTI if x_WTI.stride(2) == 1 else x_WTI.contiguous()
    rows = empty_quantized(W, T, D, x_WTI.device)
    tile = triton.next_power_of_2(D)
    _quantize[T, W](
        x_WTI, rows.values_WTI, rows.scales_WT1, x_WTI.stride(0), x_WTI.stride(1), T,
        width=D, tile=tile, with_gelu=with_gelu, largest=LARGEST, smallest_scale=SMALLEST_SCALE,
        num_warps=min(16, max(1, tile // 512)),
    )  # fmt: skip
    return rows
