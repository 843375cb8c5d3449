"""Sums over the devices of an engine: started early and waited for late, or waited for at once.

A sum is computed in one of three ways. In an *exchange* every rank sends its own part to every other and adds what it
receives: one round, and no more bytes than an all-reduce where there are two ranks. An *all-reduce* divides the
work in a ring: fewer bytes where there are more ranks, but more rounds. Over gloo, two ranks always exchange, and more
of them do while a message is small; over NCCL it is the library's all-reduce, on a stream of its own. CPU processes
exchange what fits into the kernel's buffers without gloo, see `kraken/engine/distributed/socket_exchange.py`. On CUDA
devices
of one host a rank may also read the others' parts in their memory, in the kernel that needs the sum; see
`kraken/engine/distributed/peer_all_reduce.py`.

Nothing here is global: an engine has a process group of its own, whatever else the process takes part in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from kraken.engine.distributed.socket_exchange import Exchange, connect_all
from kraken.engine.model import residual
from kraken.engine.model.norm import Norm, Normed
from kraken.residual_norm import sum_across_ways

if TYPE_CHECKING:  # which imports this module
    from kraken.engine.distributed.peer_all_reduce import PeerAllReduce, PeerHandle

Overlap = Literal["overlapped", "blocking", "none"]
Backend = Literal["library", "direct", "copied"]
"""How a sum is computed: by gloo or NCCL, or over peer memory."""

MAX_EXCHANGED_BYTES = 64 * 1024
"""Largest message that more than two ranks exchange: below, rounds cost more than bytes."""
MAX_CHANNELS = 4
"""Multiprocessors that NCCL may take while attention computes on the others."""
SUM_TAG, GATHER_TAG, WEIGHT_TAG = range(3)


@dataclass(slots=True)
class ProcessGroupHandle:
    """The sum of the ranks' parts, in flight."""

    own: Tensor
    works: list[Any] = field(default_factory=list)
    received: Sequence[Tensor] = ()
    """Each other rank's part, where they are exchanged."""
    total: Tensor | None = None
    """The sum of all parts, its own included, where it is an all-reduce."""

    def wait(self) -> None:
        """Wait until it is there."""
        for work in self.works:
            _wait(work)
        self.works.clear()

    def add_reduced_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        """Wait, and give x + addend, and of each way held here the norm of that and of all other ways' x, which this is
        the sum of: those held here, and those of other ranks."""
        self.wait()
        if self.total is not None:
            return residual.add_reduced_norm(x_WTD, addend_WTD, norm, self.total, is_total=True)
        if not self.received:
            return residual.add_reduced_norm(x_WTD, addend_WTD, norm)
        first, *rest = self.received
        for part in rest:
            first.add_(part)
        return residual.add_reduced_norm(x_WTD, addend_WTD, norm, first)


