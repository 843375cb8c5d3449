"""What stands between the products of a layer: residual addition, the sum over the ways, LayerNorm without its gains.

    a    = x + addend
    seen = a                       or, where a layer reads the other ways,  a + (S - x), S the sum over the ways of x
    n    = (seen - mean(seen)) / sqrt(var(seen) + epsilon)

Gains and biases of a LayerNorm are not here: `WayNorm.fold` multiplies them into the linear that reads n, so that their
gradients come from those of the linear's weights, and not from another pass over all tokens.

On a GPU all of it is one kernel forward and one backward, which hold a token's ways in registers: each value is read
once, and backward needs no input but n. What a compiler makes of the plain operations reads a token's ways again for
each of them, and passes float32 between kernels.

Shape letters as in `kraken/model.py`, and: P the width padded, the addend's and n's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.alignment import pad

LAYER_NORM_EPSILON = 1e-5


def sum_across_ways(x_WBTD: Tensor) -> Tensor:
    """The sum over the ways held here, [1, B, T, D], at least float32. Any dimensions may stand between W and D."""
    return x_WBTD.sum(dim=0, keepdim=True, dtype=None if x_WBTD.dtype == torch.float64 else torch.float32)


def normalise(x_WBTD: Tensor, padded_width: int) -> Tensor:
    """n [W, B, T, P] of x, zeros behind the width."""
    if _has_kernel(x_WBTD):
        normed_WBTP: Tensor = torch.ops.kraken.residual_norm(x_WBTD, None, None, False, padded_width)[1]
        return normed_WBTP
    width = x_WBTD.shape[-1]
    return pad(F.layer_norm(x_WBTD, (width,), eps=LAYER_NORM_EPSILON), padded_width)


def add_and_normalise(
    x_WBTD: Tensor, addend_WBTP: Tensor, sees_others: bool, total_1BTD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """a [W, B, T, D] and n [W, B, T, P].

    Args:
        addend_WBTP: what is behind the width is ignored.
        sees_others: whether a way's norm reads the others' x.
        total_1BTD: S, where there are ways that are not held here; None sums over those in x.
    """
    if _has_kernel(x_WBTD):
        padded_width = addend_WBTP.shape[-1]
        a, n, _ = torch.ops.kraken.residual_norm(x_WBTD, addend_WBTP, total_1BTD, sees_others, padded_width)
        return a, n
    width = x_WBTD.shape[-1]
    seen_WBTD = a_WBTD = x_WBTD + addend_WBTP[..., :width]
    if sees_others:
        total_1BTD = sum_across_ways(x_WBTD) if total_1BTD is None else total_1BTD
        seen_WBTD = a_WBTD + (total_1BTD - x_WBTD)
    return a_WBTD, pad(F.layer_norm(seen_WBTD, (width,), eps=LAYER_NORM_EPSILON), addend_WBTP.shape[-1])


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)


# Operators of torch's own registry, so that compiled layers call them as they are: one kernel each, nothing to trace.


@torch.library.custom_op(
    "kraken::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? addend, Tensor? total, bool sees_others, int padded_width) -> (Tensor, Tensor, Tensor)",
)
def _residual_norm(
    x: Tensor, addend: Tensor | None, total: Tensor | None, sees_others: bool, padded_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """a (empty without an addend), n and 1 / sqrt(var + epsilon), float32 [W, B, T]."""
    from kraken import residual_norm_kernel  # which imports Triton, and only CUDA has that

    a, n, inverse_std = _outputs(x, addend, total, sees_others, padded_width)
    residual_norm_kernel.forward(x, addend, total, a, n, inverse_std, sees_others, LAYER_NORM_EPSILON)
    return a, n, inverse_std


@_residual_norm.register_fake
def _outputs(
    x: Tensor, addend: Tensor | None, total: Tensor | None, sees_others: bool, padded_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    a = x.new_empty(0) if addend is None else torch.empty_like(x)
    n = x.new_empty(*x.shape[:-1], padded_width)
    return a, n, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "kraken::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor? grad_a, Tensor grad_n, Tensor n, Tensor inverse_std, int width, bool sees_others) "
    "-> (Tensor, Tensor)",
)
def _residual_norm_backward(
    grad_a: Tensor | None, grad_n: Tensor, n: Tensor, inverse_std: Tensor, width: int, sees_others: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the addend [W, B, T, P], zeros behind the width, or without `grad_a` that of x; and where a way
    sees the others, that of S, float32 [1, B, T, D]."""
    from kraken import residual_norm_kernel

    grad, grad_total = _gradients(grad_a, grad_n, n, inverse_std, width, sees_others)
    residual_norm_kernel.backward(grad_a, grad_n, n, inverse_std, grad, grad_total, width, sees_others)
    return grad, grad_total


@_residual_norm_backward.register_fake
def _gradients(
    grad_a: Tensor | None, grad_n: Tensor, n: Tensor, inverse_std: Tensor, width: int, sees_others: bool
) -> tuple[Tensor, Tensor]:
    total_shape = (1, *n.shape[1:-1], width) if sees_others else (0,)
    return torch.empty_like(n), n.new_empty(total_shape, dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, addend, total, ctx.sees_others, _ = inputs
    ctx.width, ctx.adds, ctx.is_given = x.shape[-1], addend is not None, total is not None
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, grad_a: Tensor, grad_n: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    n, inverse_std = ctx.saved_tensors
    grad, grad_total = torch.ops.kraken.residual_norm_backward(
        grad_a if ctx.adds else None, grad_n, n, inverse_std, ctx.width, ctx.sees_others
    )
    if not ctx.adds:
        return grad[..., : ctx.width], None, None, None, None
    if not ctx.sees_others:
        return grad[..., : ctx.width], grad, None, None, None
    # of seen = x + addend + (S - x) only S and the addend are left; x is also in a, and in S where that is made of it
    if ctx.is_given:
        return grad_a, grad, grad_total, None, None
    return grad_a + grad_total.to(grad_a.dtype), grad, None, None, None


_residual_norm.register_autograd(_differentiate, setup_context=_remember)
