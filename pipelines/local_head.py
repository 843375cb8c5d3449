"""The head of a local Ray cluster: its record, its REST interface, and the processes that belong to it.

A head's processes are found by process tree, session and a mark in their environment, so that stopping one cluster ends
its own processes and no others. Ray is not imported here.
"""

import contextlib
import http.client
import json
import os
import socket
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

STOP_LIMIT_S = 20.0
CLOCK_STEP_S = 2.0
"""Two start times of a process that differ by less are the same: they shift when the machine's clock is set."""
MARK = "KRAKEN_CLUSTER"
"""Environment variable that every process of a head inherits; holds the cluster's id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A running head, as recorded in `<storage>/.cluster/head.json`."""

    cluster_id: str
    host: str
    pid: int
    create_time: float
    """Of the process, as psutil gives it: with it a pid is never mistaken for a later process's."""
    num_cpus: int
    dashboard_url: str
    token_path: str
    temp_dir: str
    """A folder that only this user can enter; Ray's own, below it, is open to all."""
    python: str
    ray_version: str
    address: str = ""
    """host:port for `ray.init`; empty until the head is ready."""

    def client_environment(self) -> dict[str, str]:
        """The environment variables with which Ray's own tools reach this cluster."""
        return {
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
        }

    def request(self, method: str, path: str, timeout_s: float = 10.0) -> Any:
        """Call the REST interface of this cluster's dashboard; returns the decoded JSON.

        Raises:
            OSError: it does not answer (urllib.error.HTTPError: it answers with an error).
        """
        token = Path(self.token_path).read_text()
        request = urllib.request.Request(
            self.dashboard_url + path, method=method, headers={"Authorization": f"Bearer {token}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
        try:
            with opener.open(request, timeout=timeout_s) as response:
                return json.load(response)
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"{self.dashboard_url} answers with something else than JSON") from error


def ray_dir(temp_dir: str | Path) -> Path:
    """Ray's folder below ours. Ray lets everybody into its own, down to the sockets of its processes."""
    return Path(temp_dir) / "r"


def loopback_without_proxy() -> dict[str, str]:
    """NO_PROXY with loopback added, so that a configured proxy is not asked for our own dashboard."""
    hosts = [host for host in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if host]
    value = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


# Processes


def process_of(head: Head) -> psutil.Process | None:
    """The head's process, unless it has ended, its pid belongs to another by now, or it is another machine's."""
    if head.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(head.pid)
        is_it = abs(process.create_time() - head.create_time) < CLOCK_STEP_S
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def own_processes(head: Head) -> set[psutil.Process]:
    """Every process of a head: its descendants, members of its session, those with its mark or at work in its folder.

    Ray's own processes overwrite command line and environment with a title, but stay in the session; the drivers of
    jobs leave the session, but keep the environment.
    """
    found: set[psutil.Process] = set()
    is_session_ours = True  # a dead leader's pid is not given away while its session has members
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(head.pid)
        is_session_ours = abs(leader.create_time() - head.create_time) < CLOCK_STEP_S
        if is_session_ours and leader.status() != psutil.STATUS_ZOMBIE:
            found |= {leader, *leader.children(recursive=True)}
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if other.pid == os.getpid() or other.create_time() < head.create_time - CLOCK_STEP_S:
                continue
            in_session = is_session_ours and os.getsid(other.pid) == head.pid
            if other.status() == psutil.STATUS_ZOMBIE:  # it has ended; its parent has not asked yet
                continue
            if in_session or _carries_mark(other, head) or _works_below(other, head.temp_dir):
                found.add(other)
    return found


def _carries_mark(process: psutil.Process, head: Head) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(MARK) == head.cluster_id
    return False


def _works_below(process: psutil.Process, folder: str) -> bool:
    """Whether a process lives in a cluster's temporary folder, or writes there; a person at a terminal does not count.

    An agent whose raylet has ended can be recognised by these paths only: it has overwritten its command line and
    environment. It would end by itself, but first tries for minutes to reach the head, which has ended as well.
    """
    with contextlib.suppress(psutil.Error, OSError):
        paths = (process.cwd(), *(file.path for file in process.open_files()))
        return process.terminal() is None and any(Path(path).is_relative_to(folder) for path in paths)
    return False


def end_below(temp_dir: Path) -> None:
    """End every process that works or writes below the temporary folder of a cluster that has ended."""
    deadline = time.monotonic() + STOP_LIMIT_S
    while time.monotonic() < deadline:
        others = (process for process in psutil.process_iter() if process.pid != os.getpid())
        if not (left := {process for process in others if _works_below(process, str(temp_dir))}):
            return
        end_processes(left)


def end_tree(pid: int) -> None:
    """End a child process with everything below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        end_processes({process, *process.children(recursive=True)})


def end_processes(processes: set[psutil.Process]) -> None:
    """Send SIGTERM, and SIGKILL to the processes that still run after 3 s."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
