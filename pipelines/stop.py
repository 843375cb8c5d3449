"""Stopping training that runs on any node: a switch in the cluster's key-value store, and a thread that polls it.

Any process of the cluster can flip the switch. The workers' threads see that within `POLL_S`, the ranks agree on a
step, write a checkpoint and return. The training loop itself reads only a variable, so that it can do so every step.
"""

import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.lease import LeaseRef, get, put
from pipelines.ray_internals import draining_nodes

POLL_S = 0.5
AWAY_S = 10.0
"""Pause after the store could not be reached."""


@dataclass(frozen=True, slots=True)
class StopSwitch:
    """Small and picklable; every process of the cluster sees the same state."""

    key: str

    @classmethod
    def make(cls) -> "StopSwitch":
        """A switch of its own, not flipped."""
        return cls(f"stop/{uuid.uuid4().hex}")

    def flip(self, reason: str) -> None:
        """Ask training to end. The first reason stays."""
        put(self.key, reason, overwrite=False)

    def reason(self) -> str:
        """The reason that `flip` was given; empty if the switch is not flipped."""
        return get(self.key)


class StopWatch:
    """Polls the switches from a thread of a worker.

    Args:
        switches: any of them asks for the end. One worker of a group is enough to look at them.
        pause: a switch that this worker flips when its node is being drained, because it will be taken away.
        lease: of the attempt that this worker belongs to. A worker whose attempt another has replaced ends its process
            at once, since its checkpoints would mix with the other's.
    """

    def __init__(self, switches: Sequence[StopSwitch], pause: StopSwitch, lease: LeaseRef, node_id: str):
        self.requested = False
        self._switches, self._pause, self._lease, self._node_id = switches, pause, lease, node_id
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop watch", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still polls."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self._look()
            except Exception as error:  # Ray's head is away for a moment; training does not need it
                print(f"pretrain: cannot see whether to stop ({error})", flush=True)
                self._closing.wait(AWAY_S)

    def _look(self) -> None:
        if self._lease.is_lost():
            print("pretrain: another attempt trains this run now; this worker ends", flush=True)
            os._exit(1)
        if self._node_id in draining_nodes():
            self._pause.flip(f"node {self._node_id[:8]} is being drained")
            self.requested = True
        if any(switch.reason() for switch in self._switches):
            self.requested = True
