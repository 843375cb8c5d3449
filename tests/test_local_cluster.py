"""The local cluster with real Ray heads: two of them side by side, to see that each is left alone by the other."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from jobs import local
from pipelines import local_cluster, local_head, local_jobs
from pipelines.errors import ClusterError
from pipelines.local_head import Head
from pipelines.local_jobs import Job

CHECKOUT = Path(__file__).resolve().parent.parent


# Without Ray


def test_exit_status_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert local.exit_status({"status": "SUCCEEDED", "driver_exit_code": 0}) == 0
    assert local.exit_status({"status": "FAILED", "driver_exit_code": 2}) == 2
    assert local.exit_status({"status": "FAILED", "driver_exit_code": 3}) == 1
    assert capsys.readouterr().err == ""  # the job has said why
    assert local.exit_status({"status": "FAILED", "driver_exit_code": -9}) == 1
    assert "signal 9" in capsys.readouterr().err
    assert local.exit_status({"status": "FAILED", "driver_exit_code": None, "message": "no such file"}) == 1
    assert "no such file" in capsys.readouterr().err
    assert local.exit_status({"status": "STOPPED", "driver_exit_code": None}) == 1


def test_what_the_pipeline_would_refuse_starts_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["run", "quickstat", "--storage", str(tmp_path)]) == 2
    assert local.main(["run", "quickstart", "--storage", str(tmp_path), "--train.stps", "5"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_a_taken_port_and_a_storage_without_tracking_start_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(local_cluster, "_start", lambda *arguments: pytest.fail("a cluster was started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert local.main(["run", "quickstart", "--storage", str(tmp_path), "--serve.port", str(port)]) == 2
    assert f"serve.port={port} on serve.host=127.0.0.1 cannot be used" in capsys.readouterr().err
    assert local.main(["run", "quickstart", "--storage", str(tmp_path / "a%b")]) == 2
    assert "cannot hold MLflow's database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_python_that_ray_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/me/my clone/.venv/bin/python")
    with pytest.raises(ClusterError, match="my clone.* holds ' ', at which Ray's command lines break"):
        local_cluster.start(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with space", "long" * 30])
def test_a_temporary_folder_that_ray_cannot_use_is_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    temp_dir = local_cluster.make_temp_dir(f"test {name} {os.getpid()}")
    temp_dir.rmdir()
    assert temp_dir.parent == Path("/tmp")


def test_stop_and_env_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["stop", "--storage", str(tmp_path)]) == 0
    assert local.main(["env", "--storage", str(tmp_path)]) == 2
    assert "make run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_another_process_has_now_is_not_the_head(tmp_path: Path) -> None:
    folder = local_cluster.state_folder(str(tmp_path))
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as bystander:
        head = Head(
            cluster_id="gone",
            host=socket.gethostname(),
            pid=bystander.pid,
            create_time=psutil.Process(bystander.pid).create_time() - 100,
            num_cpus=2,
            dashboard_url="http://127.0.0.1:9",
            token_path=str(folder / "token"),
            temp_dir=str(tmp_path / "ray"),
            python=sys.executable,
            ray_version="0",
            address="127.0.0.1:9",
        )
        local_cluster._write(folder, head)
        assert local_cluster.find(str(tmp_path)) is None
        assert local_cluster.stop(str(tmp_path))
        assert bystander.poll() is None
        bystander.kill()
    assert not local_cluster.stop(str(tmp_path))


RAYLET = """
import signal, subprocess, sys, time
def end(signum, frame):
    time.sleep(0.5)  # past the look at the processes
    subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)  # an agent that was just being started
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_that_a_dying_head_starts_is_ended_too(tmp_path: Path) -> None:
    folder, temp_dir = local_cluster.state_folder(str(tmp_path)), tmp_path / "ray"
    folder.mkdir()
    temp_dir.mkdir()
    command = [sys.executable, "-c", RAYLET]
    with subprocess.Popen(command, cwd=temp_dir, start_new_session=True, stdout=subprocess.PIPE) as raylet:
        assert raylet.stdout is not None and raylet.stdout.readline() == b"ready\n"
        head = Head(
            cluster_id="dying",
            host=socket.gethostname(),
            pid=raylet.pid,
            create_time=psutil.Process(raylet.pid).create_time(),
            num_cpus=2,
            dashboard_url="http://127.0.0.1:9",
            token_path=str(folder / "token"),
            temp_dir=str(temp_dir),
            python=sys.executable,
            ray_version="0",
        )
        local_cluster._write(folder, head)
        assert local_cluster.stop(str(tmp_path))
    assert [process for process in psutil.process_iter() if below(process, temp_dir)] == []


