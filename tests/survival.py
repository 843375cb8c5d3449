"""What the failure tests share: a tiny training given as a command line, what it leaves behind, and waiting for it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jobs import local
from pipelines import local_head
from pipelines.tracking import NAME_TAG

ROOT = Path(__file__).parent.parent
STEPS = 120

SETTINGS = {
    "data.num-trained-ids": 300,
    "data.validation-fraction": 0.01,
    "model.num-layers": 2,
    "model.width": 16,
    "model.num-heads": 4,
    "model.num-ways": 2,
    "model.context-length": 32,
    "model.vocab-size": 320,
    "train.precision": "float64",
    "train.compile": "off",
    "train.steps": STEPS,
    "train.sequences-per-step": 6,
    "train.sequences-per-microbatch": 6,
    "train.learning-rate": 1e-2,
    "train.warmup-steps": 2,
    "train.log-every": 1,
    "train.validate-every": 20,
    "train.validation-windows": 4,
    "train.checkpoint-every": 20,
}


def command(storage: Path | str, job: str = "pretrain", **settings: Any) -> list[str]:
    """A command line, `jobs.pretrain` unless said otherwise, of the tiny model; settings as `train__steps=5`."""
    values = SETTINGS | {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["-m", f"jobs.{job}", "quickstart", "--storage", str(storage), *options]


class Driver:
    """A job's driver: `jobs.pretrain` in a process of its own, its output kept."""

    def __init__(self, address: str, storage: Path | str, environment: dict[str, str] | None = None, **settings: Any):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *command(storage, **settings)],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait(self, limit_s: float = 180) -> int:
        """Exit status."""
        status = self.process.wait(limit_s)
        self._reader.join(10)
        return status

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def steps(self) -> list[int]:
        """Steps that it reported, in order."""
        marked = [line.split("pretrain: step ", 1)[1] for line in list(self.lines) if "pretrain: step " in line]
        return [int(line.split()[0]) for line in marked]

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: any(done >= step for done in self.steps) or self.process.poll() is not None, self)
        assert self.process.poll() is None, self.output


def wait_until(condition: Callable[[], bool], driver: Driver | None = None, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, driver.output if driver else "waited in vain"
        time.sleep(0.02)


def runs(storage: Path, uri: str | None = None) -> dict[str, Any]:
    """Name -> MLflow run; fails when a name has two."""
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{storage}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("kraken").experiment_id])
    named = {run.data.tags.get(NAME_TAG, run.info.run_name): run for run in found}
    assert len(named) == len(found), "a run was opened twice"
    return named


def states(storage: Path, uri: str | None = None) -> dict[str, str]:
    """Name -> end state of the pipeline's run and of its stages'."""
    return {name: run.info.status for name, run in runs(storage, uri).items()}


def curve(
    storage: Path, metric: str = "loss", uri: str | None = None, name: str = "pretrain"
) -> list[tuple[int, float]]:
    """All points of a metric of training, in the order of their steps; twice what was logged twice.

    Args:
        name: of the MLflow run; `quickstart` for the pipeline's own.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{storage}/mlflow.db")
    points = client.get_metric_history(runs(storage, uri)[name].info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def checkpoints(storage: Path) -> list[int]:
    """Steps of the finished checkpoints."""
    return sorted(int(path.parent.name.split("_")[1]) for path in storage.glob("pretrain/*/step_*/manifest.json"))


def workers(below: int | None = None) -> list[psutil.Process]:
    """Ray Train's worker processes; of one raylet, or all."""
    processes = psutil.Process(below).children(recursive=True) if below else psutil.process_iter()
    found = []
    for process in processes:
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Nodes:
    """A cluster of several nodes, in a process of its own; see tests/nodes.py."""

    def __init__(self, *cpus: int, folder: Path | None = None):
        """With a folder, every node gets a temporary folder of its own below it."""
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        if folder:
            variables["NODES_FOLDER"] = str(folder)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "nodes.py"), *map(str, cpus)],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "the nodes did not start"
        described = json.loads(line)
        self.address: str = described["address"]
        self.ids: list[str] = [node["id"] for node in described["nodes"]]
        self.raylets: list[int] = [node["raylet"] for node in described["nodes"]]

    def do(self, words: str) -> None:
        """`kill INDEX` or `add CPUS`."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        self._read()

    def workers(self) -> list[int]:
        """Training workers on each node."""
        return [len(workers(raylet)) if psutil.pid_exists(raylet) else 0 for raylet in self.raylets]

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


class Server:
    """A real tracking server, which can be stopped and started again."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port, self.uri = folder, port, f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        stores = f"--backend-store-uri=sqlite:///{self.folder}/ml.db --artifacts-destination={self.folder}/files"
        address = f"--host=127.0.0.1 --port={self.port} --workers=1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *stores.split(), *address.split()],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: local.answers(f"{self.uri}/health"))

    def stop(self) -> None:
        local_head.end_tree(self.process.pid)
