"""Sums over peer memory: a rank writes its part where the others can read it, and whoever needs the sum reads them all.

Every sum, and every gathering of columns, is a *round*. In one kind of it a rank *publishes*: it writes its part into
a slot of its own memory, which the others read over the link. In the other, for sums that are in flight while something
else is computed, it *sends*: it writes its part into a slot that every other rank keeps for it, or has a copy engine
bring it there, so that whoever needs the sum finds all of it at home. In round n a rank waits until all others have
told n - 1, writes into slot n mod 2, and tells n as soon as that is there. Whoever needs the parts waits until all have
told round n, and reads. That no slot is written while it is read follows from two facts:

* A rank tells a round after it has read all that it will read of the rounds before, and after it has told those: what
  tells is behind both in the order of streams.
* So when all others have told n - 1, they have read n - 2, which is what slot n mod 2 still holds, here and there.

A rank that has needed the parts of round n - 1 has waited already, and does not ask again (`_is_settled`).

Nobody waits for ever, because whatever tells a round comes about without whoever waits for it. A kernel that waits may
keep every multiprocessor from everything else on its device, so nothing that tells may need one: a kernel that tells is
before it in the order of the main stream, and what copy engines bring the others is told by a copy engine too. For the
main stream to join the copies in every layer would do as well, but costs 5 us each time. It joins them before a kernel
tells a later round, and when a pass ends.

It does not matter who waits for a round and who does not: the followers publish columns that only the leader reads, and
wait for the leader when they write next.

The host picks the slot, and a CUDA graph keeps what was picked when it was recorded. So every forward pass takes an
even number of rounds, the last of them without a part where need be (`end_pass`), and begins with slot 0. Then slots
alternate over the whole life of the ranks, in whatever order passes are computed kernel by kernel, replayed as graphs,
or left without sums. Rounds themselves are counted on the device, see `kraken/engine/distributed/signals.py`.

Shape letters as in `kraken/model.py`, and: R rows, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kraken.engine.distributed.all_reduce import Backend
from kraken.engine.distributed.peer_memory import PeerMemory
from kraken.engine.model.norm import Norm, Normed

FLAGS_BYTES = 4096
"""Before the slots."""
NUM_BUFFERS = 2
RELEASED = 2**62
"""A round that nobody reaches."""


class PeerKernels(Protocol):
    """One rank's rounds; see `kraken.engine.distributed.signals.Signals`."""

    def publish(self, x_RC: Tensor, buffer: Tensor, buffer_index: int, waits: bool) -> None: ...

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, targets: tuple[Tensor, ...],
        out_buffer: Tensor | None, buffer_index: int, waits: bool, sends_signal: bool,
    ) -> tuple[Tensor, Normed | None]: ...  # fmt: skip

    def signal(self, buffer_index: int) -> None: ...

    def skip(self, buffer_index: int) -> None: ...

    def wait(self, buffer_index: int) -> None: ...

    def add_parts(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None, buffer_index: int
    ) -> Normed | None: ...

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, buffer_index: int | None
    ) -> tuple[Tensor, Normed]: ...


@dataclass(slots=True)
class PeerHandle:
    """The sum of the other ranks' parts, in flight."""

    peers: "PeerAllReduce"
    parts: tuple[Tensor, ...]
    buffer_index: int | None
    """Of the round; None where it has been waited for."""

    def wait(self) -> None:
        """Wait until all parts are there."""
        if self.buffer_index is not None:
            self.peers.wait(self.buffer_index)
            self.buffer_index = None

    def add_reduced_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        """See `PendingSum.see`."""
        return self.peers.add_reduced_norm(x_WTD, addend_WTD, self.parts, norm, self.buffer_index)


