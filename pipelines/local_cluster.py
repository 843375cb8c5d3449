"""A Ray cluster of this machine, one per storage folder: start it, find it, stop it.

The head is an ordinary `ray start --head --block` in a session of its own. It listens on loopback only, asks for a
token, and has free ports and a temporary folder of its own, so that any other Ray can run beside it. Its record lies in
`<storage>/.cluster`; `local_head.py` knows its processes, `local_jobs.py` its jobs.

Ray itself is not imported here: its command line starts the head and submits jobs, its REST interface tells the rest.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil

from kraken.config import ConfigError, ServeConfig
from kraken.environment import user_name
from kraken.manifest import write_atomically
from pipelines.errors import ClusterError
from pipelines.local_head import (
    MARK,
    STOP_LIMIT_S,
    Head,
    end_processes,
    loopback_without_proxy,
    own_processes,
    process_of,
    ray_dir,
)
from pipelines.local_jobs import Job, running_jobs

START_LIMIT_S = 120.0
"""A head needs 5 to 10 s on two idle cores; past this something is wrong."""
JOB_STOP_LIMIT_S = 30
"""Time a job gets between SIGTERM and SIGKILL to end its MLflow runs; Ray's own default is 3."""
OBJECT_STORE_BYTES = 512 * 2**20
"""Stages pass references to files, not tensors, so a small store is enough."""
LONGEST_TEMP_DIR = 39
"""We append 2 characters and Ray 65 to name its sockets, and a Unix socket's path has at most 107."""
UNQUOTED = re.compile(r"[\s'\"\\$`&|;<>()\[\]{}*?]")
"""Characters that break the shell command lines by which Ray starts its processes."""

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # On Linux Ray replaces 127.0.0.1 by the machine's outward address and listens there; this keeps it on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The one port that no option sets; 0 takes a free one.
    "DASHBOARD_METRIC_PORT": "0",
    "RAY_DEDUP_LOGS": "0",
    # OpenMP's threads wait for each other by spinning, which costs most where the cores are shared, as here with Ray's
    # own processes; to wake one that sleeps costs a decoding engine up to half its speed on idle ones. So they spin for
    # some 25 us, which a forward pass rarely exceeds between two products. `benchmarks/wait_policy.py` measures it.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
"""Environment of every Ray that we start ourselves; it is read before the cluster exists."""
HEAD_SETTINGS = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_LIMIT_S),
    # `make stop` means now: jobs are stopped first, and nothing else is worth a drain of up to 30 s.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
