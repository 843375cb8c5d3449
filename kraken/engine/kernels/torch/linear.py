"""Linears computed by torch's operators: the fallback on a CPU, and the only ones on CUDA.

`TorchKernels.linear` chooses between them. Shape letters as in `kraken/model/architecture.py`; I and O are the inputs
and outputs of a linear.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Any], Tensor]
"""W linears side by side: [W, T, I] -> [W, T, O]. Quantized linears also take a `QuantizedTensor`."""
Activation = Literal["none", "gelu"]
"""What is applied to the outputs; `gelu` is the tanh form."""

MAX_FUSED_TOKENS = 256
"""Up to so many tokens GELU is faster in the product's kernel than in one of its own, on an H100."""


def is_onednn_linear(weight_WOI: Tensor) -> bool:
    """Whether oneDNN has a linear with reordered weights for this device and type."""
    if weight_WOI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_WOI.dtype == torch.bfloat16:  # not on every processor
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_WOI.dtype == torch.float32


class OneDnnLinear:
    """Linears with weights in oneDNN's own order, on a CPU without a C compiler.

    With 2 to 32 tokens, as in decoding, a product with plain weights reaches a fifth to a half of the memory bandwidth.
    The operator is the one that torch.compile uses for frozen weights.
    """

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none"):
        self._weights = [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) for weight in weight_WOI]
        self._biases = [None] * len(self._weights) if bias_WO is None else list(bias_WO)
        self._fused: tuple[str, list[float], str] = ("gelu", [], "tanh") if activation == "gelu" else ("none", [], "")

    def __call__(self, x_WTI: Tensor) -> Tensor:
        ways = [
            torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias, *self._fused)
            for x_TI, weight, bias in zip(x_WTI, self._weights, self._biases, strict=True)
        ]
        return ways[0][None] if len(ways) == 1 else torch.stack(ways)


class TorchLinear:
    """Linears as one batched product. On CUDA in 16 bits, one linear of few tokens computes GELU in the same kernel."""

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none"):
        self._weight_WOI, self._bias_WO, self._activation = weight_WOI, bias_WO, activation
        self._fused_bias_O: Tensor | None = None
        # the fused operator approximates tanh, which float32 results would show, and it needs a bias
        if weight_WOI.is_cuda and weight_WOI.dtype.itemsize == 2 and activation == "gelu" and len(weight_WOI) == 1:
            self._fused_bias_O = weight_WOI.new_zeros(weight_WOI.shape[1]) if bias_WO is None else bias_WO[0]

    def __call__(self, x_WTI: Tensor) -> Tensor:
        if self._fused_bias_O is not None and x_WTI.shape[1] <= MAX_FUSED_TOKENS:
            weight_IO = self._weight_WOI[0].t()
            return torch._addmm_activation(self._fused_bias_O, x_WTI[0], weight_IO, use_gelu=True)[None]
        if len(self._weight_WOI) == 1:
            y_WTO = F.linear(x_WTI, self._weight_WOI[0], None if self._bias_WO is None else self._bias_WO[0])
        else:
            y_WTO = torch.bmm(x_WTI, self._weight_WOI.transpose(1, 2))
            y_WTO = y_WTO if self._bias_WO is None else y_WTO + self._bias_WO[:, None]
        return F.gelu(y_WTO, approximate="tanh") if self._activation == "gelu" else y_WTO