AGENT = """
import os, sys, time
log = open(sys.argv[1], "w")
os.chdir("/")
print("ready", flush=True)
time.sleep(600)
"""


def test_an_agent_that_outlived_its_raylet_is_known_by_its_log(tmp_path: Path) -> None:
    """Its command line and environment are overwritten, its parent is gone, its session is another's."""
    (tmp_path / "ours").mkdir()
    agents = []
    for log in ("ours/agent.log", "other.log"):
        command = [sys.executable, "-c", AGENT, str(tmp_path / log)]
        agent = subprocess.Popen(command, env={}, start_new_session=True, stdout=subprocess.PIPE)
        agents.append(agent)
        assert agent.stdout is not None and agent.stdout.readline() == b"ready\n"
    local_head.end_below(tmp_path / "ours")
    ours, other = agents
    assert not psutil.pid_exists(ours.pid) and other.poll() is None
    other.kill()
    other.wait()


def below(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd().removesuffix(" (deleted)")).is_relative_to(folder)
    except psutil.Error:
        return False


def test_the_head_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    folder = local_cluster.state_folder(str(tmp_path))
    folder.mkdir()
    record = json.dumps({**dict.fromkeys(Head.__slots__, ""), "host": "elsewhere", "address": "10.0.0.1:1"})
    (folder / "head.json").write_text(record)
    assert local_cluster.find(str(tmp_path)) is None
    for attempt in (local_cluster.start, local_cluster.stop):
        with pytest.raises(ClusterError, match="elsewhere"):
            attempt(str(tmp_path))
    assert (folder / "head.json").read_text() == record


def test_a_head_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_START_HOOK", "no_such_module.hook")
    with pytest.raises(ClusterError, match="no_such_module"):
        local_cluster.start(str(tmp_path))
    assert not (tmp_path / ".cluster" / "head.json").exists()


# With Ray


@pytest.fixture(scope="module")
def storages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two storages, each with a head that runs."""
    storages = [str(tmp_path_factory.mktemp(name)) for name in ("mine", "other")]
    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(local_cluster.start, storages))
        yield storages
    finally:
        for storage in storages:
            local_cluster.stop(storage)


@pytest.fixture(scope="module")
def head(storages: list[str]) -> Head:
    head = local_cluster.find(storages[0])
    assert head is not None
    return head


def run_job(head: Head, *entrypoint: str) -> tuple[int, str]:
    """Exit status and output of a job whose code is this checkout."""
    job, out = Job(head, f"test-{time.monotonic_ns()}"), io.StringIO()
    job.submit(entrypoint, working_dir=CHECKOUT, excludes=local.excludes(CHECKOUT), env_vars={"MINE": "1"})
    return local.exit_status(job.follow(out)), out.getvalue()


@pytest.mark.ray
def test_starting_again_finds_the_head(storages: list[str], head: Head) -> None:
    assert local_cluster.start(storages[0]) == head


@pytest.mark.ray
def test_jobs_give_their_output_and_exit_status(head: Head) -> None:
    listing = (
        "python", "-c", "import os, sys; print(sys.executable, *sorted(os.listdir())); print(os.environ['MINE'])"
    )  # fmt: skip
    with ThreadPoolExecutor() as threads:
        jobs = [
            threads.submit(run_job, head, *listing),
            threads.submit(run_job, head, "python", "-c", "raise SystemExit(3)"),
            threads.submit(run_job, head, "python", "-c", "raise SystemExit(2)"),
        ]
    (status, output), (failure, _), (mistake, _) = (job.result() for job in jobs)
    assert (status, failure, mistake) == (0, 1, 2)
    code = sorted(name for name in local.CODE if (CHECKOUT / name).is_dir())
    assert output == f"{sys.executable} {' '.join(code)}\n1\n"


SUBMIT = """
import sys
from jobs import local
from pipelines import local_cluster
sys.exit(local.submit(local_cluster.find(sys.argv[1]), sys.argv[2:], name="stopped"))
"""
STOPPED_JOB = """
import dataclasses, time
from kraken.presets import PRESETS
from pipelines import cluster
with cluster.connect(PRESETS["quickstart"]()):
    print("connected", flush=True)
    try:
        time.sleep(600)
    finally:
        time.sleep(4)  # longer than the 3 s after which Ray would have ended the process
        print("recorded", flush=True)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_lets_the_job_record_its_end(storages: list[str], head: Head) -> None:
    command = [sys.executable, "-c", SUBMIT, storages[0], "python", "-c", STOPPED_JOB]
    with subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line == "connected\n" for line in lines)
        process.send_signal(signal.SIGINT)
        rest = list(lines)
        assert process.wait(timeout=30) == 130
    assert "recorded\n" in rest
    assert local_jobs.running_jobs(head) == {}


