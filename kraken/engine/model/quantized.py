"""Linears in float8: half the bytes of weights and inputs, and twice the matrix rate of 16 bits.

Weights are scaled by output and inputs by token, so that the largest magnitude of each row becomes the largest float8
e4m3. A product sums in float32 and applies the scales in its own kernel. On CUDA the kernel that computes an input also
quantizes it: LayerNorm in `kraken/engine/kernels/cuda/residual_norm.py`, GELU in
`kraken/engine/kernels/cuda/quantization.py`. On a CPU the same numbers come from torch's operators; that saves memory
and no time.

Shape letters as in `kraken/engine/kernels/torch/linear.py`.
"""

import torch
from torch import Tensor

from kraken.config import ConfigError, ModelConfig
from kraken.engine.kernels.quantized_tensor import QuantizedTensor, quantize_rows
from kraken.engine.kernels.torch.kernels import TorchKernels

MULTIPLE = 16
"""Float8 products exist for multiples of so many inputs and outputs."""
SCALES_ALIGNMENT = 16
"""Bytes to which cuBLAS wants the scales aligned."""
MIN_CAPABILITY = (8, 9)
"""Of CUDA devices that multiply float8."""


class Fp8Linear:
    """W linears with weights in float8. Outputs have the type of the original weights.

    Args:
        gelu_before: apply GELU (tanh form) to inputs that are not quantized yet.
    """

    def __init__(self, weight_WOI: Tensor, bias_WO: Tensor | None, kernels: TorchKernels, gelu_before: bool = False):
        self._dtype, self._gelu_before, self._kernels = weight_WOI.dtype, gelu_before, kernels
        quantized = [quantize_rows(weight_OI) for weight_OI in weight_WOI]  # one by one, for less memory
        self._weights = [(values_OI.t(), scales_O1.t().contiguous()) for values_OI, scales_O1 in quantized]
        self._bias_WO = bias_WO

    def __call__(self, x: Tensor | QuantizedTensor) -> Tensor:
        rows = self._kernels.quantize(x, self._gelu_before) if isinstance(x, Tensor) else x
        ways = [
            self._product(values_TI, scales_T1, *weight)
            for values_TI, scales_T1, weight in zip(rows.values_WTI, rows.scales_WT1, self._weights, strict=True)
        ]
        y_WTO = ways[0][None] if len(ways) == 1 else torch.stack(ways)
        # added here, since cuBLAS refuses a bias in products of few rows
        return y_WTO if self._bias_WO is None else y_WTO + self._bias_WO[:, None]

    def _product(self, values_TI: Tensor, scales_T1: Tensor, weight_IO: Tensor, scales_1O: Tensor) -> Tensor:
        if not values_TI.is_cuda:  # on a CPU `_scaled_mm` scales by row in some releases of torch only
            return (values_TI.float() @ weight_IO.float() * scales_T1 * scales_1O).to(self._dtype)
        if scales_T1.data_ptr() % SCALES_ALIGNMENT:  # of another than the first way, with few tokens
            scales_T1 = scales_T1.clone()
        return torch._scaled_mm(values_TI, weight_IO, scales_T1, scales_1O, out_dtype=self._dtype, use_fast_accum=True)


def require_quantizable(model: ModelConfig, num_devices: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a model can be quantized.

    Raises:
        ConfigError: there is no float8 product for the size of its linears, its type or its device.
    """
    if dtype != torch.bfloat16:
        raise ConfigError(f"engine.quantization=fp8 computes in bfloat16, and the model is in {dtype}; leave it out")
    is_divided = not model.is_kraken and num_devices > 1
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
