"""The Triton kernels of a CUDA device behind the interface of `TorchKernels`. Importing this needs Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kraken.engine.batch import SamplingInput
from kraken.engine.kernels.cuda import residual_norm
from kraken.engine.kernels.cuda.prompt_attention import attend_prompt
from kraken.engine.kernels.cuda.quantization import quantize
from kraken.engine.kernels.cuda.sampling import sample_ids
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.quantized_tensor import QuantizedTensor
from kraken.engine.kernels.torch.kernels import TorchKernels, replace_rows


class CudaKernels(TorchKernels):
    """Linears are cuBLAS's, through torch. CUDA graphs call the kernels for paged attention directly, since only they
    have inputs of a fixed shape."""

    def causal_attention(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        return attend_prompt(q_TNH, k_TNH, v_TNH)

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        return residual_norm.add_norm(x_WTD, addend_WTD, norm)

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm, part_1TD: Tensor | None = None, is_total: bool = False
    ) -> tuple[Tensor, Normed]:
        parts = () if part_1TD is None else (part_1TD,)
        return residual_norm.add_reduced_norm(x_WTD, addend_WTD, norm, parts, is_total)

    def quantize(self, x_WTI: Tensor, with_gelu: bool = False) -> QuantizedTensor:
        return quantize(x_WTI, with_gelu)

    def sample(self, logits_BV: Tensor, inputs: Sequence[SamplingInput], sampled_B: Tensor | None) -> list[int]:
        rows = [index for index, row in enumerate(inputs) if row.is_truncated]
        if sampled_B is None:
            pairs = [row.temperature_and_uniform for row in inputs]
            sampled_B = sample_ids(logits_BV, torch.tensor(pairs, dtype=torch.float64, device=logits_BV.device))
        elif not rows:  # pinned memory, written by the graph: nothing else would wait for it
            torch.cuda.current_stream(logits_BV.device).synchronize()
        return replace_rows(sampled_B, rows, logits_BV, inputs)
