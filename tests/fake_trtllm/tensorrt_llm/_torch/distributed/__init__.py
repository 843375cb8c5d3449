"""Collectives over the default process group of torch.distributed: gloo on CPUs, NCCL on GPUs."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from tensorrt_llm.mapping import Mapping


class AllReduceStrategy(IntEnum):
    NCCL = 0
    MIN_LATENCY = 1
    UB = 2
    AUTO = 3
    ONESHOT = 4
    TWOSHOT = 5
    LOWPRECISION = 6
    MNNVL = 7
    NCCL_SYMMETRIC = 8


class AllReduceFusionOp(IntEnum):
    NONE = 0
    RESIDUAL_RMS_NORM = 1


@dataclass
class AllReduceParams:
    fusion_op: AllReduceFusionOp = AllReduceFusionOp.NONE
    residual: Tensor | None = None
    norm_weight: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    enable_allreduce: bool = True
    trigger_completion_at_end: bool = True


ONE_SHOT_RANKS = (2, 4, 8, 16)
ONE_SHOT_BYTES = 16


class AllReduce(nn.Module):
    """Out of place; gives its input itself back where there is nothing to do.

    Every sum is written into `log` as (shape, dtype, strategy). Any strategy but NCCL refuses what the one-shot kernels
    cannot do.
    """

    log: ClassVar[list[tuple[tuple[int, ...], torch.dtype, AllReduceStrategy]]] = []

    def __init__(
        self,
        mapping: Mapping,
        strategy: AllReduceStrategy = AllReduceStrategy.AUTO,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.mapping, self.strategy = mapping, AllReduceStrategy(strategy)

    def forward(self, input: Tensor, *, all_reduce_params: AllReduceParams | None = None) -> Any:
        if self.mapping.tp_size == 1 or (all_reduce_params is not None and not all_reduce_params.enable_allreduce):
            return input
        if self.strategy != AllReduceStrategy.NCCL:
            if self.mapping.tp_size not in ONE_SHOT_RANKS:
                raise RuntimeError("allreduce_fusion_kernel: unsupported ranks number!")
            if input.shape[-1] * input.element_size() % ONE_SHOT_BYTES:
                raise RuntimeError("one-shot kernels move 16 bytes at a time")
        self.log.append((tuple(input.shape), input.dtype, self.strategy))
        output = input.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(output)
        return output


def allgather(input: Tensor, mapping: Mapping, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    if mapping.tp_size == 1:
        return input
    parts = [torch.empty_like(input) for _ in range(mapping.tp_size)]
    torch.distributed.all_gather(parts, input.contiguous())
    return torch.cat(parts, dim=dim)
