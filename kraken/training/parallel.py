"""Who takes part in training: one mesh of processes (replicate, shard, way), their devices, and who averages what.

The way axis is innermost, so that neighbours in rank, which share a node, share a model; shards come next, replicas
last. Every process of one way group trains on the same sequences; the other two axes divide a step's batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from kraken.config import ConfigError
from kraken.model.architecture import way_dimension
from kraken.model.ways import WayGroup
from kraken.stopwatch import Stopwatch

AXES = ("replicate", "shard", "way")
VALUES_PER_BUCKET = 2**26
"""Gradients of the replicas that are summed in one all-reduce: 256 MB in float32, far more than latency matters for."""


def num_replicas(num_processes: int, shard_size: int, way_size: int) -> int:
    """The replicate axis: what the other two leave of the processes.

    Raises:
        ConfigError: the axes' product cannot be the number of processes.
    """
    if num_processes % (shard_size * way_size):
        raise ConfigError(
            f"cluster.num_workers={num_processes} is not a multiple of cluster.shard_size={shard_size} times "
            f"cluster.way_size={way_size}; choose {shard_size * way_size}, or a multiple of it"
        )
    return num_processes // (shard_size * way_size)


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among those that train together; the default is one process alone.

    Args:
        devices: the mesh of all processes; None for one.
    """

    device: torch.device
    devices: DeviceMesh | None = None
    overlap: bool = True
    communication: Stopwatch = field(default_factory=Stopwatch)
    """Runs while a collective of ours is waited for: sums over the ways, the loss over a divided vocabulary, gradients
    and their norm. Not in it is what FSDP waits for, which it does not tell, nor what compiled code waits for."""

    @property
    def rank(self) -> int:
        """Place among all processes."""
        return 0 if self.devices is None else self.devices.get_rank()

    @property
    def size(self) -> int:
        """All processes."""
        return 1 if self.devices is None else self.devices.size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def axis_size(self, axis: str) -> int:
        """Processes along one axis."""
        return 1 if self.devices is None else self.devices[axis].size()

    def axis_rank(self, axis: str) -> int:
        """Place along one axis."""
        return 0 if self.devices is None else self.devices.get_local_rank(axis)

    @property
    def ways(self) -> WayGroup:
        """The processes that share this one's model."""
        if self.devices is None or self.axis_size("way") == 1:
            return WayGroup(overlap=self.overlap)
        axis = self.devices["way"]
        group = axis.get_group()
        return WayGroup(axis.get_local_rank(), axis.size(), group, group.group_name, self.overlap, self.communication)

    @property
    def num_data_ranks(self) -> int:
        """Parts that a step's batch is divided into."""
        return self.size // self.axis_size("way")

    @property
    def data_rank(self) -> int:
        """Which part of a step's batch this process trains on."""
        return self.rank // self.axis_size("way")

    def shard(self, model: nn.Module, layers: nn.ModuleList, compute: torch.dtype) -> None:
        """Divide parameters, gradients and optimizer state over the shard axis, layer by layer; no-op without one.

        Parameters are gathered in the type of the computation, and gradients are reduced in that of the master weights.
        """
        if self.devices is None or self.axis_size("shard") == 1:
            return
        mesh = self.devices["replicate", "shard"] if self.axis_size("replicate") > 1 else self.devices["shard"]
        num_shards = self.axis_size("shard")
        master = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)

        def placement(parameter: nn.Parameter) -> Shard:
            # the ways come first and are few; a matrix's rows are many
            rows_divide = parameter.dim() == 3 and parameter.shape[1] % num_shards == 0
            return Shard(1 if rows_divide else 0)

        for layer in layers:
            fully_shard(layer, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
        fully_shard(model, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)

    def reshard(self, model: nn.Module) -> None:
        """Give back what FSDP gathered for a forward pass that no backward pass followed, such as a validation."""
        if isinstance(model, FSDPModule):
            model.reshard()

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """Replace the gradients by their mean over the replicas, in a few large all-reduces.

        Called once a step, after the last microbatch. Where FSDP shards the model, it has done so already.
        """
        if self.devices is None or self.axis_size("replicate") == 1 or self.axis_size("shard") > 1:
            return
        group, size = self.devices["replicate"].get_group(), self.axis_size("replicate")
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for bucket in buckets_of(gradients, VALUES_PER_BUCKET):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with self.communication.running():
                dist.all_reduce(flat, group=group)
            flat /= size
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(to) for part, to in zip(parts, bucket, strict=True)])

    @torch.no_grad()
    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients down to a global L2 norm; returns the norm before, equal on every process.

        A parameter that every process of a way group holds counts once.
        """
        gradients: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[way_dimension(name) is not None].append(local(parameter.grad))
        held_by_all, divided = (squared_norm(gradients[key]) for key in (False, True))
        squared = held_by_all + self.ways.all_reduce(divided)
        if self.devices is not None and self.axis_size("shard") > 1:
            with self.communication.running():
                dist.all_reduce(squared, group=self.devices["shard"].get_group())
        norm = squared.sqrt()
        torch._foreach_mul_(gradients[False] + gradients[True], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the data ranks, in place; a way group counts once."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.axis_size("way")
        return tensor

    def barrier(self) -> None:
        """Return when every process has arrived."""
        if self.size > 1:
            dist.barrier()


def buckets_of(tensors: list[Tensor], num_values: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of at most so many values, or of one tensor that is larger."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > num_values:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements of at least one tensor."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return tensors[0].new_zeros(())
    return torch.stack(torch._foreach_norm(filled)).square().sum()


@contextmanager
def join_mesh(
    use_gpu: bool, shard_size: int = 1, way_size: int = 1, overlap: bool = True, timeout_s: float = 600.0
) -> Iterator[Mesh]:
    """Join whatever launched this process: a Ray worker's group, torchrun's environment, or nothing (one process).

    A group that already exists is used and left alone; one made here is ended here.

    Args:
        timeout_s: a collective that has waited so long fails.

    Raises:
        ConfigError: the axes' product is not the number of processes.
    """
    made_here = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")
    timeout = timedelta(seconds=timeout_s)
    if use_gpu:
        torch.cuda.set_device(device)
    if made_here:
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=timeout)
    try:
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        shape = (num_replicas(num_processes, shard_size, way_size), shard_size, way_size)
        devices = None
        if num_processes > 1:
            devices = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
            for axis in AXES:  # the groups of the axes have torch's own timeout
                _set_pg_timeout(timeout, devices[axis].get_group())
        yield Mesh(device, devices, overlap, Stopwatch(device))
    finally:
        if made_here:
            dist.destroy_process_group()
