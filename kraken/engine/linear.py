"""Linears of an engine, the fastest way to each on the device where its weights are.

Shape letters as in `kraken/model.py`; I and O are the inputs and outputs of a linear.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""W linears side by side: [W, T, I] -> [W, T, O]."""


def make_linear(weight_WOI: Tensor, bias_WO: Tensor | None) -> Linear:
    """The fastest way to these linears on the device where the weights are; weights are copied where that needs it."""
    packable = weight_WOI.device.type == "cpu" and weight_WOI.dtype in (torch.float32, torch.bfloat16)
    if packable and torch.backends.mkldnn.is_available():
        return PackedLinear(weight_WOI, bias_WO)
    return PlainLinear(weight_WOI, bias_WO)


class PackedLinear:
    """Weights in oneDNN's own order, on a CPU.

    With 2 to 32 tokens, which is what decoding has, a product with plain weights runs at a fifth to a half of the speed
    at which memory delivers them. The operator is the one that torch.compile uses for frozen weights.
    """

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None):
        self._weights = [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) for weight in weight_WOI]
        self._biases = [None] * len(self._weights) if bias_WO is None else list(bias_WO)

    def __call__(self, x_WTI: Tensor) -> Tensor:
        ways = [
            torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias, "none", [], "")
            for x_TI, weight, bias in zip(x_WTI, self._weights, self._biases, strict=True)
        ]
        return ways[0][None] if len(ways) == 1 else torch.stack(ways)


class PlainLinear:
    """One batched product."""

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None):
        self._weight_WOI, self._bias_WO = weight_WOI, bias_WO

    def __call__(self, x_WTI: Tensor) -> Tensor:
        if len(self._weight_WOI) == 1:
            return F.linear(x_WTI, self._weight_WOI[0], None if self._bias_WO is None else self._bias_WO[0])
        y_WTO = torch.bmm(x_WTI, self._weight_WOI.transpose(1, 2))
        return y_WTO if self._bias_WO is None else y_WTO + self._bias_WO[:, None]
