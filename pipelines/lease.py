"""Leases: one process at a time runs a pipeline or a training, however often its job is submitted or its driver dies.

A pipeline holds a lease for its MLflow run, and its training holds another, which different pipelines can need. A lease
lies in the cluster's key-value store with a number that its holder counts up. A holder that died stops counting, so
that the next attempt takes over after a few seconds; beside one that lives it is refused.
"""

import json
import os
import shlex
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pipelines import ray_internals
from pipelines.errors import ClusterError

NAMESPACE = "kraken"
BEAT_S = 0.5
DEAD_AFTER_S = 6.0
"""A holder that has not counted for so long is dead; a busy machine may hold its thread up for a second or two."""


def get(key: str) -> str:
    """A value of the cluster's key-value store; empty where there is none."""
    return (ray_internals.kv_get(key, NAMESPACE) or b"").decode()


def put(key: str, value: str, *, overwrite: bool = True) -> None:
    """Set a value, or only one that is not there."""
    ray_internals.kv_put(key, value, overwrite=overwrite, namespace=NAMESPACE)


def delete(key: str) -> None:
    """Remove a value, if it is there."""
    ray_internals.kv_delete(key, NAMESPACE)


def submission() -> str | None:
    """Id of the submitted job that this process belongs to, as `ray job` takes it; None where there is none."""
    if name := os.environ.get("KRAKEN_SUBMISSION"):
        return name
    import ray

    return ray_internals.job_submission_id() if ray.is_initialized() else None


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """A lease as a worker sees it."""

    key: str
    holder: str

    def is_lost(self) -> bool:
        """Whether another attempt holds the lease."""
        value = get(self.key)
        return bool(value) and json.loads(value)["holder"] != self.holder


class Lease:
    """Holds the right to run something while its block lasts.

    Args:
        run: identifies what is run, in which storage.
        what: the same for people.

    Raises:
        ClusterError: on entering; another process runs it and lives. The message says how to follow and to stop it.
    """

    def __init__(self, run: str, what: str = "training"):
        self.ref = LeaseRef(f"lease/{run}", uuid.uuid4().hex)
        self._what = what
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> LeaseRef:
        found = get(self.ref.key)
        if found:
            self._wait_for_death(found)
            delete(self.ref.key)
        self._write(0, overwrite=False)  # of two that come this far at once, one gets it
        if self.ref.is_lost():
            raise ClusterError(runs_already(self._what, json.loads(get(self.ref.key))))
        self._thread.start()
        return self.ref

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._thread.join()
        try:
            if not self.ref.is_lost():
                delete(self.ref.key)
        except Exception as error:  # Ray's head is away; the lease ends by itself
            print(f"{self._what}: cannot return the lease ({error})", flush=True)

    def _wait_for_death(self, found: str) -> None:
        """Return when the holder has stopped counting or has returned the lease."""
        deadline = time.monotonic() + DEAD_AFTER_S
        while found and time.monotonic() < deadline:
            time.sleep(BEAT_S / 2)
            now = get(self.ref.key)
            if now and now != found:
                raise ClusterError(runs_already(self._what, json.loads(now)))
            found = now

    def _beat(self) -> None:
        count = 0
        while not self._closing.wait(BEAT_S):
            count += 1
            try:
                if not self.ref.is_lost():
                    self._write(count)
            except Exception as error:  # Ray's head is away for a moment
                print(f"{self._what}: cannot renew the lease ({error})", flush=True)

    def _write(self, count: int, *, overwrite: bool = True) -> None:
        value = {
            "holder": self.ref.holder,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "submission": submission() or "",
            "count": count,
        }
        put(self.ref.key, json.dumps(value), overwrite=overwrite)


def runs_already(what: str, holder: dict[str, Any]) -> str:
    """The refusal of a second process: it names the first one and says how to follow and to stop it."""
    job, host = holder["submission"], holder.get("host")
    process = f"process {holder['pid']}" + (f" on {host}" if host else "")
    if not job:
        return (
            f"this very {what} runs already, in {process}, which no submitted job owns; wait for it, or end it there "
            f"with Ctrl-C (`kill -INT {holder['pid']}`), then run again"
        )
    job = shlex.quote(job)
    return (
        f"this very {what} runs already, in {process.split(' on ')[0]} of submission {job}; follow it with "
        f"`ray job logs {job} --follow`, or stop it with `ray job stop {job}` and run again"
    )
