"""The operations between the linears of a layer: residual addition, the sum over the ways, LayerNorm.

    add_norm            x' = a + FFN(...),     n = LN1(x')             from one layer to the next
    add_reduced_norm    a = x + Attn(...),     n = LN2(a + S - x)      in a layer that reads the other ways

S is the sum over all ways of x, those of other ranks included. A layer that does not read the other ways uses
`add_norm` for both. The kernels of the norm compute each of them.

Shape letters as in `kraken/model.py`.
"""

from torch import Tensor

from kraken.engine.model.norm import Norm, Normed


def add_norm(x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
    """x + addend, and the norm of that if there is a norm."""
    if norm is None:  # after the last layer
        return x_WTD + addend_WTD, None
    return norm.kernels.add_norm(x_WTD, addend_WTD, norm)


def add_reduced_norm(
    x_WTD: Tensor, addend_WTD: Tensor, norm: Norm, part_1TD: Tensor | None = None, is_total: bool = False
) -> tuple[Tensor, Normed]:
    """a = x + addend, and for each way of this rank the norm of a, the rank's other ways' x, and the part.

    Args:
        part_1TD: the sum over other ranks' ways; None if this rank has all ways.
        is_total: the part includes the ways of this rank.
    """
    return norm.kernels.add_reduced_norm(x_WTD, addend_WTD, norm, part_1TD, is_total)
