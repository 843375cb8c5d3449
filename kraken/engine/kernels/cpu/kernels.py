"""The C kernels behind the interface of `TorchKernels`: linears, paged attention and sampling on a CPU.

Shape letters as in `kraken/engine/kernels/torch/attention.py`, and: B sequences with few tokens, M blocks of the
longest of their block tables.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kraken.engine.batch import Integers, SamplingInput, StepBatch
from kraken.engine.kernels.cpu.library import CpuLibrary, zeros_in_huge_pages
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.torch.attention import PagedAttend
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.kernels.torch.linear import Activation, Linear
from kraken.model.residual_norm import LAYER_NORM_EPSILON

MAX_FEW_QUERIES = 2
"""Up to so many tokens of a sequence are attended one by one; for more it pays to rearrange the keys first."""


class CpuKernels(TorchKernels):
    """Kernels for the type that the library was compiled for, float32 or bfloat16."""

    def __init__(self, library: CpuLibrary):
        self.library = library

    def linear(
        self, weight_WOI: Tensor, bias_WO: Tensor | None, activation: Activation = "none", is_wide: bool = False
    ) -> Linear:
        if not self.library.can_compute(weight_WOI.shape[2]):
            return super().linear(weight_WOI, bias_WO, activation, is_wide)
        return CpuLinear(weight_WOI, bias_WO, activation, self.library, is_wide)

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        gain_WD, bias_WD = (None, None) if norm is None else (norm.weight_WD, norm.bias_WD)
        return self.library.add_norm(x_WTD, addend_WTD, gain_WD, bias_WD, LAYER_NORM_EPSILON)

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm, part_1TD: Tensor | None = None, is_total: bool = False
    ) -> tuple[Tensor, Normed]:
        weights = norm.weight_WD, norm.bias_WD, LAYER_NORM_EPSILON
        a_WTD, normed_WTD = self.library.add_norm(x_WTD, addend_WTD, *weights, part_1TD, True, is_total)
        assert normed_WTD is not None
        return a_WTD, normed_WTD

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return zeros_in_huge_pages(shape, dtype)

    def paged_attention(self, keys_LNSH: Tensor, values_LNSH: Tensor, batch: StepBatch) -> PagedAttend:
        """Sequences with few tokens are computed in one call, longer chunks of prompts one by one."""
        library, size = self.library, batch.tokens_per_block
        slots_T = torch.from_numpy(batch.slot_mapping())
        few: list[tuple[int, int, Integers]] = []  # of each token its row in T, its number of keys, its blocks
        chunks: list[tuple[slice, int, Tensor]] = []  # of each chunk its rows in T, its first position, its blocks
        for index, (end, first_position) in enumerate(zip(batch.ends, batch.first_positions, strict=True)):
            num_tokens, blocks = batch.num_tokens[index], batch.block_tables[index]
            start = end - num_tokens
            if num_tokens <= MAX_FEW_QUERIES:
                few += [(start + i, first_position + i + 1, blocks) for i in range(num_tokens)]
            else:
                blocks_M = torch.from_numpy(np.array(blocks, dtype=np.int32))
                chunks.append((slice(start, end), first_position, blocks_M))
        rows_B = torch.tensor([row for row, _, _ in few], dtype=torch.int64)
        lengths_B = torch.tensor([length for _, length, _ in few], dtype=torch.int64)
        num_blocks = [-(-length // size) for _, length, _ in few]
        tables_BM = torch.zeros(len(few), max(num_blocks, default=0), dtype=torch.int32)
        for table_M, (_, _, blocks), num in zip(tables_BM.numpy(), few, num_blocks, strict=True):
            table_M[:num] = blocks[:num]

        def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
            keys_NSH, values_NSH = keys_LNSH[layer], values_LNSH[layer]
            if k_TNH.stride() != v_TNH.stride() or k_TNH.stride(2) != 1:
                k_TNH, v_TNH = k_TNH.contiguous(), v_TNH.contiguous()
            library.store(k_TNH, v_TNH, keys_NSH, values_NSH, slots_T)
            q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
            out_TNH = q_TNH.new_empty(q_TNH.shape)
            if few:
                library.attend(q_TNH, keys_NSH, values_NSH, rows_B, tables_BM, lengths_B, size, out_TNH)
            for rows, first_position, blocks_M in chunks:
                library.attend_prompt_chunk(
                    q_TNH[rows], keys_NSH, values_NSH, blocks_M, first_position, size, out_TNH[rows]
                )
            return out_TNH

        return attend

    def sample(self, logits_BV: Tensor, inputs: Sequence[SamplingInput], sampled_B: Tensor | None) -> list[int]:
        params = [row.params for row in inputs]
        ids: list[int] = self.library.sample(
            logits_BV if logits_BV.stride(-1) == 1 else logits_BV.contiguous(),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.top_p for p in params], dtype=torch.float32),
            torch.tensor([p.min_p for p in params], dtype=torch.float32),
            torch.tensor([row.uniform for row in inputs], dtype=torch.float64),
        ).tolist()
        return ids

    def release_threads(self) -> None:
        self.library.release_threads()


class CpuLinear:
    """Linears of the C library. With the few tokens of decoding they read weights up to 1.6 times as fast as oneDNN.

    Args:
        is_wide: the outputs are float32 also in bfloat16.
    """

    def __init__(
        self,
        weight_WOI: Tensor,
        bias_WO: Tensor | None,
        activation: Activation,
        library: CpuLibrary,
        is_wide: bool = False,
    ):
        self._library, self._gelu, self._num_outputs = library, activation == "gelu", weight_WOI.shape[1]
        self._out_dtype = torch.float32 if is_wide else weight_WOI.dtype
        self._weights = library.pack_weights(weight_WOI)
        self._bias_WO: Tensor | None = None
        if bias_WO is not None:  # a copy: the kernel wants contiguous float32
            self._bias_WO = bias_WO.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def __call__(self, x_WTI: Tensor) -> Tensor:
        x_WTI = x_WTI.contiguous()
        y_WTO = x_WTI.new_empty(*x_WTI.shape[:2], self._num_outputs, dtype=self._out_dtype)
        self._library.linear(x_WTI, self._weights, self._bias_WO, y_WTO, self._gelu)
        return y_WTO
