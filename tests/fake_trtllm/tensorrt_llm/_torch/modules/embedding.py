"""The head, and the embedding that may share its weight; both split over the vocabulary.

Every rank has as many rows, those past the vocabulary included, and the head cuts off what they give."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorrt_llm._torch.distributed import AllReduce, allgather
from tensorrt_llm._torch.modules.linear import TensorParallelMode
from tensorrt_llm.mapping import Mapping


class LMHead(nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
    ):
        super().__init__()
        self.mapping = mapping or Mapping()
        self.tp_size, self.tp_rank, self.tp_mode = self.mapping.tp_size, self.mapping.tp_rank, tensor_parallel_mode
        self.gather_output, self.num_embeddings = gather_output, num_embeddings
        self.slice_size = num_embeddings
        if tensor_parallel_mode == TensorParallelMode.COLUMN:
            self.slice_size = math.ceil(num_embeddings / self.tp_size)
        self.start = self.tp_rank * self.slice_size if tensor_parallel_mode is not None else 0
        self.weight = nn.Parameter(torch.empty(self.slice_size, embedding_dim, dtype=dtype), False)

    def forward(self, hidden: Tensor) -> Tensor:
        output = F.linear(hidden, self.weight)
        if self.tp_mode is None or not self.gather_output:
            return output
        return allgather(output, self.mapping)[..., : self.num_embeddings]


class Embedding(LMHead):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, mapping, tensor_parallel_mode, gather_output)
        self.all_reduce = AllReduce(self.mapping)

    def forward(self, input: Tensor) -> Tensor:
        if self.tp_mode is None:
            return F.embedding(input, self.weight)
        local = input - self.start
        outside = (local < 0) | (local >= self.weight.shape[0])
        output = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self.all_reduce(output.masked_fill(outside[..., None], 0))
