"""Sums over the devices of an engine: started early and waited for late, or waited for at once.

A sum is computed in one of two ways. In an *exchange* every rank sends its own part to every other and adds what it
receives: one round, and no more bytes than an all-reduce where there are two ranks. An *all-reduce* divides the
work in a ring: fewer bytes where there are more ranks, but more rounds. Over gloo, two ranks always exchange, and more
of them do while a message is small; over NCCL it is the library's all-reduce, on a stream of its own.

Nothing here is global: an engine has a process group of its own, whatever else the process takes part in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

Overlap = Literal["overlapped", "blocking", "none"]

MAX_EXCHANGED_BYTES = 64 * 1024
"""Largest message that more than two ranks exchange: below, rounds cost more than bytes."""
MAX_CHANNELS = 4
"""Multiprocessors that NCCL may take while attention computes on the others."""
SUM_TAG, GATHER_TAG, WEIGHT_TAG = range(3)


@dataclass(slots=True)
class PendingSum:
    """The sum of the other ranks' parts, in flight."""

    own: Tensor
    works: list[Any] = field(default_factory=list)
    received: Sequence[Tensor] = ()
    """Each other rank's part, where they are exchanged."""
    total: Tensor | None = None
    """The sum of all parts, where it is an all-reduce."""

    def wait(self) -> Tensor | None:
        """What the other ranks contributed; None where nothing was sent."""
        for work in self.works:
            work.wait()
        self.works.clear()
        if self.total is not None:
            return self.total - self.own
        if not self.received:
            return None
        first, *rest = self.received
        for part in rest:
            first.add_(part)
        return first


class DeviceGroup:
    """The ranks of an engine, as one of them knows them; the default is one rank alone.

    Args:
        process_group: gloo's or NCCL's; None for one rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group: Any = None, overlap: Overlap = "overlapped"):
        self.rank, self.size, self.overlap = rank, size, overlap
        self._group = process_group
        self._is_nccl = process_group is not None and process_group.name() == "nccl"

    @property
    def sums(self) -> bool:
        """Whether there is anybody to add up with."""
        return self.size > 1 and self.overlap != "none"

    def start_sum(self, own: Tensor) -> PendingSum:
        """Begin to add up over the ranks; `own` may not change until the wait is over."""
        pending = PendingSum(own)
        if not self.sums:
            return pending
        overlapped = self.overlap == "overlapped"
        if self._exchanges(own):
            self._start_exchange(pending)
        else:
            pending.total = own.clone()
            pending.works = [self._all_reduce(pending.total, on_own_stream=overlapped)]
        if not overlapped:
            for work in pending.works:
                work.wait()
            pending.works.clear()
        return pending

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks, bit-equal on all of them; may overwrite `own`."""
        if not self.sums:
            return own
        if not self._exchanges(own):
            own = own.contiguous()
            self._all_reduce(own, on_own_stream=False).wait()
            return own
        pending = PendingSum(own.contiguous())
        self._start_exchange(pending)
        for work in pending.works:
            work.wait()
        parts = [*pending.received[: self.rank], pending.own, *pending.received[self.rank :]]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """Every rank's columns side by side, on rank 0; the others get back what they gave."""
        if self.size == 1:
            return x_RC
        if self._is_nccl:
            parts = x_RC.new_empty(self.size, *x_RC.shape)
            self._group._allgather_base(parts, x_RC.contiguous()).wait()
            return parts.permute(1, 0, 2).flatten(1) if self.rank == 0 else x_RC
        if self.rank > 0:
            self.send(x_RC, 0, GATHER_TAG)
            return x_RC
        received = [torch.empty_like(x_RC) for _ in range(1, self.size)]
        works = [self._group.recv([part], rank, GATHER_TAG) for rank, part in enumerate(received, start=1)]
        for work in works:
            work.wait()
        return torch.cat([x_RC, *received], dim=1)

    def send(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Send to one rank."""
        self._group.send([x.contiguous()], rank, tag).wait()

    def receive(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Fill x with what a rank sends."""
        self._group.recv([x], rank, tag).wait()

    def abort(self) -> None:
        """Break off whatever is in flight, so that nobody waits for a rank that is gone; gloo notices by itself."""
        if self._is_nccl:
            self._group.abort()

    def _exchanges(self, x: Tensor) -> bool:
        if self._is_nccl:
            return False
        return self.size == 2 or x.numel() * x.element_size() <= MAX_EXCHANGED_BYTES

    def _start_exchange(self, pending: PendingSum) -> None:
        own = pending.own.contiguous()
        others = [rank for rank in range(self.size) if rank != self.rank]
        received = [torch.empty_like(own) for _ in others]
        # a send starts when the receiver has said that it is ready: receive first
        works = [self._group.recv([part], rank, SUM_TAG) for rank, part in zip(others, received, strict=True)]
        works += [self._group.send([own], rank, SUM_TAG) for rank in others]
        pending.own, pending.received, pending.works = own, received, works

    def _all_reduce(self, x: Tensor, on_own_stream: bool) -> Any:
        options = dist.AllreduceOptions()
        options.asyncOp = on_own_stream
        return self._group.allreduce([x], options)


def join_group(
    store: Store,
    rank: int,
    size: int,
    address: str,
    device: torch.device,
    timeout_s: float,
    overlap: Overlap,
    leaves_room: bool,
) -> DeviceGroup:
    """Meet the other ranks.

    Args:
        address: of this host, as the others reach it.
        timeout_s: how long a rank is waited for, now and in every sum.
        leaves_room: whether sums leave most multiprocessors of a GPU to what is computed meanwhile.
    Raises:
        RuntimeError: they do not come.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        # the engine watches over time itself; NCCL's own watch ends the whole process
        options._timeout = 10 * timeout
        if leaves_room:
            options.config.max_ctas = MAX_CHANNELS
        return DeviceGroup(rank, size, dist.ProcessGroupNCCL(store, rank, size, options), overlap)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    gloo._timeout = timeout
    gloo._threads = 1
    return DeviceGroup(rank, size, dist.ProcessGroupGloo(store, rank, size, gloo), overlap)
