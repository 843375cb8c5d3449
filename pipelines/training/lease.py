"""The right to train a run: held by one attempt at a time, however often its job is submitted or its driver dies.

It lies in the cluster's key-value store with a number that its holder counts up. A holder that died stops counting, so
that the next attempt takes over after a few seconds; beside one that lives it is refused.
"""

import json
import os
import threading
import time
import uuid
from dataclasses import dataclass

from pipelines.local_cluster import ClusterError

NAMESPACE = "kraken"
BEAT_S = 0.5
DEAD_AFTER_S = 6.0
"""A holder that has not counted for so long is dead; a busy machine may hold its thread up for a second or two."""


def get(key: str) -> str:
    """A value of the cluster's key-value store; empty where there is none."""
    from ray.experimental import internal_kv

    return (internal_kv._internal_kv_get(key, namespace=NAMESPACE) or b"").decode()


def put(key: str, value: str, *, overwrite: bool = True) -> None:
    """Set a value, or only one that is not there."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, overwrite=overwrite, namespace=NAMESPACE)


def delete(key: str) -> None:
    """Remove a value, if it is there."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=NAMESPACE)


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """A lease as a worker sees it."""

    key: str
    holder: str

    def is_lost(self) -> bool:
        """Whether another attempt holds it by now."""
        value = get(self.key)
        return bool(value) and json.loads(value)["holder"] != self.holder


class Lease:
    """Holds the right to train a run while its block lasts.

    Args:
        run: identifies the run, for example the stage's fingerprint.

    Raises:
        ClusterError: on entering; another process trains this run and lives.
    """

    def __init__(self, run: str):
        self.ref = LeaseRef(f"lease/{run}", uuid.uuid4().hex)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> LeaseRef:
        self._wait_for_the_dead()
        self._write(0)
        self._thread.start()
        return self.ref

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._thread.join()
        if not self.ref.is_lost():
            delete(self.ref.key)

    def _wait_for_the_dead(self) -> None:
        """Return once nobody holds the lease, or its holder has stopped counting."""
        found = get(self.ref.key)
        deadline = time.monotonic() + DEAD_AFTER_S
        while found and time.monotonic() < deadline:
            time.sleep(BEAT_S / 2)
            now = get(self.ref.key)
            if now and now != found:
                other = json.loads(now)
                raise ClusterError(
                    f"this very training runs already, in process {other['pid']} of submission "
                    f"{other['submission'] or '(none)'}; wait for it, or stop it (`ray job stop ID`), then run again"
                )
            found = now

    def _beat(self) -> None:
        count = 0
        while not self._closing.wait(BEAT_S):
            count += 1
            try:
                if not self.ref.is_lost():
                    self._write(count)
            except Exception as error:  # Ray's head is away for a moment
                print(f"pretrain: cannot renew the lease ({error})", flush=True)

    def _write(self, count: int) -> None:
        submission = os.environ.get("KRAKEN_SUBMISSION", "")
        put(
            self.ref.key,
            json.dumps({"holder": self.ref.holder, "pid": os.getpid(), "submission": submission, "count": count}),
        )
