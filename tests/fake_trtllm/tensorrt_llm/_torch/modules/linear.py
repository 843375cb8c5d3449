"""Linear and its two ways of splitting over ranks."""

import enum
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorrt_llm._torch.distributed import AllReduce, AllReduceParams, AllReduceStrategy, allgather
from tensorrt_llm.mapping import Mapping


class TensorParallelMode(enum.StrEnum):
    COLUMN = "column"
    ROW = "row"


class WeightMode(enum.StrEnum):
    VANILLA = "vanilla"
    FUSED_QKV_LINEAR = "fused_qkv_linear"


@dataclass(kw_only=True)
class WeightsLoadingConfig:
    weight_mode: WeightMode = WeightMode.VANILLA


class Linear(nn.Module):
    """In ROW mode only rank 0 adds the bias, whether the outputs are summed or not. With one rank nothing is summed,
    and parameters of a sum that is not switched off are refused."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
        quant_config: Any = None,
        weights_loading_config: WeightsLoadingConfig | None = None,
        reduce_output: bool = True,
        skip_create_weights_in_init: bool = False,
        use_custom_cublas_mm: bool = False,
        lora: Any = None,
        allreduce_strategy: AllReduceStrategy = AllReduceStrategy.AUTO,
        force_dynamic_quantization: bool = False,
    ):
        super().__init__()
        self.mapping = mapping or Mapping()
        self.tp_size, self.tp_rank, self.tp_mode = self.mapping.tp_size, self.mapping.tp_rank, tensor_parallel_mode
        self.gather_output, self.reduce_output = gather_output, reduce_output
        self.weights_loading_config = weights_loading_config or WeightsLoadingConfig()
        self.in_features, self.out_features = in_features, out_features
        if tensor_parallel_mode == TensorParallelMode.ROW:
            assert in_features % self.tp_size == 0
            self.in_features = in_features // self.tp_size
        elif tensor_parallel_mode == TensorParallelMode.COLUMN:
            assert out_features % self.tp_size == 0
            self.out_features = out_features // self.tp_size
        self.has_bias, self.dtype = bias, dtype
        self.all_reduce = AllReduce(self.mapping, allreduce_strategy, dtype) if reduce_output else None
        self._weights_created = False
        if not skip_create_weights_in_init:
            self.create_weights()

    def create_weights(self) -> None:
        if self._weights_created:
            return
        self._weights_created = True
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=self.dtype), False)
        self.register_parameter("bias", None)
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=self.dtype), False)

    def forward(
        self,
        input: Tensor,
        *,
        all_reduce_params: AllReduceParams | None = None,
        lora_params: dict[str, Any] | None = None,
        layer_idx: int | None = None,
    ) -> Tensor:
        if self.tp_mode == TensorParallelMode.ROW:
            output = F.linear(input, self.weight, None if self.tp_rank > 0 else self.bias)
            if self.all_reduce is None:
                return output
            is_off = all_reduce_params is None or not all_reduce_params.enable_allreduce
            assert self.tp_size > 1 or is_off, "no all-reduce is called when tp_size is 1"
            return self.all_reduce(output, all_reduce_params=all_reduce_params)
        output = F.linear(input, self.weight, self.bias)
        if self.tp_mode == TensorParallelMode.COLUMN and self.gather_output:
            output = allgather(output, self.mapping)
        return output

    def load_weights(self, weights: list[dict[str, Tensor]]) -> None:
        assert self._weights_created
        fused = self.weights_loading_config.weight_mode == WeightMode.FUSED_QKV_LINEAR
        assert len(weights) == (3 if fused else 1), f"{len(weights)} dictionaries of weights"
        self.weight.data.copy_(torch.cat([self._shard(part["weight"]) for part in weights]))
        if self.bias is not None:
            self.bias.data.copy_(torch.cat([self._shard(part["bias"], is_bias=True) for part in weights]))

    def _shard(self, tensor: Tensor, is_bias: bool = False) -> Tensor:
        if self.tp_mode is None or self.tp_size == 1 or (is_bias and self.tp_mode == TensorParallelMode.ROW):
            return tensor
        dim = 0 if self.tp_mode == TensorParallelMode.COLUMN else 1
        return tensor.chunk(self.tp_size, dim=dim)[self.tp_rank]
