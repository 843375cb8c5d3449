"""What stands between the products of a layer: residual addition, the sum over the ways, LayerNorm without its gains.

    add_norm           a = x + addend,    n = norm(a),            S = the sum over the ways of a    from layer to layer
    add_reduced_norm   a = x + addend,    n = norm(a + S - x),    S' = the sum over the ways of a   where S is read

    norm(y) = (y - mean(y)) / sqrt(var(y) + epsilon)

Gains and biases of a LayerNorm are not here: `WayNorm.fold` multiplies them into the linear that reads n, so that their
gradients come from those of the linear's weights, and not from another pass over all tokens.

On a GPU each is one kernel forward and one backward, which hold a token's ways in registers: each value is read
once, and backward needs no input but n. What a compiler makes of the plain operations reads a token's ways again for
each of them, and passes float32 between kernels.

Shape letters as in `kraken/model/architecture.py`, and: P the width padded, the addend's and n's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.model.alignment import pad

LAYER_NORM_EPSILON = 1e-5


def sum_across_ways(x_WBTD: Tensor) -> Tensor:
    """The sum over the ways held here, [1, B, T, D], at least float32. Any dimensions may stand between W and D."""
    return x_WBTD.sum(dim=0, keepdim=True, dtype=None if x_WBTD.dtype == torch.float64 else torch.float32)


def add_norm(
    x_WBTD: Tensor, addend_WBTP: Tensor | None, padded_width: int, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """a [W, B, T, D], n [W, B, T, P] with zeros behind the width, and if asked for S [1, B, T, D].

    Args:
        addend_WBTP: what is behind the width is ignored; None adds nothing.
        sum_dtype: type of S, which is computed in at least float32; None computes none.
    """
    if _has_kernel(x_WBTD):
        a, n, _, total = torch.ops.kraken.residual_norm(x_WBTD, addend_WBTP, None, padded_width, sum_dtype)
        return x_WBTD if addend_WBTP is None else a, n, None if sum_dtype is None else total
    width = x_WBTD.shape[-1]
    a_WBTD = x_WBTD if addend_WBTP is None else x_WBTD + addend_WBTP[..., :width]
    total_1BTD = None if sum_dtype is None else sum_across_ways(a_WBTD).to(sum_dtype)
    return a_WBTD, pad(F.layer_norm(a_WBTD, (width,), eps=LAYER_NORM_EPSILON), padded_width), total_1BTD


def add_reduced_norm(
    x_WBTD: Tensor, addend_WBTP: Tensor, total_1BTD: Tensor, sum_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """a [W, B, T, D], n [W, B, T, P] with zeros behind the width, and if asked for S' [1, B, T, D].

    Args:
        addend_WBTP: what is behind the width is ignored.
        total_1BTD: S, over all ways, those that are not held here included.
        sum_dtype: type of S', which is computed in at least float32; None computes none.
    """
    padded_width = addend_WBTP.shape[-1]
    if _has_kernel(x_WBTD):
        a, n, _, total = torch.ops.kraken.residual_norm(x_WBTD, addend_WBTP, total_1BTD, padded_width, sum_dtype)
        return a, n, None if sum_dtype is None else total
    width = x_WBTD.shape[-1]
    a_WBTD = x_WBTD + addend_WBTP[..., :width]
    h_WBTD = (a_WBTD + (total_1BTD - x_WBTD)).to(a_WBTD.dtype)
    sum_1BTD = None if sum_dtype is None else sum_across_ways(a_WBTD).to(sum_dtype)
    return a_WBTD, pad(F.layer_norm(h_WBTD, (width,), eps=LAYER_NORM_EPSILON), padded_width), sum_1BTD


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)


# Operators of torch's own registry, so that compiled layers call them as they are: one kernel each, nothing to trace.


@torch.library.custom_op(
    "kraken::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? addend, Tensor? total, int padded_width, ScalarType? sum_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _residual_norm(
    x: Tensor, addend: Tensor | None, total: Tensor | None, padded_width: int, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (empty without an addend), n, 1 / sqrt(var + epsilon), float32 [W, B, T], and the sum over the ways
    [1, B, T, D] (empty unless a type is given for it)."""
    from kraken.model import residual_norm_kernel  # which imports Triton, and only CUDA has that

    a, n, inverse_std, sum_of_a = _outputs(x, addend, total, padded_width, sum_dtype)
    residual_norm_kernel.forward(x, addend, total, a, n, inverse_std, sum_of_a, LAYER_NORM_EPSILON)
    return a, n, inverse_std, sum_of_a


