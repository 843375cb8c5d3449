"""Tensors in float8 e4m3 with one scale per row. `Fp8Linear` multiplies them; the kernels write them.

Shape letters as in `kraken/model/architecture.py`; I is the inputs of a linear, R some of the T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest float8 e4m3; each row is scaled so that its largest magnitude becomes this."""
SMALLEST_SCALE = 1e-12
"""Prevents a division by zero for rows of zeros."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Quantized inputs of W linears.

    Args:
        values_WTI: float8.
        scales_WT1: float32; a value times its row's scale is the input.
    """

    values_WTI: Tensor
    scales_WT1: Tensor

    def select(self, rows_R: Tensor) -> "QuantizedTensor":
        """Some tokens only."""
        values_WRI = self.values_WTI.view(torch.uint8).index_select(1, rows_R).view(FLOAT8)
        return QuantizedTensor(values_WRI, self.scales_WT1.index_select(1, rows_R))


def empty_quantized(num_ways: int, num_tokens: int, num_inputs: int, device: torch.device) -> QuantizedTensor:
    """Uninitialised memory for a kernel to write."""
    values_WTI = torch.empty(num_ways, num_tokens, num_inputs, dtype=FLOAT8, device=device)
    return QuantizedTensor(values_WTI, torch.empty(num_ways, num_tokens, 1, dtype=torch.float32, device=device))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 values of x, and the float32 scales of its last dimension."""
    x = x.float()
    scales = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x / scales).to(FLOAT8), scales
