"""What every rank of an engine needs to know to load its part of the model, and the steps that all ranks take alike.

Rank 0 makes a `RankSetup` from the configuration (`distributed_runner.py`) and sends it to the workers (`worker.py`).
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from kraken.config import AllReduceSetting, ConfigError, EngineConfig, ModelConfig, Quantization
from kraken.engine.distributed.choose_backend import MessageShapes, choose_backend
from kraken.engine.distributed.device_group import DeviceGroup, join_group
from kraken.engine.distributed.partition import Part, Weights, random_weights, read_weights, weights_of
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.model.network import Network
from kraken.model import Kraken


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """Where an engine's weights come from: an exchange folder that every rank reads; a model in the memory of rank 0,
    which sends each worker its part; or, with neither, random numbers for measuring time.
    """

    config: ModelConfig
    folder: Path | None = None
    model: Kraken | None = None

    def weights(self, part: Part, dtype: torch.dtype, device: torch.device) -> Weights:
        """The weights of a part. Only rank 0 may call it if the source is a model in memory."""
        if self.folder is not None:
            return read_weights(self.folder, part, dtype, device)
        return random_weights(part, dtype, device) if self.model is None else weights_of(self.model, part)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSetup:
    """The setup of an engine, the same on all ranks. All fields but `model` are JSON values."""

    size: int
    store_host: str
    store_port: int
    model: ModelConfig
    folder: str | None
    is_sent: bool
    """Rank 0 sends the workers their weights."""
    num_ids: int
    device: str
    dtype: str
    quantization: Quantization
    num_threads: int
    timeout_s: float
    is_blocking: bool
    all_reduce: AllReduceSetting
    max_step_tokens: int
    cuda_graphs: bool

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RankSetup":
        return cls(**(values | {"model": ModelConfig(**values["model"])}))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def join(
        self, store: Store, rank: int, address: str, device: torch.device, group_type: type[DeviceGroup]
    ) -> DeviceGroup:
        """Connect this rank with the others; all ranks call it at the same time. See `join_group`."""
        return join_group(
            choose_kernels(device, self.torch_dtype),
            store,
            rank,
            self.size,
            address,
            device,
            self.timeout_s,
            is_blocking=self.is_blocking,
            leaves_room=self.model.is_kraken and not self.is_blocking,
            message_bytes=self.max_step_tokens * self.model.width * self.torch_dtype.itemsize,
            group_type=group_type,
        )

    def choose_backend(self, store: Store, network: Network) -> None:
        """On CUDA, choose the all-reduce backends; all ranks call it at the same time."""
        part = network.part
        shapes = MessageShapes(
            num_ways=len(part.ways),
            width=part.config.width,
            max_tokens=self.max_step_tokens,
            num_columns=len(part.head_rows(self.num_ids)),
            dtype=network.dtype,
            is_kraken=part.config.is_kraken,
        )
        choose_backend(
            network.group, store, network.device, shapes, network.first_layers,
            self.all_reduce, self.cuda_graphs, self.timeout_s,
        )  # fmt: skip


def device_of(rank: int, size: int, device_type: str, on_one_host: bool) -> torch.device:
    """The device of a rank: its own GPU of this host, or the only one that its process sees.

    Args:
        on_one_host: all ranks are started on this host, so that there must be a GPU for each.
    Raises:
        ConfigError: GPUs are missing.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if on_one_host and count < size:
        raise ConfigError(
            f"engine.num_devices={size}, but this process sees {count} GPUs; lower it, or choose engine.device=cpu"
        )
    return torch.device("cuda", rank if count >= size else 0)


def threads_per_rank(config: EngineConfig) -> int:
    """CPU threads of each rank."""
    return max(1, (config.num_threads or len(os.sched_getaffinity(0))) // config.num_devices)