@_residual_norm.register_fake
def _outputs(
    x: Tensor, addend: Tensor | None, total: Tensor | None, padded_width: int, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = x.new_empty(0) if addend is None else torch.empty_like(x)
    n = x.new_empty(*x.shape[:-1], padded_width)
    sum_of_a = x.new_empty((0,) if sum_dtype is None else (1, *x.shape[1:]), dtype=sum_dtype or torch.float32)
    return a, n, x.new_empty(x.shape[:-1], dtype=torch.float32), sum_of_a


@torch.library.custom_op(
    "kraken::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor? grad_a, Tensor grad_n, Tensor? grad_sum, Tensor n, Tensor inverse_std, int width, "
    "ScalarType? total_dtype) -> (Tensor, Tensor, Tensor)",
)
def _residual_norm_backward(
    grad_a: Tensor | None,
    grad_n: Tensor,
    grad_sum: Tensor | None,
    n: Tensor,
    inverse_std: Tensor,
    width: int,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [W, B, T, D], the addend [W, B, T, P] with zeros behind the width, and S [1, B, T, D] in its
    type. Empty are x's where a way sees the others, the addend's without `grad_a`, S's where no way does."""
    from kraken.model import residual_norm_kernel

    grad_x, grad_addend, grad_total = _gradients(grad_a, grad_n, grad_sum, n, inverse_std, width, total_dtype)
    residual_norm_kernel.backward(grad_a, grad_n, grad_sum, n, inverse_std, grad_x, grad_addend, grad_total, width)
    return grad_x, grad_addend, grad_total


@_residual_norm_backward.register_fake
def _gradients(
    grad_a: Tensor | None,
    grad_n: Tensor,
    grad_sum: Tensor | None,
    n: Tensor,
    inverse_std: Tensor,
    width: int,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # x's lie in memory as those of a do, which is how a compiled layer wants them
    like_a = n.new_empty(*n.shape[:-1], width) if grad_a is None else torch.empty_like(grad_a)
    return (
        like_a if total_dtype is None else n.new_empty(0),
        n.new_empty(0) if grad_a is None else torch.empty_like(n),
        n.new_empty((0,) if total_dtype is None else (1, *n.shape[1:-1], width), dtype=total_dtype or n.dtype),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, addend, total, _, sum_dtype = inputs
    ctx.width, ctx.adds, ctx.is_summed = x.shape[-1], addend is not None, sum_dtype is not None
    ctx.total_dtype = None if total is None else total.dtype
    ctx.save_for_backward(*output[1:3])


def _differentiate(ctx: Any, grad_a: Tensor, grad_n: Tensor, _: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    n, inverse_std = ctx.saved_tensors
    grad_x, grad_addend, grad_total = torch.ops.kraken.residual_norm_backward(
        grad_a if ctx.adds else None,
        grad_n,
        grad_sum if ctx.is_summed else None,
        n,
        inverse_std,
        ctx.width,
        ctx.total_dtype,
    )
    if ctx.total_dtype is not None:  # of h = x + addend + (S - x) only S and the addend are left, and x is in a
        grad_x = grad_a + grad_sum.to(grad_a.dtype) if ctx.is_summed else grad_a
        return grad_x, grad_addend, grad_total, None, None
    return grad_x, grad_addend if ctx.adds else None, None, None, None


_residual_norm.register_autograd(_differentiate, setup_context=_remember)