class DeviceGroup:
    """The ranks of an engine, as one of them knows them; the default is one rank alone.

    Args:
        process_group: gloo's or NCCL's; None for one rank.
        exchange: of CPU processes, for messages up to its capacity; None leaves them all to gloo.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: Any = None,
        overlap: Overlap = "overlapped",
        exchange: Exchange | None = None,
    ):
        self.rank, self.size, self.overlap = rank, size, overlap
        self._exchange = exchange
        self._group = process_group
        self._is_nccl = process_group is not None and process_group.name() == "nccl"
        self._peers: PeerAllReduce | None = None
        self._backend_for: Callable[[int], Backend] = lambda num_tokens: "library"

    def use_peers(self, peers: "PeerAllReduce", backend_for: Callable[[int], Backend]) -> None:
        """Also compute sums over peer memory.

        Args:
            method_of: number of tokens -> how to add up over them; the same on every rank.
        """
        self._peers, self._backend_for = peers, backend_for

    @property
    def reduces(self) -> bool:
        """Whether there is anybody to add up with."""
        return self.size > 1 and self.overlap != "none"

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, is_summed: bool
    ) -> tuple[Tensor, Normed | None, "ProcessGroupHandle | PeerHandle | None"]:
        """x + addend, and its norm where there is one; if asked for also its sum over the ranks, begun.

        That sum is, of each rank, the sum over the ways that it holds; what it is of may not change until it is seen.
        """
        if not is_summed:
            return *residual.add_norm(x_WTD, addend_WTD, norm), None
        if self.reduces and self._peers is not None and (backend := self._backend_for(x_WTD.shape[1])) != "library":
            return self._peers.add_norm(x_WTD, addend_WTD, norm, backend, is_blocking=self.overlap != "overlapped")
        out_WTD, normed_WTD = residual.add_norm(x_WTD, addend_WTD, norm)
        return out_WTD, normed_WTD, self._start_process_group(out_WTD)

    def start(self, x_WTD: Tensor) -> "ProcessGroupHandle | PeerHandle":
        """The sum over all ways of x, those of other ranks included, begun; x may not change until it is seen."""
        if self.reduces and self._peers is not None and self._backend_for(x_WTD.shape[1]) != "library":
            own_TD = sum_across_ways(x_WTD)[0].to(x_WTD.dtype) if len(x_WTD) > 1 else x_WTD[0]
            return self._peers.start(own_TD, is_blocking=self.overlap != "overlapped")
        return self._start_process_group(x_WTD)

    def _start_process_group(self, x_WTD: Tensor) -> ProcessGroupHandle:
        """By gloo, NCCL or an exchange."""
        if not self.reduces:
            return ProcessGroupHandle(x_WTD)
        overlapped = self.overlap == "overlapped"
        own = sum_across_ways(x_WTD).to(x_WTD.dtype) if len(x_WTD) > 1 else x_WTD
        pending = ProcessGroupHandle(own)
        if self._exchanges(own):
            self._start_exchange(pending)
        else:
            pending.total = own.clone()
            pending.works = [self._all_reduce(pending.total, on_own_stream=overlapped)]
        if not overlapped:
            pending.wait()
        return pending

    def all_reduce(self, own: Tensor) -> Tensor:
        """The sum over the ranks, bit-equal on all of them; may overwrite `own`."""
        if not self.reduces:
            return own
        if self._peers is not None and self._backend_for(own.shape[-2]) != "library":
            return self._peers.all_reduce(own)
        if not self._exchanges(own):
            own = own.contiguous()
            _wait(self._all_reduce(own, on_own_stream=False))
            return own
        pending = ProcessGroupHandle(own.contiguous())
        self._start_exchange(pending)
        pending.wait()
        parts = [*pending.received[: self.rank], pending.own, *pending.received[self.rank :]]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_reduce_add_norm(self, x_1TD: Tensor, part_1TD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        """x plus the sum of the ranks' parts, and the norm of it where one is asked for; bit-equal on all ranks where x
        is. May overwrite the part."""
        if self.reduces and self._peers is not None and self._backend_for(x_1TD.shape[1]) != "library":
            return self._peers.add(x_1TD, part_1TD, norm)
        return residual.add_norm(x_1TD, self.all_reduce(part_1TD), norm)

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """Every rank's columns side by side, on rank 0; the others get back what they gave."""
        if self.size == 1:
            return x_RC
        if self._peers is not None and self._backend_for(len(x_RC)) != "library":
            return self._peers.gather_columns(x_RC)
        if self._is_nccl:
            parts = x_RC.new_empty(self.size, *x_RC.shape)
            _wait(self._group._allgather_base(parts, x_RC.contiguous()))
            return parts.permute(1, 0, 2).flatten(1) if self.rank == 0 else x_RC
        if self.rank > 0:
            self.send(x_RC, 0, GATHER_TAG)
            return x_RC
        received = [torch.empty_like(x_RC) for _ in range(1, self.size)]
        works = [self._group.recv([part], rank, GATHER_TAG) for rank, part in enumerate(received, start=1)]
        for work in works:
            _wait(work)
        return torch.cat([x_RC, *received], dim=1)

    def send(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Send to one rank."""
        _wait(self._group.send([x.contiguous()], rank, tag))

    def receive(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Fill x with what a rank sends."""
        _wait(self._group.recv([x], rank, tag))

    def end_pass(self) -> None:
        """To be called after every forward pass, also of those that are recorded."""
        if self._peers is not None:
            self._peers.end_pass()

    def abort(self) -> None:
        """Break off whatever is in flight, so that nobody waits for a rank that is gone; gloo notices by itself."""
        if self._peers is not None:
            self._peers.release()
        if self._is_nccl:
            self._group.abort()

    def close(self) -> None:
        """Hang up. Over NCCL whatever graph holds sums must have been given back, or this waits for it."""
        if self._exchange is not None:
            self._exchange.close()
        if self._is_nccl:
            self._group.abort()  # the others may be gone, and nothing is in flight

    def _exchanges(self, x: Tensor) -> bool:
        if self._is_nccl:
            return False
        return self.size == 2 or x.numel() * x.element_size() <= MAX_EXCHANGED_BYTES

    def _start_exchange(self, pending: ProcessGroupHandle) -> None:
        own = pending.own.contiguous()
        others = [rank for rank in range(self.size) if rank != self.rank]
        received = [torch.empty_like(own) for _ in others]
        pending.own, pending.received = own, received
        if self._exchange is not None and own.nbytes <= self._exchange.capacity:
            pending.works = [self._exchange.start(own, received)]
            return
        # a send starts when the receiver has said that it is ready: receive first
        works = [self._group.recv([part], rank, SUM_TAG) for rank, part in zip(others, received, strict=True)]
        works += [self._group.send([own], rank, SUM_TAG) for rank in others]
        pending.works = works

    def _all_reduce(self, x: Tensor, on_own_stream: bool) -> Any:
        options = dist.AllreduceOptions()
        options.asyncOp = on_own_stream
        return self._group.allreduce([x], options)


def _wait(work: Any) -> None:
    """Of what NCCL does on the current stream there is nothing to wait for: it is in order with what follows."""
    if work is not None:
        work.wait()


def join_group(
    store: Store,
    rank: int,
    size: int,
    address: str,
    device: torch.device,
    timeout_s: float,
    overlap: Overlap,
    leaves_room: bool,
    message_bytes: int,
) -> DeviceGroup:
    """Meet the other ranks.

    Args:
        address: of this host, as the others reach it.
        timeout_s: how long a rank is waited for, now and in every sum.
        leaves_room: whether sums leave most multiprocessors of a GPU to what is computed meanwhile.
        message_bytes: of the largest sum.
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
    process_group = dist.ProcessGroupGloo(store, rank, size, gloo)
    return DeviceGroup(
        rank, size, process_group, overlap, connect_all(store, rank, size, address, message_bytes, timeout_s)
    )
