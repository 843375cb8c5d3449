"""The operations that a model is built from, in torch's operators: they run on every device and in every type.

    add_norm            x' = a + FFN(...),     n = LN1(x')             from one layer to the next
    add_reduced_norm    a = x + Attn(...),     n = LN2(a + S - x)      in a layer that reads the other ways

S is the sum over all ways of x, those of other ranks included. A layer that does not read the other ways uses
`add_norm` for both.

`choose_kernels` gives an engine one set of kernels when a model is loaded. `CpuKernels` and `CudaKernels` override what
they compute faster; the results are the same up to rounding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.batch import SamplingInput, StepBatch
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.quantized_tensor import QuantizedTensor, quantize_rows
from kraken.engine.kernels.torch.attention import PagedAttend, paged_attention
from kraken.engine.kernels.torch.linear import Activation, Linear, OneDnnLinear, TorchLinear, is_onednn_linear
from kraken.engine.kernels.torch.sampling import NOT_FINITE, most_likely, sample_rows
from kraken.model.residual_norm import sum_across_ways


class TorchKernels:
    """See the module's docstring."""

    def linear(
        self, weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none", is_wide: bool = False
    ) -> Linear:
        """W linears side by side. Weights are copied if the kernel needs another order.

        Args:
            is_wide: the outputs may be float32 for weights of any type, if the kernel sums in float32.
        """
        kind = OneDnnLinear if is_onednn_linear(weight_WOI) else TorchLinear
        return kind(weight_WOI, bias_WO, activation)

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        """x + addend, and the norm of that if there is a norm."""
        out_WTD = x_WTD + addend_WTD
        return out_WTD, None if norm is None else norm(out_WTD)

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm, part_1TD: Tensor | None = None, is_total: bool = False
    ) -> tuple[Tensor, Normed]:
        """a = x + addend, and for each way of this rank norm(a + the sum of x over the rank's other ways + part).

        Args:
            part_1TD: the sum over other ranks' ways; None if this rank has all ways.
            is_total: the part includes the ways of this rank.
        """
        a_WTD = summed_WTD = x_WTD + addend_WTD
        if is_total:
            assert part_1TD is not None
            return a_WTD, norm((a_WTD + (part_1TD - x_WTD)).to(a_WTD.dtype))
        if len(x_WTD) > 1:
            summed_WTD = summed_WTD + (sum_across_ways(x_WTD) - x_WTD)
        if part_1TD is not None:
            summed_WTD = summed_WTD + part_1TD
        return a_WTD, norm(summed_WTD.to(a_WTD.dtype))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the KV cache."""
        return torch.zeros(shape, dtype=dtype, device=device)

    def paged_attention(self, keys_LNSH: Tensor, values_LNSH: Tensor, batch: StepBatch) -> PagedAttend:
        """Attention of one step over the KV cache."""
        return paged_attention(keys_LNSH, values_LNSH, batch)

    def causal_attention(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        """Attention of one sequence over itself, without a cache. [T, N, H]."""
        q, k, v = (x_TNH.transpose(0, 1) for x_TNH in (q_TNH, k_TNH, v_TNH))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    def quantize(self, x_WTI: Tensor, with_gelu: bool = False) -> QuantizedTensor:
        """x, or with `with_gelu` GELU of x (the tanh form), in float8 with a scale per row."""
        return QuantizedTensor(*quantize_rows(F.gelu(x_WTI, approximate="tanh") if with_gelu else x_WTI))

    def sample(self, logits_BV: Tensor, inputs: Sequence[SamplingInput], sampled_B: Tensor | None) -> list[int]:
        """The next token of every row, `NOT_FINITE` where there is none. Waits for the device.

        Args:
            logits_BV: float32.
            sampled_B: see `ForwardOutput.next_ids_R`; only CUDA graphs give it.
        """
        ids_B = most_likely(logits_BV)
        rows = [index for index, row in enumerate(inputs) if row.params.temperature > 0.0]
        return replace_rows(ids_B, rows, logits_BV, inputs)

    def release_threads(self) -> None:
        """End the calling thread's workers before another thread computes; see `CpuLibrary.release_threads`."""


def replace_rows(ids_B: Tensor, rows: list[int], logits_BV: Tensor, inputs: Sequence[SamplingInput]) -> list[int]:
    """The ids, with some rows sampled anew by torch's operators unless their logits are not finite."""
    sampled: list[int] = []
    if rows:
        logits = logits_BV if len(rows) == len(inputs) else logits_BV[rows]
        sampled = sample_rows(logits, [inputs[row] for row in rows]).tolist()
    ids: list[int] = ids_B.tolist()
    for row, token_id in zip(rows, sampled, strict=True):
        ids[row] = token_id if ids[row] != NOT_FINITE else NOT_FINITE
    return ids