NOT_INHERITED = (
    *("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "HF_HUB_OFFLINE", "MLFLOW_TRACKING_URI"),
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_HEADERS", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
)
"""Variables of the caller that must not reach the head: some belong to another cluster, some are given per job."""


# Finding


def state_folder(storage: str) -> Path:
    """The folder with the record of a storage's head; for a remote storage a temporary folder of this machine."""
    if "://" in storage:
        digest = hashlib.sha256(storage.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"kraken-{user_name()}" / digest / ".cluster"
    return Path(storage) / ".cluster"


def find(storage: str) -> Head | None:
    """The storage's head; None unless it runs and is ready."""
    head = _read(state_folder(storage))
    return head if head and head.address and process_of(head) else None


def is_recorded(storage: str) -> bool:
    """Whether a head of the storage runs, or has left processes behind that `start` will end."""
    return (state_folder(storage) / "head.json").exists()


def _read(folder: Path) -> Head | None:
    try:
        return Head(**json.loads((folder / "head.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: Path, head: Head) -> None:
    write_atomically(folder / "head.json", json.dumps(dataclasses.asdict(head), indent=2))


def _require_this_host(head: Head, folder: Path) -> None:
    """Refuse to judge or end what another machine started in a storage that both share."""
    if head.host != socket.gethostname():
        raise ClusterError(
            f"{head.host} runs this storage's local cluster; use another --storage here, or stop it there "
            f"(if that machine is gone, delete {folder / 'head.json'})"
        )


# Starting


def start(storage: str, say: Callable[[str], None] = print) -> Head:
    """The storage's head: the one that runs, else a new one, ready for jobs.

    Raises:
        ClusterError: it does not come up; the message ends with its log's last lines.
    """
    require_usable_python()
    folder = state_folder(storage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ClusterError(
            f"storage={storage} cannot be written ({error.strerror}); choose another --storage"
        ) from error
    with _locked(folder):
        if head := find(storage):
            if (head.python, head.ray_version) == (sys.executable, metadata.version("ray")):
                return head
            say(f"the local cluster runs Ray {head.ray_version} of {head.python}; a new one takes its place")
        if old := _read(folder):  # of another environment, or what is left of one that died
            _require_this_host(old, folder)
            _stop(folder, say)
        return _start(folder, storage, say)


def _start(folder: Path, storage: str, say: Callable[[str], None]) -> Head:
    started_at = time.monotonic()
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        raise ClusterError(f"{ray} is missing; install Ray into this environment: pip install -e '.[pipelines]'")
    temp_dir = make_temp_dir(str(folder.resolve()))
    token_path = write_token(folder / "token")
    num_cpus = count_cpus()
    cluster_id, dashboard_port = secrets.token_hex(8), free_port()
    command = [str(ray), "start", "--head", "--block", "--disable-usage-stats", "--no-monitor"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    command += ["--port=0", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--ray-client-server-port={free_port()}"]  # it refuses 0
    command += [f"--temp-dir={ray_dir(temp_dir)}"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in NOT_INHERITED},
        **RAY_SETTINGS,
        **HEAD_SETTINGS,
        **loopback_without_proxy(),
        "PATH": f"{ray.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "KRAKEN_STORAGE": storage,
        MARK: cluster_id,
    }
    say(f"starting a local Ray cluster with {num_cpus} CPUs")
    log_path = folder / "head.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=temp_dir, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C: the endpoint outlives the command
        )  # fmt: skip
    head = Head(
        cluster_id=cluster_id,
        host=socket.gethostname(),
        pid=process.pid,
        create_time=psutil.Process(process.pid).create_time(),
        num_cpus=num_cpus,
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        token_path=str(token_path),
        temp_dir=str(temp_dir),
        python=sys.executable,
        ray_version=metadata.version("ray"),
    )
    try:
        _write(folder, head)
        head = dataclasses.replace(head, address=_wait_until_ready(head, process, log_path))
        _write(folder, head)
    except BaseException:
        _stop(folder, say)
        raise
    say(f"cluster ready after {time.monotonic() - started_at:.1f} s; dashboard {head.dashboard_url}")
    return head


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes], log_path: Path) -> str:
    """Wait for the head's address and for the dashboard to take jobs; returns the address."""
    deadline = time.monotonic() + START_LIMIT_S
    address_path = ray_dir(head.temp_dir) / "ray_current_cluster"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(
                f"the Ray head ended with status {process.returncode} while it started:\n{_tail(log_path)}"
            )
        with contextlib.suppress(OSError):
            head.request("GET", "/api/jobs/")
            if address := address_path.read_text().strip():
                return address
        time.sleep(0.1)
    raise ClusterError(f"the Ray head was not ready after {START_LIMIT_S:.0f} s; its log ends:\n{_tail(log_path)}")


def require_usable_python() -> None:
    """Refuse a Python whose path Ray cannot use: the head would start, and none of its workers.

    Raises:
        ClusterError: with the character at fault.
    """
    if found := UNQUOTED.search(sys.executable):
        raise ClusterError(
            f"the path of this Python, {sys.executable}, holds {found[0]!r}, at which Ray's command lines break; make "
            "the environment in a path of letters, digits, '-', '_', '.' and '/'"
        )


def count_cpus() -> int:
    """CPUs to give to Ray: those this process may use, and two logical ones at least, for two workers."""
    return max(2, len(os.sched_getaffinity(0)))


def write_token(path: Path) -> Path:
    """A fresh secret that only this user can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def make_temp_dir(purpose: str) -> Path:
    """An empty folder for a Ray session: ours alone, one per purpose, its path short enough for sockets.

    It lies in /tmp where the path of the machine's temporary folder is too long, or breaks Ray's command lines.
    """
    name = f"kraken-ray-{os.getuid()}-{hashlib.sha256(purpose.encode()).hexdigest()[:8]}"
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base / name)) > LONGEST_TEMP_DIR or UNQUOTED.search(str(base)):
        base = Path("/tmp")
    temp_dir = base / name
    try:
        if temp_dir.is_dir() and not temp_dir.is_symlink() and temp_dir.stat().st_uid == os.getuid():
            shutil.rmtree(temp_dir)
        temp_dir.mkdir(mode=0o700)
    except OSError as error:
        raise ClusterError(
            f"{temp_dir} cannot be made ({error.strerror}); remove it, or set TMPDIR to a short path"
        ) from error
    return temp_dir


def free_port() -> int:
    """A port that nobody listens on, of the range that systems do not hand out by themselves."""
    for _ in range(100):
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ClusterError("no free port between 20000 and 32000 on 127.0.0.1; end what holds them")


def require_bindable(serve: ServeConfig) -> None:
    """Try to listen on the endpoint's address; only called while Serve does not run.

    Raises:
        ConfigError: another program listens there, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port={serve.port} on serve.host={serve.host} cannot be used ({error.strerror}); "
                f"choose another, for example --serve.port {serve.port + 1}"
            ) from error


def _tail(path: Path, num_lines: int = 15) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return f"  ({path} cannot be read)"
    return "\n".join(f"  {line}" for line in lines[-num_lines:]) or "  (empty)"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one command at a time start or stop this storage's head."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Stopping


def stop(storage: str, say: Callable[[str], None] = print) -> bool:
    """End the storage's head with every process and file of its own; False where there was none."""
    folder = state_folder(storage)
    if not is_recorded(storage):
        return False
    with _locked(folder):
        if not (head := _read(folder)):
            return False
        _require_this_host(head, folder)
        _stop(folder, say)
        return True


def _stop(folder: Path, say: Callable[[str], None]) -> None:
    head = _read(folder)
    assert head is not None
    if process := process_of(head):
        if head.address:
            _stop_jobs(head, say)
        processes = own_processes(head)
        with contextlib.suppress(psutil.Error):
            process.terminate()
            process.wait(STOP_LIMIT_S)
        end_processes(processes)
    # Ray's raylet may start a process, an agent for example, between our look at the processes and its own end
    deadline = time.monotonic() + STOP_LIMIT_S
    while (processes := own_processes(head)) and time.monotonic() < deadline:
        end_processes(processes)
    if processes:
        pids = ", ".join(str(process.pid) for process in processes)
        raise ClusterError(f"processes {pids} of the local cluster do not end; end them by hand, then stop again")
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    Path(head.token_path).unlink(missing_ok=True)
    (folder / "head.json").unlink(missing_ok=True)


def _stop_jobs(head: Head, say: Callable[[str], None]) -> None:
    """Stop the jobs that run, so that they can record how they ended."""
    with contextlib.suppress(OSError, ClusterError):
        jobs = running_jobs(head).keys()
        for job_id in jobs:
            say(f"stopping job {job_id}")
            Job(head, job_id).stop()
        deadline = time.monotonic() + JOB_STOP_LIMIT_S + 5
        while time.monotonic() < deadline and jobs & running_jobs(head).keys():
            time.sleep(0.2)


def exports(head: Head) -> str:
    """Shell lines that point Ray's own tools at this cluster."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in head.client_environment().items())
