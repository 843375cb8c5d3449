"""All-reduce over the memory of peers: CUDA devices of one host write into each other's memory.

A rank sends a *message* per all-reduce or gather, in one of three ways:

* It *publishes*: it writes its part into a buffer of its own memory, and the ranks that need it read it over the link.
  Tensor parallelism and gathers do this, since every rank needs the sum at once.
* `p2p_store`: the kernel that computes the part stores it into a buffer that every other rank keeps for this one.
* `copy_engine`: a copy engine brings the part into those buffers, on a stream of its own.

With the last two, for all-reduces in flight during attention, a rank finds all parts in its own memory.

Each rank has two buffers of every kind and uses them in turn. For message n it waits until all others have signalled
message n - 1, writes into buffer n mod 2, and signals n. Whoever needs the parts waits for the signals n, then reads.
No buffer is overwritten while a rank reads it, because:

* A rank signals a message after it has read all that it will read of the messages before, and after it has signalled
  those: the kernel that signals is behind both in stream order.
* So when all others have signalled n - 1, they have read n - 2, which is what buffer n mod 2 still holds.

A rank that has read message n - 1 has waited for those signals already, and does not wait again (`_has_waited`).

No deadlock: a signal never depends on a kernel that waits for it. A waiting kernel may occupy every
multiprocessor of its device, so a signal must not need one while a kernel waits. Kernels that signal therefore come
before the waiting kernel on the main stream, and have finished; copies, which run beside it, are signalled by a copy
engine. Joining the copies into the main stream in every layer
would be safe too, but costs 5 us each time. The main stream joins them before a kernel signals a later message, and at
the end of a forward pass.

Not every rank has to wait for every message: the workers publish logits that only rank 0 reads, and wait for rank 0
when they write next.

The host picks the buffer, and a CUDA graph keeps the buffer that was picked while it was captured. So every forward
pass sends an even number of messages, the last of them empty if need be (`end_pass`), and starts with buffer 0. Buffers
then alternate over the whole life of the ranks, in whatever order passes are run eagerly or replayed. Messages
are counted on the device, see `kraken/engine/kernels/cuda/signals.py`.

Shape letters as in `kraken/model/architecture.py`, and: P ranks, R rows, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kraken.engine.distributed.all_reduce import AllReduce, Handle
from kraken.engine.distributed.peer_memory import PeerMemory
from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.model.residual_norm import sum_across_ways

if TYPE_CHECKING:
    from kraken.engine.kernels.cuda.peer import PeerKernels  # which needs Triton

Backend = Literal["nccl", "p2p_store", "copy_engine"]
FLAGS_BYTES = 4096
"""Size of the flags, which come before the buffers."""
NUM_BUFFERS = 2
RELEASED = 2**62
"""A message number that no rank reaches: as a flag it ends every wait."""


class PeerChannel:
    """One rank's buffers and signals, which the backends `p2p_store` and `copy_engine` share.

    Args:
        memory: `num_memory_bytes` on every rank.
        buffer_bytes: of the largest message, and at least of one row of `gather_columns`; a multiple of 16.
        dtype: of all messages.
        make_kernels: from the rank, its own flags (int64 [ranks]) and its entry in each other rank's flags.
    """

    def __init__(
        self,
        memory: PeerMemory,
        rank: int,
        buffer_bytes: int,
        dtype: torch.dtype,
        make_kernels: "Callable[[int, Tensor, tuple[Tensor, ...]], PeerKernels]",
    ):
        self.rank, self.buffer_size = rank, buffer_bytes // dtype.itemsize
        self._memory = memory  # or it would be freed
        size, self._device = len(memory.buffers), memory.buffers[rank].device
        others = [peer for peer in range(size) if peer != rank]
        self._flags = [buffer[: size * 8].view(torch.int64) for buffer in memory.buffers]
        peer_flags = tuple(self._flags[peer][rank : rank + 1] for peer in others)
        self.kernels = make_kernels(rank, self._flags[rank], peer_flags)

        def buffer(peer: int, position: int) -> Tensor:
            start = FLAGS_BYTES + position * buffer_bytes
            return memory.buffers[peer][start : start + buffer_bytes].view(dtype)

        indices = range(NUM_BUFFERS)
        self.published = [tuple(buffer(peer, index) for peer in range(size)) for index in indices]
        """[buffer index][rank]: what every rank publishes."""
        self.received = [tuple(buffer(rank, NUM_BUFFERS * (1 + p) + index) for p in others) for index in indices]
        """[buffer index][other rank]: what the others store here."""
        self.sent = [tuple(buffer(p, NUM_BUFFERS * (1 + rank) + index) for p in others) for index in indices]
        """[buffer index][other rank]: where this rank stores its parts."""
        self._buffer_index = 0
        self._has_waited = False
        """Whether the main stream has waited for all ranks' last message."""
        self._is_copying = False
        """Whether there are copies that the main stream has not joined."""
        on_cuda = self._device.type == "cuda"
        # a high priority, so that copies start before the kernels beside them
        self._copy_stream = torch.cuda.Stream(self._device, priority=-1) if on_cuda else None
        self._release_stream = torch.cuda.Stream(self._device) if on_cuda else None
        self._released_P = torch.full((size,), RELEASED, dtype=torch.int64, pin_memory=on_cuda)

    def begin(self) -> tuple[int, bool]:
        """The buffer of the next message, and whether its kernel must wait until the others have read the buffer."""
        index, waits = self._buffer_index, not self._has_waited
        self._buffer_index, self._has_waited = 1 - index, False
        return index, waits

    def publish(self, x_RC: Tensor) -> int:
        """Publish x and signal; returns the buffer."""
        self.join_copies()
        index, waits = self.begin()
        self.kernels.publish(x_RC, self.published[index][self.rank], index, waits)
        return index

    def wait(self, buffer_index: int) -> None:
        """Make the main stream wait until all ranks have signalled the last message."""
        self.kernels.wait(buffer_index)
        self._has_waited = True

    def consumed(self) -> None:
        """Must be called when a kernel on the main stream has waited for the last message itself."""
        self._has_waited = True

    def copy(self, own: Tensor, targets: tuple[Tensor, ...], buffer_index: int) -> None:
        """Have copy engines bring the others what the main stream has computed, and signal it."""
        if self._copy_stream is not None:
            self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            for target in targets:
                target[: own.numel()].copy_(own, non_blocking=True)
            self.kernels.signal(buffer_index)
        self._is_copying = True

    def join_copies(self) -> None:
        """Make the main stream wait for all copies."""
        if self._is_copying and self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copy_stream)
        self._is_copying = False

    def end_pass(self) -> None:
        """Must be called after every forward pass, so that the next one starts with buffer 0."""
        self.join_copies()
        if self._buffer_index:
            self.kernels.skip(self._buffer_index)
            self._buffer_index = 0
        self._has_waited = False  # a CUDA graph does not know what was replayed before it

    def release(self) -> None:
        """Let every kernel go on that waits for a rank, here and on the others; its results are wrong. From any thread.

        Copy engines do it, since kernels that wait may leave no multiprocessor for another kernel.
        """
        with torch.cuda.stream(self._release_stream):
            for flags_P in self._flags:
                flags_P.copy_(self._released_P, non_blocking=True)