class PeerAllReduce:
    """What one rank does in every round.

    Args:
        memory: of `num_memory_bytes`.
        slot_bytes: of the largest message but that of `gather_columns`, of which a row must fit; a multiple of 16.
        dtype: of all messages.
        make_signals: from the rank, its own flags, int64 [ranks], and its entry of each other rank's flags.
    """

    def __init__(
        self,
        memory: PeerMemory,
        rank: int,
        buffer_bytes: int,
        dtype: torch.dtype,
        make_kernels: Callable[[int, Tensor, tuple[Tensor, ...]], PeerKernels],
    ):
        self._rank, self._num_values = rank, buffer_bytes // dtype.itemsize
        self._memory = memory  # to keep it
        size, self._device = len(memory.buffers), memory.buffers[rank].device
        others = [peer for peer in range(size) if peer != rank]
        self._flags = [buffer[: size * 8].view(torch.int64) for buffer in memory.buffers]
        self._kernels = make_kernels(
            rank, self._flags[rank], tuple(self._flags[peer][rank : rank + 1] for peer in others)
        )

        def buffer(peer: int, index: int) -> Tensor:
            start = FLAGS_BYTES + index * buffer_bytes
            return memory.buffers[peer][start : start + buffer_bytes].view(dtype)

        buffer_indices = range(NUM_BUFFERS)
        self._published = [tuple(buffer(peer, buffer_index) for peer in range(size)) for buffer_index in buffer_indices]
        """Of each turn, what every rank publishes."""
        self._received = [
            tuple(buffer(rank, NUM_BUFFERS * (1 + peer) + buffer_index) for peer in others)
            for buffer_index in buffer_indices
        ]
        """Of each turn, what every other rank sends here."""
        self._sent = [
            tuple(buffer(peer, NUM_BUFFERS * (1 + rank) + buffer_index) for peer in others)
            for buffer_index in buffer_indices
        ]
        """Of each turn, where this rank sends to."""
        self._buffer_index = 0
        self._has_waited = False
        """Whether the main stream has waited for all ranks' last round."""
        self._is_copying = False
        """Whether copies were begun that the main stream has not joined."""
        on_cuda = self._device.type == "cuda"
        # before the kernels beside it
        self._copy_stream = torch.cuda.Stream(self._device, priority=-1) if on_cuda else None
        self._release_stream = torch.cuda.Stream(self._device) if on_cuda else None
        self._released_P = torch.full((size,), RELEASED, dtype=torch.int64, pin_memory=on_cuda)

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, backend: Backend, is_blocking: bool
    ) -> tuple[Tensor, Normed | None, PeerHandle]:
        """x + addend, its norm, and its sum over the ranks, begun; of each the sum over the ways that it holds.

        Args:
            method: `direct` has the kernel that computes it write it into the others' memory; `copied` has a copy
                engine bring it there.
        """
        if backend == "direct":
            self._join_copies()
        buffer_index, waits = self._begin()
        sent, own = self._sent[buffer_index], self._published[buffer_index][self._rank]
        targets, out_buffer = sent, None
        if backend == "copied":  # one way is itself where it is copied from
            targets, out_buffer = ((), own) if len(x_WTD) == 1 else ((own,), None)
        sends_signal = backend == "direct"
        out_WTD, normed = self._kernels.add_norm(
            x_WTD, addend_WTD, norm, targets, out_buffer, buffer_index, waits, sends_signal
        )
        if backend == "copied":
            self._copy(own[: x_WTD[0].numel()], sent, buffer_index)
        pending = PeerHandle(self, self._received[buffer_index], buffer_index)
        if is_blocking:
            pending.wait()
        return out_WTD, normed, pending

    def _copy(self, own: Tensor, targets: tuple[Tensor, ...], buffer_index: int) -> None:
        """Begin to bring the others what the main stream has computed, and to tell them."""
        if self._copy_stream is not None:
            self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            for target in targets:
                target[: own.numel()].copy_(own, non_blocking=True)
            self._kernels.signal(buffer_index)
        self._is_copying = True

    def _join_copies(self) -> None:
        """What the main stream does from now on comes behind all copies."""
        if self._is_copying and self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copy_stream)
        self._is_copying = False

    def start(self, own_RD: Tensor, is_blocking: bool) -> PeerHandle:
        """The sum over the ranks of few rows, begun: the others read them here."""
        buffer_index = self._publish(own_RD)
        parts = self._published[buffer_index]
        pending = PeerHandle(self, parts[: self._rank] + parts[self._rank + 1 :], buffer_index)
        if is_blocking:
            pending.wait()
        return pending

    def wait(self, buffer_index: int) -> None:
        """Hold the main stream until all ranks have told the last round."""
        self._kernels.wait(buffer_index)
        self._has_waited = True

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, buffer_index: int | None
    ) -> tuple[Tensor, Normed]:
        """See `PendingSum.see`; of the last round, whose parts are waited for here or have been."""
        self._has_waited = True
        return self._kernels.add_reduced_norm(x_WTD, addend_WTD, parts, norm, buffer_index)

    def add(self, x_1TD: Tensor, part_1TD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        """x plus the sum of the parts, bit-equal on all ranks where x is, and the norm of it where one is asked for."""
        buffer_index = self._publish(part_1TD[0])
        total_1TD = torch.empty_like(part_1TD, memory_format=torch.contiguous_format)
        normed = self._kernels.add_parts(x_1TD[0], self._published[buffer_index], total_1TD[0], norm, buffer_index)
        self._has_waited = True
        return total_1TD, normed

    def all_reduce(self, own_RC: Tensor) -> Tensor:
        """The sum over the ranks, bit-equal on all of them."""
        buffer_index = self._publish(own_RC)
        total_RC = torch.empty_like(own_RC, memory_format=torch.contiguous_format)
        self._kernels.add_parts(None, self._published[buffer_index], total_RC, None, buffer_index)
        self._has_waited = True
        return total_RC

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """See `DeviceGroup.gather_columns`; in several rounds where a slot is too small."""
        pieces = []
        for piece_RC in x_RC.split(max(1, self._num_values // x_RC.shape[1])):
            buffer_index = self._publish(piece_RC)
            if self._rank == 0:
                self.wait(buffer_index)
                columns = [part[: piece_RC.numel()].view(piece_RC.shape) for part in self._published[buffer_index]]
                pieces.append(torch.cat(columns, dim=1))
        if self._rank > 0:
            return x_RC
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def end_pass(self) -> None:
        """After every forward pass: the next one begins with slot 0."""
        self._join_copies()
        if self._buffer_index:
            self._kernels.skip(self._buffer_index)
            self._buffer_index = 0
        self._has_waited = False  # a graph does not know what was replayed before it

    def release(self) -> None:
        """Let every kernel go on that waits for a rank, here and on the others, whatever it then computes.

        By copy engines: kernels that wait may leave no room for another. From any thread.
        """
        with torch.cuda.stream(self._release_stream):
            for flags_P in self._flags:
                flags_P.copy_(self._released_P, non_blocking=True)

    def _publish(self, x_RC: Tensor) -> int:
        """A round that a kernel tells; gives its turn."""
        self._join_copies()
        buffer_index, waits = self._begin()
        self._kernels.publish(x_RC, self._published[buffer_index][self._rank], buffer_index, waits)
        return buffer_index

    def _begin(self) -> tuple[int, bool]:
        """The turn of the round that is to come, and whether the others may still be reading what it writes over."""
        buffer_index, waits = self._buffer_index, not self._has_waited
        self._buffer_index, self._has_waited = 1 - buffer_index, False
        return buffer_index, waits


def num_buffer_bytes(num_tokens: int, width: int, num_columns: int, dtype: torch.dtype) -> int:
    """Room for the part of so many tokens, and for one row of columns."""
    values = max(num_tokens * width, num_columns)
    return -(-values * dtype.itemsize // 4096) * 4096


def num_memory_bytes(size: int, buffer_bytes: int) -> int:
    """What a rank shares with `size` ranks: what it publishes, and what each of them sends."""
    return FLAGS_BYTES + NUM_BUFFERS * (1 + size) * buffer_bytes