CONNECTED = """
import dataclasses, sys
import ray  # before connect, which has to cope with it
from kraken.presets import PRESETS
from pipelines import cluster
with cluster.connect(dataclasses.replace(PRESETS["quickstart"](), storage=sys.argv[1])):
    print(ray.get(ray.remote(lambda: ray.get_runtime_context().gcs_address).remote()))
"""


@pytest.mark.ray
def test_a_pipeline_outside_a_job_uses_the_local_cluster(storages: list[str], head: Head) -> None:
    command = [sys.executable, "-c", CONNECTED, storages[0]]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip() == head.address, result.stderr


ASKED = """
import dataclasses, sys
import ray
from kraken.presets import PRESETS
from pipelines import cluster

def actors_known_to_the_state_api():
    from ray.util.state import list_actors  # as Ray Train's cleaner of placement groups asks
    return len(list_actors())

config = dataclasses.replace(PRESETS["quickstart"](), storage=sys.argv[1])
with cluster.connect(config):
    print(actors_known_to_the_state_api())
    task = ray.remote(max_retries=0)(actors_known_to_the_state_api)
    print(ray.get(task.options(**cluster.stage_options(config, "pretrain")).remote()))
"""


@pytest.mark.ray
def test_rays_own_tools_ask_our_cluster_though_another_runs(storages: list[str], head: Head) -> None:
    command = [sys.executable, "-c", ASKED, storages[0]]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 2
    assert "Found multiple active Ray instances" not in result.stderr


@pytest.mark.ray
def test_only_loopback_is_listened_on(head: Head) -> None:
    addresses = set()
    for process in local_head.own_processes(head):
        with contextlib.suppress(psutil.Error):
            addresses |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.ray
def test_strangers_are_refused(storages: list[str], head: Head) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(
                urllib.request.Request(f"{head.dashboard_url}/api/jobs/", headers=headers), timeout=10
            )
        assert caught.value.code == status
    assert os.stat(head.token_path).st_mode & 0o777 == 0o600
    assert os.stat(head.temp_dir).st_mode & 0o777 == 0o700


@pytest.mark.ray
def test_stop_ends_its_own_processes_and_no_others(storages: list[str], head: Head) -> None:
    other = local_cluster.find(storages[1])
    assert other is not None
    own, others = local_head.own_processes(head), local_head.own_processes(other)
    assert len(own) > 5
    assert not own & others
    with subprocess.Popen(["sleep", "60"]) as bystander:
        assert local_cluster.stop(storages[0])
        assert bystander.poll() is None
        bystander.kill()
    assert [process for process in own if is_alive(process)] == []
    assert [process for process in others if not is_alive(process)] == []
    assert local_jobs.running_jobs(other) == {}
    assert not Path(head.temp_dir).exists()
    assert local_cluster.find(storages[0]) is None
    assert not local_cluster.stop(storages[0])


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ray
def test_what_a_killed_head_leaves_behind_is_ended(storages: list[str]) -> None:
    other = local_cluster.find(storages[1])
    assert other is not None
    own = local_head.own_processes(other)
    os.kill(other.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(psutil.Process(other.pid)))
    assert local_cluster.find(storages[1]) is None
    assert local_cluster.stop(storages[1])
    assert [process for process in own if is_alive(process)] == []


def test_a_tracking_server_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@tracking:5000")
    assert local.ui("/shared/kraken") == 0
    assert capsys.readouterr().out == "local: MLflow runs at http://***@tracking:5000\n"
