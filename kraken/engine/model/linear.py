"""Linears of an engine, the fastest way to each on the device where its weights are.

Shape letters as in `kraken/model.py`; I and O are the inputs and outputs of a linear.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.kernels.cpu.kernels import CpuKernels, cpu_kernels

Linear = Callable[[Any], Tensor]
"""W linears side by side: [W, T, I] -> [W, T, O]; quantised ones also take `QuantizedTensor`."""
Activation = Literal["none", "gelu"]
"""What follows a linear at once; `gelu` is the tanh form."""

MAX_FUSED_TOKENS = 256
"""Tokens up to which GELU is faster in the product's kernel than in one of its own, on an H100."""
MAX_FEW_TOKENS = 64
"""Tokens up to which the engine's own kernel computes a linear."""


def make_linear(
    weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none", is_wide: bool = False
) -> Linear:
    """The fastest way to these linears on the device where the weights are; weights are copied where that needs it.

    Args:
        is_wide: its outputs may be float32 whatever the weights are, where the sums are.
    """
    kernels = cpu_kernels(weight_WOI.device, weight_WOI.dtype)
    if kernels is not None and kernels.can_compute(weight_WOI.shape[2]):
        return CpuLinear(weight_WOI, bias_WO, activation, kernels, is_wide)
    if _is_packable(weight_WOI):
        return OneDnnLinear(weight_WOI, bias_WO, activation)
    return TorchLinear(weight_WOI, bias_WO, activation)


def _is_packable(weight_WOI: Tensor) -> bool:
    """Whether oneDNN computes with weights of its own order here."""
    if weight_WOI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_WOI.dtype == torch.bfloat16:  # not on every processor
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_WOI.dtype == torch.float32


class CpuLinear:
    """The engine's own kernel, on a CPU in float32 or bfloat16.

    With the few tokens of decoding it reads weights up to 1.6 times as fast as oneDNN. With those of a prompt oneDNN is
    a tenth faster, and has its own copy of the weights, where it is there: prompts are most of the work of an
    evaluation and of a first answer, and models that are run on a CPU are small beside its memory.
    """

    def __init__(
        self,
        weight_WOI: Tensor,
        bias_WO: Tensor | None,
        activation: Activation,
        kernels: CpuKernels,
        is_wide: bool = False,
    ):
        self._kernels, self._gelu, self._num_outputs = kernels, activation == "gelu", weight_WOI.shape[1]
        self._out_dtype = torch.float32 if is_wide else weight_WOI.dtype
        self._weights = kernels.packed_weights(weight_WOI)
        self._of_many: OneDnnLinear | None = None
        if self._out_dtype == weight_WOI.dtype and _is_packable(weight_WOI):
            self._of_many = OneDnnLinear(weight_WOI, bias_WO, activation)
        self._bias_WO: Tensor | None = None
        if bias_WO is not None:  # a copy: the kernel wants it whole
            self._bias_WO = bias_WO.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def __call__(self, x_WTI: Tensor) -> Tensor:
        if self._of_many is not None and x_WTI.shape[1] > MAX_FEW_TOKENS:
            return self._of_many(x_WTI)
        x_WTI = x_WTI.contiguous()
        y_WTO = x_WTI.new_empty(*x_WTI.shape[:2], self._num_outputs, dtype=self._out_dtype)
        self._kernels.linear(x_WTI, self._weights, self._bias_WO, y_WTO, self._gelu)
        return y_WTO


class OneDnnLinear:
    """Weights in oneDNN's own order, on a CPU.

    With 2 to 32 tokens, which is what decoding has, a product with plain weights runs at a fifth to a half of the speed
    at which memory delivers them. The operator is the one that torch.compile uses for frozen weights.
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
    """One batched product; on CUDA in 16 bits with GELU in the same kernel, for one linear of few tokens."""

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none"):
        self._weight_WOI, self._bias_WO, self._activation = weight_WOI, bias_WO, activation
        self._fused_bias_O: Tensor | None = None
        # the fused form is an approximation that float32 would notice, and wants a bias
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
