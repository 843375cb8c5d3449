"""Signals between GPUs of one host: flags in memory that all of them reach, set and polled inside Triton kernels.

A rank numbers its messages 1, 2, 3 and so on. `signal` writes a message's number into this rank's flag on every other
rank, after everything that the rank has written before. `wait_signal` polls the flags that the others write here until
all of them have reached a number; what they wrote before their signals can then be read. A poll is a loop in every
program that needs it.

Messages are counted on the device, so that a kernel in a CUDA graph knows the number of its message. The kernels in
`residual_norm.py` and `peer.py` use this file; `kraken/engine/distributed/peer_all_reduce.py` says why no buffer is
overwritten while a rank reads it.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Signals:
    """The counters and flags of one rank.

    A sending kernel takes the last number from the counter of the other buffer, adds 1, and stores the result in the
    counter of its own buffer. No program writes what another one reads, so all programs of the kernel get the same
    number in whatever order they run.

    Args:
        counters: int64 [3, 2] of this rank: the number of the last message in either buffer, and how many programs of a
            kernel are done; two values wide, so that every row is aligned alike and each kernel is compiled once.
        flags_P: int64 in this rank's memory: the number of each other rank's last message, written by that rank.
        peer_flags: this rank's entry, int64 [1], in every other rank's flags.
    """

    rank: int
    counters: Tensor
    flags_P: Tensor
    peer_flags: tuple[Tensor, ...]

    def pointers(self, buffer_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counter of this message, that of the one before, the count of programs that are done, the flags."""
        return self.counters[buffer_index], self.counters[1 - buffer_index], self.counters[2], self.flags_P

    @property
    def constants(self) -> dict[str, int]:
        """Constants that a kernel is compiled for."""
        return {"rank": self.rank, "num_ranks": len(self.flags_P)}


@dataclass(frozen=True, slots=True)
class Handshake:
    """The signals of one kernel: of the one that sends a message, or of the one that reads the parts.

    Args:
        buffer_index: of the message, 0 or 1.
        waits: wait, before writing, until all ranks have read what the buffer holds.
        sends_signal: signal when all programs have written; otherwise `PeerKernels.signal` must follow.
    """

    signals: Signals
    buffer_index: int
    waits: bool = True
    sends_signal: bool = True


@triton.jit
def wait_signal(flags_ptr, message, rank: tl.constexpr, num_ranks: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until every other rank has signalled this message."""
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            # an atomic that adds nothing: one thread polls, all threads wait for its result, and no load moves above it
            while tl.atomic_add(flags_ptr + peer, 0, sem="acquire", scope="sys") < message:
                pass
    tl.debug_barrier()


@triton.jit
def signal(peer_flag_ptrs, message):  # type: ignore[no-untyped-def]
    """Signal every other rank that this one has sent a message, and has read all messages before it."""
    for index in tl.static_range(len(peer_flag_ptrs)):
        tl.atomic_xchg(peer_flag_ptrs[index], message, sem="release", scope="sys")


@triton.jit
def signal_when_done(counter_ptr, done_ptr, peer_flag_ptrs, message, num_programs):  # type: ignore[no-untyped-def]
    """Signal from the last program of a kernel, after everything that all of its programs have written."""
    tl.debug_barrier()  # all threads of the program must have written before one of them counts it as done
    # the scope of one GPU is enough here: the last program's signal carries what it has acquired to the other GPUs
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
        tl.store(done_ptr, 0)  # all other programs are done with it, and have read the last message's counter
        tl.store(counter_ptr, message)
        signal(peer_flag_ptrs, message)
