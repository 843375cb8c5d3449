"""Names the ranks that did not come to a collective that failed.

A rank whose collective fails, because of a time-out or a broken connection, leaves a note in the store through which
the ranks found each other. Ranks that wait fail at about the same time, so the ranks without a note after a moment are
the stragglers: stuck somewhere else, or gone. `train` asks for the explanation.
"""

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from kraken.manifest import ArtefactError
from kraken.training.parallel import Mesh

STEP_KEY = "kraken/step/"
WAITING_KEY = "kraken/waiting/"

NOTE_EVERY_S = 1.0
"""Seconds between two notes of a rank's progress; a note is one message to the store."""

MOST_GRACE_S = 15.0
"""Seconds that a rank gives the others to notice as well that nobody comes."""


class LostRanks(ArtefactError):
    """A collective failed since some ranks did not take part in it.

    Args:
        ranks: those that left no note; empty where all waited, and a connection or a device failed.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]):
        super().__init__(message, ranks)  # so that it can travel between processes
        self.ranks = ranks

    def __str__(self) -> str:
        return str(self.args[0])


class StragglerDetector:
    """Writes the notes of this rank, and reads those of all ranks when a collective has failed.

    Args:
        timeout_s: of the collectives.
    """

    def __init__(self, mesh: Mesh, timeout_s: float):
        self._rank, self._size, self._timeout_s = mesh.rank, mesh.size, timeout_s
        self._store = _get_default_store() if mesh.size > 1 else None
        self._noted_at = float("-inf")
        self._step = 0

    def note(self, step: int) -> None:
        """This rank has finished so many optimizer steps."""
        self._step = step
        now = time.monotonic()
        if self._store is not None and now - self._noted_at > NOTE_EVERY_S:
            self._store.set(f"{STEP_KEY}{self._rank}", str(step))
            self._noted_at = now

    def explain(self, error: RuntimeError) -> LostRanks | None:
        """Who did not come to the collective that raised this; None: it was no collective's error."""
        text = str(error)
        if self._store is None or isinstance(error, ArtefactError) or not is_collective_error(error):
            return None
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            self._store.set_timeout(timedelta(seconds=min(MOST_GRACE_S, self._timeout_s)))
            self._store.set(f"{WAITING_KEY}{self._rank}", str(self._step))
            deadline = time.monotonic() + min(MOST_GRACE_S, self._timeout_s / 2)
            while (lost := [r for r in others if not self._store.check([f"{WAITING_KEY}{r}"])]) and (
                time.monotonic() < deadline
            ):
                time.sleep(0.05)
            names = ", ".join(self._describe(rank) for rank in lost)
            if self._rank == 0:
                time.sleep(1.0)  # the store may live in this process, and others are still reading
        except RuntimeError:  # the store's own
            lost, names = [0], "rank 0, which does not even answer"
        waited = f"rank {self._rank} has finished step {self._step} and waited in vain"
        hint = (
            "the run continues from its last checkpoint; a worker that is only slow needs a longer "
            f"cluster.collective_timeout_s={self._timeout_s:g}"
        )
        if not lost:
            return LostRanks(f"{waited}, as did all others: the network or a device failed ({text}); {hint}", ())
        return LostRanks(f"{waited} for {names}; stuck or gone; {hint} ({text})", tuple(lost))

    def _describe(self, rank: int) -> str:
        assert self._store is not None
        if not self._store.check([f"{STEP_KEY}{rank}"]):
            return f"rank {rank} (no step finished)"
        return f"rank {rank} (last heard of after step {self._store.get(f'{STEP_KEY}{rank}').decode()})"


def is_collective_error(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it."""
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))
