"""The GPU kernels of `kraken/model/residual_norm.py`, in Triton: one program per token, which holds all its ways.

Sums are in float32. Shape letters as there.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

MAX_WARPS = 16
ELEMENTS_PER_WARP = 512
MAX_VALUES_PER_LOAD = 8
"""16 bytes of bfloat16."""


def forward(
    x: Tensor,
    addend: Tensor | None,
    total: Tensor | None,
    a: Tensor,
    n: Tensor,
    inverse_std: Tensor,
    sum_of_a: Tensor,
    epsilon: float,
) -> None:
    """Fill a (unless there is no addend), n, inverse_std, and sum_of_a unless it is empty.

    Args:
        x, a, addend, total: of any strides; the others contiguous.
    """
    W, B, T, D = x.shape
    x = _with_unit_stride(x)
    addend, total = (y if y is None else _with_unit_stride(y) for y in (addend, total))
    x_step = _common_step(x, x if addend is None else a)
    addend_step = 1 if addend is None else _common_step(addend)
    _forward[(B * T,)](
        x,
        x if addend is None else addend,
        x if total is None else total,
        a,
        n,
        inverse_std,
        sum_of_a,
        W,
        T,
        B * T,
        *_steps(x, x_step),
        *_steps(addend, addend_step),
        *(0, 0) if total is None else total.stride()[1:3],
        *_steps(None if addend is None else a, x_step),
        epsilon,
        D=D,
        P=n.shape[-1],
        ADDS=addend is not None,
        SEES_OTHERS=total is not None,
        IS_SUMMED=sum_of_a.numel() > 0,
        X_STEP=x_step,
        ADDEND_STEP=addend_step,
        **_blocks(W, n.shape[-1]),
    )


def backward(
    grad_a: Tensor | None,
    grad_n: Tensor,
    grad_sum: Tensor | None,
    n: Tensor,
    inverse_std: Tensor,
    grad_x: Tensor,
    grad_addend: Tensor,
    grad_total: Tensor,
    width: int,
) -> None:
    """Fill `grad_x` [W, B, T, D] of any strides, and contiguous `grad_addend` [W, B, T, P] and `grad_total`
    [1, B, T, D]; all but those that are empty.

    Args:
        grad_a, grad_n: of any strides.
    """
    W, B, T, P = n.shape
    grad_n = _with_unit_stride(grad_n)
    grad_a = None if grad_a is None else _with_unit_stride(grad_a)
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_a_step, grad_n_step = 1 if grad_a is None else _common_step(grad_a), _common_step(grad_n)
    has_x = grad_x.numel() > 0
    grad_x_step = _common_step(grad_x) if has_x else 1
    _backward[(B * T,)](
        grad_n if grad_a is None else grad_a,
        grad_n,
        inverse_std if grad_sum is None else grad_sum,
        n,
        inverse_std,
        grad_x,
        grad_addend,
        grad_total,
        W,
        T,
        B * T,
        *_steps(grad_a, grad_a_step),
        *_steps(grad_n, grad_n_step),
        *_steps(grad_x if has_x else None, grad_x_step),
        D=width,
        P=P,
        ADDS=grad_a is not None,
        IS_SUMMED=grad_sum is not None,
        SEES_OTHERS=grad_total.numel() > 0,
        HAS_X=has_x,
        GRAD_A_STEP=grad_a_step,
        GRAD_N_STEP=grad_n_step,
        GRAD_X_STEP=grad_x_step,
        **_blocks(W, P),
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _common_step(*tensors: Tensor) -> int:
    """What the strides of rows are multiples of: so many values the compiler may load at once."""
    return math.gcd(MAX_VALUES_PER_LOAD, *(stride for x in tensors for stride in x.stride()[:3]))


def _steps(x: Tensor | None, step: int) -> tuple[int, ...]:
    """The strides of rows, counted in steps."""
    return (0, 0, 0) if x is None else tuple(stride // step for stride in x.stride()[:3])


def _blocks(num_ways: int, padded_width: int) -> dict[str, Any]:
    ways, columns = triton.next_power_of_2(num_ways), triton.next_power_of_2(padded_width)
    num_warps = min(MAX_WARPS, max(1, ways * columns // ELEMENTS_PER_WARP))
    return {"BLOCK_W": ways, "BLOCK_P": columns, "num_warps": num_warps}


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, addend_ptr, total_ptr, a_ptr, n_ptr, inverse_std_ptr, sum_ptr,
    W, T, num_tokens,
    x_way, x_sequence, x_token, addend_way, addend_sequence, addend_token, total_sequence, total_token,
    a_way, a_sequence, a_token, epsilon,
    D: tl.constexpr, P: tl.constexpr, ADDS: tl.constexpr, SEES_OTHERS: tl.constexpr, IS_SUMMED: tl.constexpr,
    X_STEP: tl.constexpr, ADDEND_STEP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    b, t = index // T, index % T
    ways_W1 = tl.arange(0, BLOCK_W).to(tl.int64)[:, None]
    columns_1P = tl.arange(0, BLOCK_P)[None, :]
    is_real = (ways_W1 < W) & (columns_1P < D)
    x_rows_W1 = (ways_W1 * x_way + b * x_sequence + t * x_token) * X_STEP
    x_WP = tl.load(x_ptr + x_rows_W1 + columns_1P, mask=is_real, other=0.0).to(tl.float32)
    h_WP = x_WP
    if ADDS:
        addend_rows_W1 = (ways_W1 * addend_way + b * addend_sequence + t * addend_token) * ADDEND_STEP
        addend_WP = tl.load(addend_ptr + addend_rows_W1 + columns_1P, mask=is_real, other=0.0).to(tl.float32)
        a_WP = (x_WP + addend_WP).to(a_ptr.dtype.element_ty)
        a_rows_W1 = (ways_W1 * a_way + b * a_sequence + t * a_token) * X_STEP
        tl.store(a_ptr + a_rows_W1 + columns_1P, a_WP, mask=is_real)
        h_WP = a_WP.to(tl.float32)
    if IS_SUMMED:
        tl.store(sum_ptr + index * D + columns_1P, tl.sum(h_WP, axis=0)[None, :], mask=columns_1P < D)
    if SEES_OTHERS:
        total_places = b * total_sequence + t * total_token + columns_1P
        total_1P = tl.load(total_ptr + total_places, mask=columns_1P < D, other=0.0).to(tl.float32)
        h_WP = h_WP + (total_1P - x_WP)
    mean_W1 = tl.sum(tl.where(is_real, h_WP, 0.0), axis=1)[:, None] / D
    centred_WP = tl.where(is_real, h_WP - mean_W1, 0.0)
    variance_W1 = tl.sum(centred_WP * centred_WP, axis=1)[:, None] / D
    inverse_std_W1 = 1.0 / tl.sqrt(variance_W1 + epsilon)
    rows_W1 = ways_W1 * num_tokens + index
    n_WP = (centred_WP * inverse_std_W1).to(n_ptr.dtype.element_ty)
    tl.store(n_ptr + rows_W1 * P + columns_1P, n_WP, mask=(ways_W1 < W) & (columns_1P < P))
    tl.store(inverse_std_ptr + rows_W1, inverse_std_W1, mask=ways_W1 < W)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_a_ptr, grad_n_ptr, grad_sum_ptr, n_ptr, inverse_std_ptr, grad_x_ptr, grad_addend_ptr, grad_total_ptr,
    W, T, num_tokens,
    grad_a_way, grad_a_sequence, grad_a_token, grad_n_way, grad_n_sequence, grad_n_token,
    grad_x_way, grad_x_sequence, grad_x_token,
    D: tl.constexpr, P: tl.constexpr, ADDS: tl.constexpr, IS_SUMMED: tl.constexpr, SEES_OTHERS: tl.constexpr,
    HAS_X: tl.constexpr, GRAD_A_STEP: tl.constexpr, GRAD_N_STEP: tl.constexpr, GRAD_X_STEP: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    b, t = index // T, index % T
    ways_W1 = tl.arange(0, BLOCK_W).to(tl.int64)[:, None]
    columns_1P = tl.arange(0, BLOCK_P)[None, :]
    is_real = (ways_W1 < W) & (columns_1P < D)
    rows_W1 = ways_W1 * num_tokens + index
    grad_n_rows_W1 = (ways_W1 * grad_n_way + b * grad_n_sequence + t * grad_n_token) * GRAD_N_STEP
    grad_n_WP = tl.load(grad_n_ptr + grad_n_rows_W1 + columns_1P, mask=is_real, other=0.0).to(tl.float32)
    n_WP = tl.load(n_ptr + rows_W1 * P + columns_1P, mask=is_real, other=0.0).to(tl.float32)
    inverse_std_W1 = tl.load(inverse_std_ptr + rows_W1, mask=ways_W1 < W, other=0.0)
    mean_W1 = tl.sum(grad_n_WP, axis=1)[:, None] / D
    along_W1 = tl.sum(grad_n_WP * n_WP, axis=1)[:, None] / D
    grad_WP = tl.where(is_real, inverse_std_W1 * (grad_n_WP - mean_W1 - n_WP * along_W1), 0.0)
    if SEES_OTHERS:
        total_1P = tl.sum(grad_WP, axis=0)[None, :]
        tl.store(grad_total_ptr + index * D + columns_1P, total_1P, mask=columns_1P < D)
    if ADDS:
        grad_a_rows_W1 = (ways_W1 * grad_a_way + b * grad_a_sequence + t * grad_a_token) * GRAD_A_STEP
        grad_WP += tl.load(grad_a_ptr + grad_a_rows_W1 + columns_1P, mask=is_real, other=0.0).to(tl.float32)
    if IS_SUMMED:  # each way of a real column is in the sum once
        grad_sum_1P = tl.load(grad_sum_ptr + index * D + columns_1P, mask=columns_1P < D, other=0.0)
        grad_WP += grad_sum_1P.to(tl.float32)
    if HAS_X:
        grad_x_rows_W1 = (ways_W1 * grad_x_way + b * grad_x_sequence + t * grad_x_token) * GRAD_X_STEP
        tl.store(grad_x_ptr + grad_x_rows_W1 + columns_1P, grad_WP.to(grad_x_ptr.dtype.element_ty), mask=is_real)
    if ADDS:
        grad_WP = tl.where(is_real, grad_WP, 0.0).to(grad_addend_ptr.dtype.element_ty)
        tl.store(grad_addend_ptr + rows_W1 * P + columns_1P, grad_WP, mask=(ways_W1 < W) & (columns_1P < P))
