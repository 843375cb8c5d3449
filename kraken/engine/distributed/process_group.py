"""All-reduce over a process group of torch: NCCL on CUDA, gloo and sockets on CPUs.

CPU ranks *exchange* small messages: each sends its own part to every other rank and adds what it receives. That takes
one round, and between two ranks it moves no more bytes than an all-reduce, so two ranks always exchange. More ranks use
gloo's all-reduce for larger messages. An exchange runs over the engine's own sockets if a message fits into the
kernel's buffers (`socket_exchange.py`), and over gloo otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken.engine.distributed.all_reduce import AllReduce, Handle
from kraken.engine.distributed.socket_exchange import Exchange
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.model.residual_norm import sum_across_ways

MAX_EXCHANGED_BYTES = 64 * 1024
"""Largest message that more than two ranks exchange; above it the bytes cost more than the rounds."""
REDUCE_TAG, GATHER_TAG, WEIGHT_TAG = range(3)


@dataclass(slots=True)
class ProcessGroupHandle:
    """An exchange or an all-reduce in flight."""

    kernels: TorchKernels
    own: Tensor
    """This rank's part, kept until it has been sent."""
    works: list[Any] = field(default_factory=list)
    received: Sequence[Tensor] = ()
    """The other ranks' parts of an exchange, in the order of the ranks."""
    total: Tensor | None = None
    """The sum over all ranks, this one included, of an all-reduce."""

    def wait(self) -> None:
        for work in self.works:
            _wait(work)
        self.works.clear()

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        self.wait()
        if self.total is not None:
            return self.kernels.add_reduced_norm(x_WTD, addend_WTD, norm, self.total, is_total=True)
        first, *rest = self.received
        for part in rest:
            first.add_(part)
        return self.kernels.add_reduced_norm(x_WTD, addend_WTD, norm, first)


class ProcessGroupAllReduce(AllReduce):
    """The backend `nccl`, and its substitute on CPUs.

    Args:
        process_group: NCCL's or gloo's, of this engine alone.
        exchange: connections between CPU ranks for messages up to `exchange.capacity`; None leaves them to gloo.
    """

    def __init__(
        self,
        kernels: TorchKernels,
        process_group: Any,
        rank: int,
        size: int,
        is_blocking: bool = False,
        exchange: Exchange | None = None,
    ):
        super().__init__(kernels, is_blocking)
        self._group, self._exchange = process_group, exchange
        self._rank, self._size = rank, size
        self._is_nccl = process_group.name() == "nccl"

    def start(self, x_WTD: Tensor) -> Handle:
        own = sum_across_ways(x_WTD).to(x_WTD.dtype) if len(x_WTD) > 1 else x_WTD
        if self._exchanges(own):
            return self._started(self._start_exchange(own))
        total = own.clone()
        work = self._all_reduce(total, is_async=not self.is_blocking)
        return self._started(ProcessGroupHandle(self.kernels, own, [work], total=total))

    def all_reduce(self, x_RC: Tensor) -> Tensor:
        x_RC = x_RC.contiguous()
        if not self._exchanges(x_RC):
            _wait(self._all_reduce(x_RC, is_async=False))
            return x_RC
        handle = self._start_exchange(x_RC)
        handle.wait()
        # in the order of the ranks, so that all of them get the same bits
        parts = [*handle.received[: self._rank], handle.own, *handle.received[self._rank :]]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        if self._is_nccl:
            parts = x_RC.new_empty(self._size, *x_RC.shape)
            _wait(self._group._allgather_base(parts, x_RC.contiguous()))
            return parts.permute(1, 0, 2).flatten(1) if self._rank == 0 else x_RC
        if self._rank > 0:
            self.send(x_RC, 0, GATHER_TAG)
            return x_RC
        received = [torch.empty_like(x_RC) for _ in range(1, self._size)]
        works = [self._group.recv([part], rank, GATHER_TAG) for rank, part in enumerate(received, start=1)]
        for work in works:
            _wait(work)
        return torch.cat([x_RC, *received], dim=1)

    def send(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Send x to one rank, and wait until it is sent."""
        _wait(self._group.send([x.contiguous()], rank, tag))

    def receive(self, x: Tensor, rank: int, tag: int = WEIGHT_TAG) -> None:
        """Wait for a tensor from one rank, and store it in x."""
        _wait(self._group.recv([x], rank, tag))

    def abort(self) -> None:
        """Break off what is in flight. Over gloo this is a no-op: gloo notices by itself that a rank is gone."""
        if self._is_nccl:
            self._group.abort()

    def close(self) -> None:
        """Close all connections. CUDA graphs that hold all-reduces must be reset before, or NCCL waits for them."""
        if self._exchange is not None:
            self._exchange.close()
        self.abort()  # does not wait for ranks that are gone, as an orderly end would

    def _exchanges(self, x: Tensor) -> bool:
        return not self._is_nccl and (self._size == 2 or x.nbytes <= MAX_EXCHANGED_BYTES)

    def _start_exchange(self, own: Tensor) -> ProcessGroupHandle:
        own = own.contiguous()
        others = [rank for rank in range(self._size) if rank != self._rank]
        received = [torch.empty_like(own) for _ in others]
        if self._exchange is not None and own.nbytes <= self._exchange.capacity:
            return ProcessGroupHandle(self.kernels, own, [self._exchange.start(own, received)], received)
        # gloo sends nothing before the receiver has said that it is ready, so every rank receives first
        works = [self._group.recv([part], rank, REDUCE_TAG) for rank, part in zip(others, received, strict=True)]
        works += [self._group.send([own], rank, REDUCE_TAG) for rank in others]
        return ProcessGroupHandle(self.kernels, own, works, received)

    def _all_reduce(self, x: Tensor, is_async: bool) -> Any:
        """Sum x in place; with NCCL on a stream of its own if `is_async`."""
        options = dist.AllreduceOptions()
        options.asyncOp = is_async
        return self._group.allreduce([x], options)


def _wait(work: Any) -> None:
    """NCCL returns no work for what it does on the current stream: what follows is in order behind it."""
    if work is not None:
        work.wait()
