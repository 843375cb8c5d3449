"""Linears in float8: half the bytes of weights and cached products' inputs, and twice the matrix rate of 16 bits.

Weights are scaled by output and inputs by token, so that the largest magnitude of each row is the largest of float8
e4m3; a product adds up in float32 and is scaled back in its own kernel. On CUDA inputs are quantised where they are
computed: by the kernels of `kraken/engine/kernels/cuda/residual_norm.py` with a norm, by one of their own with GELU
or alone.
Elsewhere plain operations do it, which shows what the numbers are and saves memory, not time.

Shape letters as in `kraken/engine/model/linear.py`, and: R of T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import ConfigError, ModelConfig
from kraken.engine.kernels.choose import has_kernels

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8 e4m3."""
SMALLEST_SCALE = 1e-12
"""For rows of zeros."""
MULTIPLE = 16
"""What inputs and outputs of a product are multiples of, in the kernels that there are."""
SCALES_ALIGNMENT = 16
"""Bytes; cuBLAS has no product for others."""
MIN_CAPABILITY = (8, 9)
"""Of CUDA devices that multiply float8."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Quantised inputs of W linears.

    Args:
        values_WTI: float8.
        scales_WT1: float32; a value times its row's scale is the input.
    """

    values_WTI: Tensor
    scales_WT1: Tensor

    def select(self, rows_R: Tensor) -> "QuantizedTensor":
        """Those tokens alone."""
        values_WRI = self.values_WTI.view(torch.uint8).index_select(1, rows_R).view(FLOAT8)
        return QuantizedTensor(values_WRI, self.scales_WT1.index_select(1, rows_R))


def empty_quantized(num_ways: int, num_tokens: int, num_inputs: int, device: torch.device) -> QuantizedTensor:
    """For a kernel to fill."""
    values_WTI = torch.empty(num_ways, num_tokens, num_inputs, dtype=FLOAT8, device=device)
    return QuantizedTensor(values_WTI, torch.empty(num_ways, num_tokens, 1, dtype=torch.float32, device=device))


def quantize(x_WTI: Tensor, with_gelu: bool = False) -> QuantizedTensor:
    """The rows of x, or of GELU of x (the tanh form)."""
    if has_kernels(x_WTI):
        from kraken.engine.kernels.cuda import (
            quantization as quantized_kernel,  # which imports Triton, and only CUDA has that
        )

        return quantized_kernel.quantize(x_WTI, with_gelu)
    x_WTI = F.gelu(x_WTI, approximate="tanh") if with_gelu else x_WTI
    return QuantizedTensor(*_quantize_last_dim(x_WTI))


def _quantize_last_dim(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 values of x, and float32 scales of its last dimension."""
    x = x.float()
    scales = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x / scales).to(FLOAT8), scales


class Fp8Linear:
    """Weights in float8; computes in the type that they came in."""

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None, gelu_before: bool = False):
        self._dtype, self._gelu_before = weight_WOI.dtype, gelu_before
        quantised = [_quantize_last_dim(weight_OI) for weight_OI in weight_WOI]  # one by one, for the sake of memory
        self._weights = [(values_OI.t(), scales_O1.t().contiguous()) for values_OI, scales_O1 in quantised]
        self._bias_WO = bias_WO

    def __call__(self, x: Tensor | QuantizedTensor) -> Tensor:
        rows = quantize(x, self._gelu_before) if isinstance(x, Tensor) else x
        ways = [
            self._product(values_TI, scales_T1, *weight)
            for values_TI, scales_T1, weight in zip(rows.values_WTI, rows.scales_WT1, self._weights, strict=True)
        ]
        y_WTO = ways[0][None] if len(ways) == 1 else torch.stack(ways)
        # cuBLAS refuses products of few rows that have a bias
        return y_WTO if self._bias_WO is None else y_WTO + self._bias_WO[:, None]

    def _product(self, values_TI: Tensor, scales_T1: Tensor, weight_IO: Tensor, scales_1O: Tensor) -> Tensor:
        if not values_TI.is_cuda:  # the operator scales by row in some releases of torch only
            return (values_TI.float() @ weight_IO.float() * scales_T1 * scales_1O).to(self._dtype)
        if scales_T1.data_ptr() % SCALES_ALIGNMENT:  # of a way that is not the first, and few tokens
            scales_T1 = scales_T1.clone()
        return torch._scaled_mm(values_TI, weight_IO, scales_T1, scales_1O, out_dtype=self._dtype, use_fast_accum=True)


def require_quantizable(model: ModelConfig, num_devices: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises: ConfigError: this model's linears, this type or this device have no products in float8."""
    if dtype != torch.bfloat16:
        raise ConfigError(f"engine.quantization=fp8 computes in bfloat16, and the model is in {dtype}; leave it out")
    is_divided = model.architecture != "kraken" and num_devices > 1
    sizes = {
        "width": model.width,
        "FFN columns": model.ffn_size // (num_devices if is_divided else 1),
        "heads' channels": model.width // (num_devices if is_divided else 1),
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ConfigError(
                f"engine.quantization=fp8 needs sizes that are multiples of {MULTIPLE}, and each device has {name} of "
                f"{size}; leave it out, or train a model whose widths are (presets that end in _aligned)"
            )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        raise ConfigError(
            "engine.quantization=fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, and this one has "
            f"{capability[0]}.{capability[1]}; leave it out"
        )
