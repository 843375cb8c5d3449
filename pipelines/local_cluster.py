"""A Ray cluster of this machine, one per storage folder: start, find, talk to, stop.

The head is an ordinary `ray start --head --block` in a session of its own. It listens on loopback only, asks for a
token, takes free ports and a temporary folder of its own, so that it can stand beside any other Ray. What is needed to
find it again lies in `<storage>/.cluster`. What belongs to it is known by process tree, session and a mark in the
environment, so that stopping it ends its own processes and no others.

Ray itself is not imported here: its command line starts the head and submits jobs, its REST interface tells the rest.
"""

import codecs
import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import psutil

from kraken.config import ConfigError, ServeConfig
from kraken.environment import user_name
from kraken.manifest import write_atomically
from pipelines.errors import ClusterError

START_LIMIT_S = 120.0
"""A head needs 5 to 10 s on two idle cores; past this something is wrong."""
JOB_STOP_LIMIT_S = 30
"""Time a job gets between SIGTERM and SIGKILL to end its MLflow runs; Ray's own default is 3."""
STOP_LIMIT_S = 20.0
OBJECT_STORE_BYTES = 512 * 2**20
"""Stages pass references to files, not tensors, so a small store is enough."""
LONGEST_TEMP_DIR = 39
"""We append 2 characters and Ray 65 to name its sockets, and a Unix socket's path has at most 107."""
CLOCK_STEP_S = 2.0
"""Two start times of a process that differ by less are the same: they shift when the machine's clock is set."""
UNQUOTED = re.compile(r"[\s'\"\\$`&|;<>()\[\]{}*?]")
"""Characters that break the shell command lines by which Ray starts its processes."""
MARK = "KRAKEN_CLUSTER"
"""Environment variable that every process of a head inherits; holds the cluster's id."""

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # On Linux Ray replaces 127.0.0.1 by the machine's outward address and listens there; this keeps it on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The one port that no option sets; 0 takes a free one.
    "DASHBOARD_METRIC_PORT": "0",
    # Ray Train: `report` blocks for one interval, 2 s unless set; the others are noise or cost start-up time.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
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
        """What a process needs in its environment to talk to this cluster with Ray's own tools."""
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


# Finding


