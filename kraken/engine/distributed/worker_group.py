"""The worker processes of an engine as rank 0 sees them: send to all, wait until they are ready, notice failures.

`Rendezvous.wait_for_workers` makes a `WorkerGroup`; `load_distributed` and `DistributedRunner` use it. A thread watches
the connections, so that an engine notices the end of a worker also while it is idle.
"""

import contextlib
import json
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from kraken.engine.distributed.control_channel import Connection, Kind
from kraken.engine.protocol import EngineError

STOP_TIMEOUT_S = 5.0
"""Time for a worker to end by itself before it is killed."""
REASON_TIMEOUT_S = 2.0
"""How long rank 0 waits, after its own step has failed, for a worker's message that says why."""
WATCH_INTERVAL_S = 0.5


class WorkerError(EngineError):
    """A rank of the engine failed, so that no rank can go on."""


class WorkerGroup:
    """The workers, which are the ranks 1 and up.

    Args:
        connections: by rank.
        processes: the workers that this process started, by rank.
    """

    def __init__(self, connections: dict[int, Connection], processes: dict[int, "subprocess.Popen[bytes]"]):
        self._connections = connections
        self._processes = processes
        self._ended = threading.Event()
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self.failure = ""
        """Why the workers cannot go on; empty if they can."""
        self.deadline: float | None = None
        """Monotonic time at which the step in flight counts as stuck; None if all-reduces time out by themselves."""

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one frame to every worker. Raises: OSError: a worker is gone."""
        for connection in self._connections.values():
            connection.send(kind, payload)

    def send_json(self, values: dict[str, Any]) -> None:
        """As `send`."""
        self.send(Kind.JSON, json.dumps(values).encode())

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every worker has answered the last message.

        Raises:
            WorkerError: a worker failed, ended or took too long.
        """
        ends_at = time.monotonic() + timeout_s
        for rank, connection in self._connections.items():
            connection.set_timeout(max(0.1, ends_at - time.monotonic()))
            try:
                answer = connection.receive_json()
            except TimeoutError as error:
                raise WorkerError(f"rank {rank} was not ready within {timeout_s:.0f} s") from error
            except OSError as error:
                raise WorkerError(self._exit_reason(rank)) from error
            if "error" in answer:
                raise WorkerError(f"rank {rank} failed: {answer['error']}")
            connection.set_timeout(None)

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Watch the workers on a thread until they are stopped.

        Args:
            on_failure: called once, on the watching thread, when a worker has failed or ended.
        """
        self._watcher = threading.Thread(target=self._watch, args=(on_failure,), name="kraken-workers", daemon=True)
        self._watcher.start()

    def failure_after(self, error: Exception) -> str:
        """Kill the workers after a step failed with this error; returns a worker's own reason if one arrives."""
        self._failed.wait(REASON_TIMEOUT_S)
        self._fail(f"the devices lost step with each other ({type(error).__name__}: {error})")
        return self.failure

    def stop(self) -> None:
        """Ask every worker to end, and kill those that do not."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self.send(Kind.STOP)
        ends_at = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends_at - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill the workers that this process started, and close all connections. Safe to call twice."""
        self._ended.set()
        for process in self._processes.values():
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(STOP_TIMEOUT_S)
        for connection in self._connections.values():
            connection.close()

    def _fail(self, reason: str) -> None:
        """Keep the first reason, and kill the workers."""
        with self._lock:
            if self.failure or self._ended.is_set():
                return
            self.failure = reason
        self._failed.set()
        for process in self._processes.values():
            process.kill()

    def _watch(self, on_failure: Callable[[], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while not self._ended.is_set() and not self.failure:
                for key, _ in selector.select(WATCH_INTERVAL_S):
                    if not self._ended.is_set():
                        self._fail(self._failure_of(int(key.data)))
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self._fail(
                        "a step took longer than engine.collective_timeout_s, or the capture of CUDA graphs longer than"
                        " engine.startup_timeout_s: a device or the link between them is stuck"
                    )
        if self.failure:
            on_failure()

    def _failure_of(self, rank: int) -> str:
        """The message of a worker that failed, or how its process ended."""
        try:
            return f"rank {rank} failed: {self._connections[rank].receive_json()['error']}"
        except (OSError, ValueError, KeyError):
            return self._exit_reason(rank)

    def _exit_reason(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank} ended, or cannot be reached"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REASON_TIMEOUT_S / 2)
        return f"rank {rank} {exit_reason(process)}"


def exit_reason(process: "subprocess.Popen[bytes]") -> str:
    """How a process ended, as the predicate of a sentence."""
    status = process.poll()
    if status is None:
        return "closed its connection"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
