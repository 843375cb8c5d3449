"""Sums over peer memory: a rank writes its part where the others can read it, and whoever needs the sum reads them all.

Every sum, and every gathering of columns, is a *round*. In round n a rank waits until all others have published round
n - 1, writes its part into slot n mod 2 of its own memory, and publishes round n. Whoever needs the parts waits until
all have published round n, and reads. That no slot is written while it is read follows from two facts:

* A rank publishes a round after it has read all that it will read of the rounds before, since both are in the order of
  one stream (a copy on another stream is joined before the next round begins).
* So when all others have published n - 1, they have read n - 2, which is what slot n mod 2 still holds.

A rank that has needed the parts of round n - 1 has waited already, and does not ask again (`_is_settled`).

It does not matter who waits for a round and who does not: the followers publish columns that only the leader reads, and
wait for the leader when they write next.

The host picks the slot, and a CUDA graph keeps what was picked when it was recorded. So every forward pass takes an
even number of rounds, the last of them without a part where need be (`end_pass`), and begins with slot 0. Then slots
alternate over the whole life of the ranks, in whatever order passes are computed kernel by kernel, replayed as graphs,
or left without sums. Rounds themselves are counted on the device, see `kraken/engine/devices/sum_kernel.py`.

Shape letters as in `kraken/model.py`, and: R rows, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kraken.engine.devices.collectives import Method
from kraken.engine.devices.peer_memory import PeerMemory
from kraken.engine.norm import Norm

FLAGS_BYTES = 4096
"""Before the slots."""
NUM_SLOTS = 2
FOREVER = 2**62
"""A round that nobody reaches."""


class Signals(Protocol):
    """One rank's rounds; see `kraken.engine.devices.sum_kernel.Signals`."""

    def publish(self, x_RC: Tensor, slot: Tensor, awaits: bool) -> None: ...

    def advance(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, slot: Tensor, awaits: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def skip(self) -> None: ...

    def wait(self) -> None: ...

    def add_parts(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None
    ) -> Tensor | None: ...

    def see(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, is_waiting: bool
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(slots=True)
class PeerSum:
    """The sum of the other ranks' parts, in flight."""

    peers: "PeerSums"
    parts: tuple[Tensor, ...]
    is_waiting: bool
    """Whether the parts are in the others' memory, and may not have been published yet."""
    copies: torch.cuda.Stream | None = None
    """The stream that fetches the parts."""

    def see(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """See `PendingSum.see`."""
        if self.copies is not None:
            torch.cuda.current_stream(x_WTD.device).wait_stream(self.copies)
        return self.peers.see(x_WTD, addend_WTD, self.parts, norm, self.is_waiting)


class PeerSums:
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
        slot_bytes: int,
        dtype: torch.dtype,
        make_signals: Callable[[int, Tensor, tuple[Tensor, ...]], Signals],
    ):
        self._rank, self._num_values = rank, slot_bytes // dtype.itemsize
        self._memory = memory  # to keep it
        size, device = len(memory.buffers), memory.buffers[rank].device
        self._flags = [buffer[: size * 8].view(torch.int64) for buffer in memory.buffers]
        others = [flags_P for peer, flags_P in enumerate(self._flags) if peer != rank]
        self._signals = make_signals(rank, self._flags[rank], tuple(flags_P[rank : rank + 1] for flags_P in others))
        starts = [FLAGS_BYTES + index * slot_bytes for index in range(NUM_SLOTS)]
        self._slots = [
            tuple(buffer[start : start + slot_bytes].view(dtype) for buffer in memory.buffers) for start in starts
        ]
        """Of each slot, every rank's."""
        self._turn = 0
        self._is_settled = False
        """Whether the stream that publishes has waited for all ranks' last round."""
        self._copied = tuple(torch.empty(self._num_values, dtype=dtype, device=device) for _ in others)
        self._copies = torch.cuda.Stream(device)
        self._releases = torch.cuda.Stream(device)
        self._forever_P = torch.full((size,), FOREVER, dtype=torch.int64).pin_memory()

    def advance(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, method: Method, is_waited_for: bool
    ) -> tuple[Tensor, Tensor | None, PeerSum]:
        """x + addend, its norm, and its sum over the ranks, begun; of each the sum over the ways that it holds.

        Args:
            method: `direct` reads the others' parts in their memory when they are needed; `copied` has a copy engine
                fetch them as soon as they are there, on a stream of its own.
        """
        parts, awaits = self._begin()
        out_WTD, normed_WTD = self._signals.advance(x_WTD, addend_WTD, norm, parts[self._rank], awaits)
        return out_WTD, normed_WTD, self._pending(out_WTD, parts, method, is_waited_for)

    def _pending(self, x_WTD: Tensor, parts: tuple[Tensor, ...], method: Method, is_waited_for: bool) -> PeerSum:
        others = parts[: self._rank] + parts[self._rank + 1 :]
        if is_waited_for:
            total_TD = torch.empty_like(x_WTD[0], memory_format=torch.contiguous_format)
            self._signals.add_parts(None, others, total_TD, None)
            return PeerSum(self, (total_TD,), is_waiting=False)
        if method == "direct":
            return PeerSum(self, others, is_waiting=True)
        # the last sum has read what is overwritten here, and the state is that of this round
        self._copies.wait_stream(torch.cuda.current_stream(x_WTD.device))
        with torch.cuda.stream(self._copies):
            self._signals.wait()
            for target, part in zip(self._copied, others, strict=True):
                target[: x_WTD[0].numel()].copy_(part[: x_WTD[0].numel()], non_blocking=True)
        return PeerSum(self, self._copied, is_waiting=False, copies=self._copies)

    def see(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, is_waiting: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PendingSum.see`; of the last round, whose parts are waited for here or have been."""
        self._is_settled = True
        return self._signals.see(x_WTD, addend_WTD, parts, norm, is_waiting)

    def add(self, x_1TD: Tensor, part_1TD: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """x plus the sum of the parts, bit-equal on all ranks where x is, and the norm of it where one is asked for."""
        parts = self._publish(part_1TD[0])
        total_1TD = torch.empty_like(part_1TD, memory_format=torch.contiguous_format)
        normed_TD = self._signals.add_parts(x_1TD[0], parts, total_1TD[0], norm)
        self._is_settled = True
        return total_1TD, None if normed_TD is None else normed_TD[None]

    def sum(self, own_RC: Tensor) -> Tensor:
        """The sum over the ranks, bit-equal on all of them."""
        total_RC = torch.empty_like(own_RC, memory_format=torch.contiguous_format)
        self._signals.add_parts(None, self._publish(own_RC), total_RC, None)
        self._is_settled = True
        return total_RC

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """See `DeviceGroup.gather_columns`; in several rounds where a slot is too small."""
        pieces = []
        for piece_RC in x_RC.split(max(1, self._num_values // x_RC.shape[1])):
            parts = self._publish(piece_RC)
            if self._rank == 0:
                self._signals.wait()
                self._is_settled = True
                columns = [part[: piece_RC.numel()].view(piece_RC.shape) for part in parts]
                pieces.append(torch.cat(columns, dim=1))
        if self._rank > 0:
            return x_RC
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def end_pass(self) -> None:
        """After every forward pass: the next one begins with slot 0."""
        if self._turn:
            self._signals.skip()
            self._turn = 0
        self._is_settled = False  # a graph does not know what was replayed before it

    def release(self) -> None:
        """Let every kernel go on that waits for a rank, here and on the others, whatever it then computes.

        By copy engines: kernels that wait may leave no room for another. From any thread.
        """
        with torch.cuda.device(self._releases.device), torch.cuda.stream(self._releases):
            for flags_P in self._flags:
                flags_P.copy_(self._forever_P, non_blocking=True)

    def _publish(self, x_RC: Tensor) -> tuple[Tensor, ...]:
        """A round; gives where every rank's part of it is, or will be."""
        parts, awaits = self._begin()
        self._signals.publish(x_RC, parts[self._rank], awaits)
        return parts

    def _begin(self) -> tuple[tuple[Tensor, ...], bool]:
        """Every rank's slot of the round that is to come, and whether the others may still be reading it."""
        parts, awaits = self._slots[self._turn], not self._is_settled
        self._turn, self._is_settled = 1 - self._turn, False
        return parts, awaits


def num_slot_bytes(num_tokens: int, width: int, num_columns: int, dtype: torch.dtype) -> int:
    """Room for the part of so many tokens, and for one row of columns."""
    values = max(num_tokens * width, num_columns)
    return -(-values * dtype.itemsize // 4096) * 4096


def num_memory_bytes(slot_bytes: int) -> int:
    """What a rank shares."""
    return FLAGS_BYTES + NUM_SLOTS * slot_bytes
