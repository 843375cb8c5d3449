"""Who takes part in training: the processes, their devices and every training collective."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Replicas:
    """Processes that hold the whole model each and share a step's batch."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """A model whose backward averages the gradients over the replicas, overlapped with the backward itself."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.size > 1 else model

    @contextmanager
    def accumulating(self, model: nn.Module, enabled: bool) -> Iterator[None]:
        """Inside, a wrapped model's backward only adds to the local gradients."""
        if enabled and isinstance(model, DistributedDataParallel):
            with model.no_sync():
                yield
        else:
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the replicas, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Return when every replica has arrived."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_replicas(use_gpu: bool) -> Iterator[Replicas]:
    """Join whatever launched this process: a Ray worker's group, torchrun's environment, or nothing (one process).

    A group that already exists is used and left alone; one made here is ended here.
    """
    made_here = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if made_here:
        dist.init_process_group("nccl" if use_gpu else "gloo")
    try:
        if dist.is_initialized():
            yield Replicas(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Replicas(0, 1, device)
    finally:
        if made_here:
            dist.destroy_process_group()