@dataclass(slots=True)
class PeerHandle:
    """The other ranks' parts, in flight."""

    channel: PeerChannel
    parts: tuple[Tensor, ...]
    buffer_index: int | None
    """None once the main stream has waited."""

    def wait(self) -> None:
        if self.buffer_index is not None:
            self.channel.wait(self.buffer_index)
            self.buffer_index = None

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        self.channel.consumed()
        return self.channel.kernels.add_reduced_norm(x_WTD, addend_WTD, self.parts, norm, self.buffer_index)


class P2pStore(AllReduce):
    """The backend `p2p_store`: kernels store parts into the memory of peers."""

    def __init__(self, kernels: TorchKernels, channel: PeerChannel, is_blocking: bool = False):
        super().__init__(kernels, is_blocking)
        self._channel = channel

    def start(self, x_WTD: Tensor) -> Handle:
        """For the few rows of a last layer: the others read them here."""
        own_TD = sum_across_ways(x_WTD)[0].to(x_WTD.dtype) if len(x_WTD) > 1 else x_WTD[0]
        index, rank = self._channel.publish(own_TD), self._channel.rank
        parts = self._channel.published[index]
        return self._started(PeerHandle(self._channel, parts[:rank] + parts[rank + 1 :], index))

    def add_norm_start(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Normed | None, Handle]:
        """One kernel adds, normalises, stores the part into the others' memory, and signals."""
        channel = self._channel
        channel.join_copies()
        index, waits = channel.begin()
        targets = channel.sent[index]
        out_WTD, normed = channel.kernels.add_norm(x_WTD, addend_WTD, norm, targets, None, index, waits, True)
        return out_WTD, normed, self._started(PeerHandle(channel, channel.received[index], index))

    def all_reduce(self, x_RC: Tensor) -> Tensor:
        total_RC = torch.empty_like(x_RC, memory_format=torch.contiguous_format)
        self._reduce(None, x_RC, total_RC, None)
        return total_RC

    def all_reduce_add_norm(self, x_1TD: Tensor, part_1TD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        """One kernel reads all parts over the link, adds them to x and normalises."""
        total_1TD = torch.empty_like(part_1TD, memory_format=torch.contiguous_format)
        return total_1TD, self._reduce(x_1TD[0], part_1TD[0], total_1TD[0], norm)

    def _reduce(self, x_RC: Tensor | None, part_RC: Tensor, total_RC: Tensor, norm: Norm | None) -> Normed | None:
        index = self._channel.publish(part_RC)
        normed = self._channel.kernels.reduce_add_norm(x_RC, self._channel.published[index], total_RC, norm, index)
        self._channel.consumed()
        return normed

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """In several messages if the rows do not fit into a buffer."""
        gathered = []
        for rows_RC in x_RC.split(max(1, self._channel.buffer_size // x_RC.shape[1])):
            index = self._channel.publish(rows_RC)
            if self._channel.rank == 0:
                self._channel.wait(index)
                parts = [part[: rows_RC.numel()].view(rows_RC.shape) for part in self._channel.published[index]]
                gathered.append(torch.cat(parts, dim=1))
        if self._channel.rank > 0:
            return x_RC
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)


class CopyEngine(P2pStore):
    """The backend `copy_engine`: parts in flight during attention are brought by copy engines, all else is stored."""

    def add_norm_start(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Normed | None, Handle]:
        """One kernel adds and normalises; copy engines then bring its part to the others."""
        channel = self._channel
        index, waits = channel.begin()
        own = channel.published[index][channel.rank]
        # the output of a single way is its part: the kernel writes it where the copy engine reads it
        targets, out_buffer = ((), own) if len(x_WTD) == 1 else ((own,), None)
        out_WTD, normed = channel.kernels.add_norm(x_WTD, addend_WTD, norm, targets, out_buffer, index, waits, False)
        channel.copy(own[: x_WTD[0].numel()], channel.sent[index], index)
        return out_WTD, normed, self._started(PeerHandle(channel, channel.received[index], index))


def num_buffer_bytes(num_tokens: int, width: int, num_columns: int, dtype: torch.dtype) -> int:
    """Size of a buffer for the part of so many tokens, and for one row of gathered columns."""
    values = max(num_tokens * width, num_columns)
    return -(-values * dtype.itemsize // 4096) * 4096


def num_memory_bytes(size: int, buffer_bytes: int) -> int:
    """Memory that each of `size` ranks shares: flags, and buffers for what is published and for each rank's stores."""
    return FLAGS_BYTES + NUM_BUFFERS * (1 + size) * buffer_bytes
