"""Mapping: which rank does what."""

import os
from typing import Any

import torch.distributed


class Mapping:
    """Under Ray (TLLM_DISABLE_MPI=1) `tp_rank` is the global rank, even of a mapping of one rank; under MPI it is
    counted within the mapping."""

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        *,
        cp_size: int = 1,
        cp_config: dict[str, Any] | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        moe_cluster_size: int = -1,
        moe_tp_size: int = -1,
        moe_ep_size: int = -1,
        attn_tp_size: int = -1,
        attn_cp_size: int = -1,
        enable_attention_dp: bool = False,
    ):
        if world_size != tp_size * pp_size * cp_size:
            raise ValueError(f"world_size must equal tp_size * pp_size * cp_size, found {world_size}")
        self.world_size, self.rank, self.gpus_per_node = world_size, rank, gpus_per_node
        self.tp_size, self.pp_size, self.cp_size = tp_size, pp_size, cp_size
        self.enable_attention_dp = enable_attention_dp

    @property
    def tp_rank(self) -> int:
        if os.environ.get("TLLM_DISABLE_MPI") == "1" and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return self.rank % self.tp_size

    @property
    def tp_group(self) -> list[int]:
        return list(range(self.tp_size))
