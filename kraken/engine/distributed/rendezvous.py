"""How the processes of one engine find each other, and how the leader notices that one of them has ended.

The leader, which is rank 0, opens a `Meeting` and invites the other ranks; they are started by it on this host, or
exist already, as Ray actors do, and call `kraken.engine.distributed.worker_group.follow` with their invitation. An
invitation
holds a key, without which nobody is let in. Ports are free ones, on the loopback interface unless another host is
named.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken.engine.distributed.control_channel import Connection, ConnectionLost, Kind
from kraken.engine.protocol import EngineError

STOP_TIMEOUT_S = 5.0
"""A follower that was told to end is killed after this."""
EXPLANATION_TIMEOUT_S = 2.0
"""A sum breaks off at once where a rank ends; its last words may take this much longer."""
HELLO_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 0.5


class WorkerError(EngineError):
    """A process of the engine failed, so that none of them can go on."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """All that a rank needs to know to take part."""

    host: str
    port: int
    key: str
    rank: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JoinToken":
        return cls(**json.loads(text))


class Rendezvous:
    """Where the ranks of one engine meet.

    Args:
        num_devices: ranks, the leader counted.
        host: address of this host as the other ranks reach it.
    """

    def __init__(self, num_devices: int, host: str = "127.0.0.1"):
        self.num_devices, self.host = num_devices, host
        self._server = socket.create_server((host, 0), backlog=num_devices)
        self._key = secrets.token_hex(16)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def join_token(self, rank: int) -> JoinToken:
        """For one of the ranks 1 to `num_devices` - 1."""
        return JoinToken(self.host, self._server.getsockname()[1], self._key, rank)

    def launch(self, num_threads: int, prefixes: Mapping[int, list[str]] | None = None) -> None:
        """Start every other rank on this host.

        Args:
            num_threads: CPU threads of each.
            prefixes: rank -> a command that runs another command, to place that rank somewhere.
        """
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(num_threads)}
        for rank in range(1, self.num_devices):
            command = [*(prefixes or {}).get(rank, []), sys.executable, "-m", "kraken.engine.distributed.worker_group"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, bufsize=0
            )
            self._processes[rank] = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended at once, which `gather` reports
                process.stdin.write(self.join_token(rank).to_json().encode() + b"\n")  # stays open: see `ranks.main`

    def wait_for_workers(self, timeout_s: float) -> "WorkerGroup":
        """Wait until every other rank is here.

        Raises:
            RanksError: one of them did not come.
        """
        connections: dict[int, Connection] = {}
        ends_at = time.monotonic() + timeout_s
        try:
            while len(connections) < self.num_devices - 1:
                self._require_alive(connections, ends_at, timeout_s)
                self._server.settimeout(WATCH_INTERVAL_S)
                with contextlib.suppress(TimeoutError):
                    self._accept(connections)
        except BaseException:
            WorkerGroup(connections, self._processes).end()
            raise
        finally:
            self._server.close()
        return WorkerGroup(connections, self._processes)

    def _require_alive(self, connections: Mapping[int, Connection], ends_at: float, timeout_s: float) -> None:
        missing = [rank for rank in range(1, self.num_devices) if rank not in connections]
        for rank in missing:
            process = self._processes.get(rank)
            if process is not None and process.poll() is not None:
                raise WorkerError(f"rank {rank} {_exit_reason(process)} before it had begun")
        if time.monotonic() > ends_at:
            raise WorkerError(
                f"ranks {missing} did not come to {self.host} within engine.startup_timeout_s={timeout_s:.0f}; look"
                " whether they run and reach that address"
            )

    def _accept(self, connections: dict[int, Connection]) -> None:
        end, _ = self._server.accept()
        connection = Connection(end)
        connection.set_timeout(HELLO_TIMEOUT_S)
        try:
            greeting = connection.receive_json()
            is_known = secrets.compare_digest(str(greeting.get("key")), self._key)
            rank = int(greeting.get("rank", 0))
        except (OSError, ValueError):
            is_known, rank = False, 0
        if not is_known or rank in connections or not 0 < rank < self.num_devices:
            connection.close()  # a stranger, or somebody twice
            return
        connections[rank] = connection


class WorkerGroup:
    """The other ranks, as the leader sees them.

    Args:
        connections: by rank.
        processes: those that were started here, by rank.
    """

    def __init__(self, connections: dict[int, Connection], processes: dict[int, "subprocess.Popen[bytes]"]):
        self._connections = connections
        self._processes = processes
        self._ended = threading.Event()
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self.failure = ""
        """Why they cannot go on; empty while they can."""
        self.deadline: float | None = None
        """Monotonic time at which a step counts as stuck; None where sums watch over time themselves."""

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """One frame to every rank. Raises: OSError: one is gone."""
        for connection in self._connections.values():
            connection.send(kind, payload)

    def send_json(self, values: dict[str, Any]) -> None:
        self.send(Kind.JSON, json.dumps(values).encode())

    def wait_until_ready(self, timeout_s: float) -> None:
        """Until every rank has answered what it was told.

        Raises:
            RanksError: one of them failed, ended or took too long.
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
        """From now on notice ranks that fail or end, also while nothing is computed.

        Args:
            on_failure: called once, on the watching thread.
        """
        self._watcher = threading.Thread(target=self._watch, args=(on_failure,), name="kraken-ranks", daemon=True)
        self._watcher.start()

    def failure_after(self, error: Exception) -> str:
        """Why a step failed with this error: a rank's failure where there is one. The ranks are ended."""
        self._failed.wait(EXPLANATION_TIMEOUT_S)
        self._fail(f"the devices lost step with each other ({type(error).__name__}: {error})")
        return self.failure

    def stop(self) -> None:
        """Let every rank leave, and end those that do not."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self.send(Kind.STOP)
        ends_at = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends_at - time.monotonic()))
        self.end()

    def end(self) -> None:
        """Kill what was started here, and leave the others alone; safe to call twice."""
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
                        "a step outlasted engine.collective_timeout_s, or the recording of graphs"
                        " engine.startup_timeout_s: a device or the link between them is stuck"
                    )
        if self.failure:
            on_failure()

    def _failure_of(self, rank: int) -> str:
        try:
            return f"rank {rank} failed: {self._connections[rank].receive_json()['error']}"
        except (OSError, ValueError, KeyError):
            return self._exit_reason(rank)

    def _exit_reason(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank} ended, or cannot be reached"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXPLANATION_TIMEOUT_S / 2)
        return f"rank {rank} {_exit_reason(process)}"


def connect(join_token: JoinToken) -> Connection:
    """A rank's way in.

    Raises:
        ConnectionLost: nobody is there.
    """
    address = (join_token.host, join_token.port)
    try:
        connection = Connection(socket.create_connection(address, timeout=HELLO_TIMEOUT_S))
        connection.set_timeout(None)
        connection.send_json({"key": join_token.key, "rank": join_token.rank})
    except OSError as error:
        raise ConnectionLost(f"no leader answers at {join_token.host}:{join_token.port} ({error})") from error
    return connection


def _exit_reason(process: "subprocess.Popen[bytes]") -> str:
    status = process.poll()
    if status is None:
        return "closed its connection"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
