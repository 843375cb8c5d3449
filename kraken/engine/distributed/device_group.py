"""The ranks of one engine as one rank sees them: which backend computes each all-reduce, and how the group ends.

Nothing here is global: an engine has a process group of its own, whatever else the process takes part in.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from kraken.engine.distributed.all_reduce import AllReduce, LocalAllReduce
from kraken.engine.distributed.peer_all_reduce import Backend, CopyEngine, P2pStore, PeerChannel
from kraken.engine.distributed.process_group import ProcessGroupAllReduce
from kraken.engine.distributed.socket_exchange import connect_all
from kraken.engine.kernels.torch.kernels import TorchKernels

MAX_NCCL_CTAS = 4
"""Multiprocessors that NCCL may take while attention computes on the others."""


class DeviceGroup:
    """The ranks of an engine; the default is one rank alone.

    Args:
        kernels: that this rank computes with.
        process_group: the backend that every group of several ranks has; None for one rank, and in tests.
        is_blocking: wait for Kraken's all-reduces where they start, instead of overlapping them with attention.
    """

    def __init__(
        self,
        kernels: TorchKernels,
        rank: int = 0,
        size: int = 1,
        process_group: ProcessGroupAllReduce | None = None,
        is_blocking: bool = False,
    ):
        self.kernels, self.rank, self.size, self.is_blocking = kernels, rank, size, is_blocking
        self.process_group = process_group
        self._backends: dict[Backend, AllReduce] = {"nccl": process_group or LocalAllReduce(kernels)}
        self._backend_for: Callable[[int], Backend] = lambda num_tokens: "nccl"
        self._channel: PeerChannel | None = None

    def use_peers(self, channel: PeerChannel, backend_for: Callable[[int], Backend]) -> None:
        """Also use the backends that write into the memory of peers.

        Args:
            backend_for: number of tokens -> backend; the same on every rank.
        """
        self._channel, self._backend_for = channel, backend_for
        self._backends |= {
            "p2p_store": P2pStore(self.kernels, channel, self.is_blocking),
            "copy_engine": CopyEngine(self.kernels, channel, self.is_blocking),
        }

    def all_reduce_for(self, num_tokens: int) -> AllReduce:
        """The backend for tensors of so many tokens."""
        return self._backends[self._backend_for(num_tokens)]

    def end_pass(self) -> None:
        """Must be called after every forward pass, also while a CUDA graph is captured."""
        if self._channel is not None:
            self._channel.end_pass()

    def abort(self) -> None:
        """Break off what is in flight, so that this rank does not wait for one that is gone. From any thread."""
        if self._channel is not None:
            self._channel.release()
        if self.process_group is not None:
            self.process_group.abort()

    def close(self) -> None:
        """Leave the group. CUDA graphs that hold all-reduces must be reset before, or NCCL waits for them."""
        if self.process_group is not None:
            self.process_group.close()


def join_group(
    kernels: TorchKernels,
    store: Store,
    rank: int,
    size: int,
    address: str,
    device: torch.device,
    timeout_s: float,
    is_blocking: bool,
    leaves_room: bool,
    message_bytes: int,
    group_type: type[DeviceGroup] = DeviceGroup,
) -> DeviceGroup:
    """Connect with the other ranks; all of them call this at the same time.

    Args:
        kernels: that this rank computes with.
        store: shared by the ranks of this engine alone.
        address: of this host, as the other ranks reach it.
        timeout_s: how long to wait for a rank, now and in every all-reduce.
        leaves_room: restrict NCCL to a few multiprocessors, since attention computes at the same time.
        message_bytes: size of the largest all-reduce.
    Raises:
        RuntimeError: a rank does not come.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        # rank 0 enforces the timeout and says which rank is missing; NCCL's watchdog would end the whole process
        options._timeout = 10 * timeout
        if leaves_room:
            options.config.max_ctas = MAX_NCCL_CTAS
        nccl = dist.ProcessGroupNCCL(store, rank, size, options)
        backend = ProcessGroupAllReduce(kernels, nccl, rank, size, is_blocking)
        return group_type(kernels, rank, size, backend, is_blocking)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    gloo._timeout = timeout
    gloo._threads = 1
    process_group = dist.ProcessGroupGloo(store, rank, size, gloo)
    exchange = connect_all(store, rank, size, address, message_bytes, timeout_s)
    backend = ProcessGroupAllReduce(kernels, process_group, rank, size, is_blocking, exchange)
    return group_type(kernels, rank, size, backend, is_blocking)