def state_folder(storage: str) -> Path:
    """Where a storage's head is recorded; for a remote storage a folder of this machine stands in."""
    if "://" in storage:
        digest = hashlib.sha256(storage.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"kraken-{user_name()}" / digest / ".cluster"
    return Path(storage) / ".cluster"


def find(storage: str) -> Head | None:
    """The storage's head if it runs and is ready."""
    head = _read(state_folder(storage))
    return head if head and head.address and _process_of(head) else None


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


def _process_of(head: Head) -> psutil.Process | None:
    """The head's process, unless it has ended, its pid belongs to another by now, or it is another machine's."""
    if head.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(head.pid)
        is_it = abs(process.create_time() - head.create_time) < CLOCK_STEP_S
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


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
        **_loopback_without_proxy(),
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


def ray_dir(temp_dir: str | Path) -> Path:
    """Ray's folder below ours. Ray lets everybody into its own, down to the sockets of its processes."""
    return Path(temp_dir) / "r"


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


def _loopback_without_proxy() -> dict[str, str]:
    """NO_PROXY with loopback added, so that a configured proxy is not asked for our own dashboard."""
    hosts = [host for host in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if host]
    value = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


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
    if process := _process_of(head):
        if head.address:
            _stop_jobs(head, say)
        processes = _own_processes(head)
        with contextlib.suppress(psutil.Error):
            process.terminate()
            process.wait(STOP_LIMIT_S)
        _end(processes)
    # Ray's raylet may start a process, an agent for example, between our look at the processes and its own end
    deadline = time.monotonic() + STOP_LIMIT_S
    while (processes := _own_processes(head)) and time.monotonic() < deadline:
        _end(processes)
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


def _own_processes(head: Head) -> set[psutil.Process]:
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

    That is all by which an agent is known whose raylet is gone: it has overwritten the rest. It notices by itself, but
    then waits for minutes to tell a head that is gone, too.
    """
    with contextlib.suppress(psutil.Error, OSError):
        paths = (process.cwd(), *(file.path for file in process.open_files()))
        return process.terminal() is None and any(Path(path).is_relative_to(folder) for path in paths)
    return False


def end_below(temp_dir: Path) -> None:
    """End what is left of a cluster that has ended: every process that lives or writes below its temporary folder."""
    deadline = time.monotonic() + STOP_LIMIT_S
    while time.monotonic() < deadline:
        others = (process for process in psutil.process_iter() if process.pid != os.getpid())
        if not (left := {process for process in others if _works_below(process, str(temp_dir))}):
            return
        _end(left)


def end_tree(pid: int) -> None:
    """End a child process with everything below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        _end({process, *process.children(recursive=True)})


def _end(processes: set[psutil.Process]) -> None:
    """SIGTERM, a moment, SIGKILL."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=3)


# Jobs


class Job:
    """A job of the cluster, by its submission id."""

    def __init__(self, head: Head, submission_id: str):
        self.head = head
        self.submission_id = submission_id
        self._log: IO[bytes] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._preface: str | None = ""

    def submit(
        self,
        entrypoint: Sequence[str],
        *,
        working_dir: Path,
        excludes: Sequence[str] = (),
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        """Hand a command to the cluster by `ray job submit`; returns once it is accepted.

        Raises:
            ClusterError: it is refused; the message is Ray's.
        """
        environment = {**os.environ, **self.head.client_environment(), **_loopback_without_proxy()}
        environment.pop("RAY_ADDRESS", None)
        # A file, since a command line can be read by everybody and the variables may hold a key.
        with tempfile.NamedTemporaryFile("w", dir=self.head.temp_dir, suffix=".yaml") as runtime_env:
            json.dump({"excludes": list(excludes), "env_vars": dict(env_vars or {})}, runtime_env)
            runtime_env.flush()
            command = [str(Path(self.head.python).with_name("ray")), "job", "submit", "--no-wait"]
            command += ["--submission-id", self.submission_id, "--working-dir", str(working_dir)]
            command += ["--runtime-env", runtime_env.name, "--", *entrypoint]
            status, output = _run(command, environment)
        if status != 0:
            lines = [line for line in output.splitlines() if line.strip()]
            raise ClusterError("`ray job submit` failed:\n" + "\n".join(f"  {line}" for line in lines[-8:]))

    def stop(self) -> None:
        """Ask for SIGTERM to the driver; a job that is unknown or has ended is left alone."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.head.request("POST", f"/api/jobs/{self.submission_id}/stop")

    def follow(self, out: IO[str] | None = None) -> dict[str, Any]:
        """Copy the job's output to `out` until the job ends; after an interruption another call goes on where it was.

        Returns:
            Ray's record of the job: `status`, `driver_exit_code`, `message`, ...

        Raises:
            ClusterError: the cluster ended before the job, or knows no such job.
        """
        out = out or sys.stdout
        while True:
            record = self._record()
            ended = record is not None and record["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
            for _ in range(4):
                self._copy_log(out)
                if ended:
                    assert record is not None
                    return record
                time.sleep(0.1)

    def _record(self) -> dict[str, Any] | None:
        """Ray's record of the job, or None when the dashboard is busy."""
        try:
            return self.head.request("GET", f"/api/jobs/{self.submission_id}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise ClusterError(f"the local cluster knows no job {self.submission_id}") from error
        except OSError as error:
            if _process_of(self.head) is None:
                raise ClusterError("the local cluster ended before the job; run the same command again") from error
        return None

    def _copy_log(self, out: IO[str]) -> None:
        """Copy what the job's log gained, less the lines that Ray puts in front."""
        # The head runs on this machine, so its log file is at hand: Ray's own tail ends six seconds after the job.
        path = ray_dir(self.head.temp_dir) / "session_latest" / "logs" / f"job-driver-{self.submission_id}.log"
        if self._log is None:
            try:
                self._log = path.open("rb")
            except OSError:
                return
        text = self._decoder.decode(self._log.read())  # the file may end within a character
        if self._preface is not None:
            self._preface += text
            _, _, rest = self._preface.partition("Running entrypoint for job ")
            if "\n" not in rest:
                return
            text, self._preface = rest.split("\n", 1)[1], None
        if text:
            out.write(text)
            out.flush()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of a command; in a session of its own, since Ctrl-C is ours to handle."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process.returncode, output


def running_jobs(head: Head) -> dict[str, str]:
    """Submission id -> entrypoint of every submitted job that has not ended.

    Raises:
        ClusterError: the cluster does not answer.
    """
    return {job["submission_id"]: job["entrypoint"] for job in _jobs(head) if job["status"] in ("PENDING", "RUNNING")}


def all_jobs(head: Head) -> set[str]:
    """Submission ids of every submitted job that the cluster remembers; raises as `running_jobs` does."""
    return {job["submission_id"] for job in _jobs(head)}


def _jobs(head: Head) -> list[dict[str, Any]]:
    try:
        jobs = head.request("GET", "/api/jobs/")
    except OSError as error:
        raise ClusterError(f"the local cluster does not answer ({error}); `make stop`, then run this again") from error
    return [job for job in jobs if job["type"] == "SUBMISSION"]


def exports(head: Head) -> str:
    """Shell lines that point Ray's own tools at this cluster."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in head.client_environment().items())


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does for the duration."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
