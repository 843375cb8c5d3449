"""How the ranks of an engine find each other.

Rank 0 opens a `Rendezvous` and gives each worker a `JoinToken`. `launch` starts the workers on this host; workers that
exist already, for example Ray actors, call `kraken.engine.distributed.worker.run_worker` with their token. The token
holds a secret key, without which nobody is let in. Ports are free ones, on the loopback interface unless another host
is named.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kraken.engine.distributed.control_channel import Connection, ConnectionLost
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.worker_group import WATCH_INTERVAL_S, WorkerError, WorkerGroup, exit_reason

GREETING_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a worker needs to know to join an engine."""

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
        num_devices: number of ranks, rank 0 included.
        host: address of this host, as the workers reach it.
    """

    worker_module = "kraken.engine.distributed.worker"
    """Module that `launch` runs."""
    group_type = DeviceGroup
    """Type of rank 0's group; benchmarks replace it and `worker_module`."""

    def __init__(self, num_devices: int, host: str = "127.0.0.1"):
        self.num_devices, self.host = num_devices, host
        self._server = socket.create_server((host, 0), backlog=num_devices)
        self._key = secrets.token_hex(16)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def join_token(self, rank: int) -> JoinToken:
        """The token of a worker, 1 to `num_devices` - 1."""
        return JoinToken(self.host, self._server.getsockname()[1], self._key, rank)

    def launch(self, num_threads: int, prefixes: Mapping[int, list[str]] | None = None) -> None:
        """Start all workers on this host.

        Args:
            num_threads: CPU threads of each worker.
            prefixes: by rank, a command that runs the worker's command, for example on another core.
        """
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(num_threads)}
        for rank in range(1, self.num_devices):
            command = [*(prefixes or {}).get(rank, []), sys.executable, "-m", self.worker_module]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, bufsize=0
            )
            self._processes[rank] = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # the worker has ended, which `wait_for_workers` reports
                # stdin stays open: a worker ends with it, see `worker.main`
                process.stdin.write(self.join_token(rank).to_json().encode() + b"\n")

    def wait_for_workers(self, timeout_s: float) -> WorkerGroup:
        """Wait until every worker has connected, and stop listening.

        Raises:
            WorkerError: a worker ended, or did not connect in time.
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
            WorkerGroup(connections, self._processes).kill()
            raise
        finally:
            self._server.close()
        return WorkerGroup(connections, self._processes)

    def _require_alive(self, connections: Mapping[int, Connection], ends_at: float, timeout_s: float) -> None:
        missing = [rank for rank in range(1, self.num_devices) if rank not in connections]
        for rank in missing:
            process = self._processes.get(rank)
            if process is not None and process.poll() is not None:
                raise WorkerError(f"rank {rank} {exit_reason(process)} before it had connected")
        if time.monotonic() > ends_at:
            raise WorkerError(
                f"ranks {missing} did not connect to {self.host} within engine.startup_timeout_s={timeout_s:.0f}; check"
                " that they run and reach that address"
            )

    def _accept(self, connections: dict[int, Connection]) -> None:
        """Accept one connection, and close it unless it knows the key and is of a worker that is missing."""
        end, _ = self._server.accept()
        connection = Connection(end)
        connection.set_timeout(GREETING_TIMEOUT_S)
        try:
            greeting = connection.receive_json()
            is_known = secrets.compare_digest(str(greeting.get("key")), self._key)
            rank = int(greeting.get("rank", 0))
        except (OSError, ValueError):
            is_known, rank = False, 0
        if not is_known or rank in connections or not 0 < rank < self.num_devices:
            connection.close()
            return
        connections[rank] = connection


def connect(token: JoinToken) -> Connection:
    """Connect a worker with rank 0.

    Raises:
        ConnectionLost: rank 0 cannot be reached.
    """
    try:
        connection = Connection(socket.create_connection((token.host, token.port), timeout=GREETING_TIMEOUT_S))
        connection.set_timeout(None)
        connection.send_json({"key": token.key, "rank": token.rank})
    except OSError as error:
        raise ConnectionLost(f"rank 0 does not answer at {token.host}:{token.port} ({error})") from error
    return connection
