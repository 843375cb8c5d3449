"""The operations between the linears of a layer: residual addition, the sum over the ways, LayerNorm.

    add_norm            x' = a + FFN(...),     n = LN1(x')             from one layer to the next
    add_reduced_norm    a = x + Attn(...),     n = LN2(a + S - x)      in a layer that reads the other ways

S is the sum over all ways of x, those of other ranks included. A layer that does not read the other ways uses
`add_norm` for both. Each is one kernel: on CUDA if Triton is installed, on a CPU if there is a C compiler.

Shape letters as in `kraken/model.py`.
"""

from torch import Tensor

from kraken.engine.kernels.choose import has_kernels
from kraken.engine.kernels.cpu.library import cpu_kernels
from kraken.engine.model.norm import Norm, Normed
from kraken.residual_norm import LAYER_NORM_EPSILON, sum_across_ways


def add_norm(x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
    """x + addend, and the norm of that if there is a norm."""
    if has_kernels(x_WTD):
        from kraken.engine.kernels.cuda import (
            residual_norm as residual_kernel,  # which imports Triton, and only CUDA has that
        )

        return residual_kernel.add_norm(x_WTD, addend_WTD, norm)
    if (kernels := cpu_kernels(x_WTD.device, x_WTD.dtype)) is not None:
        gain_WD, bias_WD = (None, None) if norm is None else (norm.weight_WD, norm.bias_WD)
        return kernels.residual(x_WTD, addend_WTD, gain_WD, bias_WD, LAYER_NORM_EPSILON)
    out_WTD = x_WTD + addend_WTD
    return out_WTD, None if norm is None else norm(out_WTD)


def add_reduced_norm(
    x_WTD: Tensor, addend_WTD: Tensor, norm: Norm, part_1TD: Tensor | None = None, is_total: bool = False
) -> tuple[Tensor, Normed]:
    """a = x + addend, and for each way of this rank the norm of a, the rank's other ways' x, and the part.

    Args:
        part_1TD: the sum over other ranks' ways; None if this rank has all ways.
        is_total: the part includes the ways of this rank.
    """
    if has_kernels(x_WTD):
        from kraken.engine.kernels.cuda import residual_norm as residual_kernel

        return residual_kernel.add_reduced_norm(
            x_WTD, addend_WTD, norm, () if part_1TD is None else (part_1TD,), is_total
        )
    if (kernels := cpu_kernels(x_WTD.device, x_WTD.dtype)) is not None:
        weights = norm.weight_WD, norm.bias_WD, LAYER_NORM_EPSILON
        a_WTD, normed_WTD = kernels.residual(x_WTD, addend_WTD, *weights, part_1TD, sees=True, is_total=is_total)
        assert normed_WTD is not None
        return a_WTD, normed_WTD
    a_WTD = summed_WTD = x_WTD + addend_WTD
    if is_total:
        assert part_1TD is not None
        return a_WTD, norm((a_WTD + (part_1TD - x_WTD)).to(a_WTD.dtype))
    if len(x_WTD) > 1:
        summed_WTD = summed_WTD + (sum_across_ways(x_WTD) - x_WTD)
    if part_1TD is not None:
        summed_WTD = summed_WTD + part_1TD
    return a_WTD, norm(summed_WTD.to(a_WTD.dtype))
