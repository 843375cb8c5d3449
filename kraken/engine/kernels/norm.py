"""LayerNorm of an engine: its weights, and its equation in torch's operators. Kernels that compute it together with
something else take a `Norm` as their argument. Shape letters as in `kraken/model/architecture.py`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kraken.engine.kernels.quantized_tensor import QuantizedTensor
from kraken.model.residual_norm import LAYER_NORM_EPSILON

Normed = Tensor | QuantizedTensor
"""The output of a norm, [W, T, D]."""


@dataclass(frozen=True, slots=True)
class Norm:
    """The gains and biases of the ways' LayerNorms."""

    weight_WD: Tensor
    bias_WD: Tensor | None
    is_quantized: bool = False
    """Kernels that compute it together with something else return a `QuantizedTensor`."""

    def __call__(self, x_WTD: Tensor) -> Tensor:
        size = self.weight_WD.shape[1:]
        if len(self.weight_WD) == 1:
            bias_D = None if self.bias_WD is None else self.bias_WD[0]
            return F.layer_norm(x_WTD, size, self.weight_WD[0], bias_D, LAYER_NORM_EPSILON)
        normed_WTD = F.layer_norm(x_WTD, size, eps=LAYER_NORM_EPSILON) * self.weight_WD[:, None]
        return normed_WTD if self.bias_WD is None else normed_WTD + self.bias_WD[:, None]


def select(normed: Normed, rows_R: Tensor) -> Normed:
    """The rows of some tokens."""
    return normed.index_select(1, rows_R) if isinstance(normed, Tensor) else normed.select(rows_R)
