"""What the pipeline costs beside its stages' own work: wall time of `make run` minus that work, and MLflow's share.

    python -m benchmarks.pipeline --steps 100

The benchmark runs `python -m jobs.local run quickstart`, which is what `make run` calls, three times in a temporary
storage. The first run starts the cluster (cold). The second changes nothing. The third changes the seed and the split
of the data, so that every stage runs again on the running cluster (warm). Then the benchmark trains in its own process
and logs ten metrics a step. It needs two idle cores and some minutes. The last line is JSON:

* `overhead_cold_s`, `overhead_warm_s`: wall time minus the stages' own work. That is the manifest's `seconds` of a
  stage, and of pretrain its `training_seconds`: starting and ending Ray Train's workers counts as overhead.
* `rerun_s`: wall time of the run without a change.
* `mlflow_share`: time that the training loop spends in recording, as a fraction of the time of its steps, with a
  database in the storage. `mlflow_thread_share`: CPU time of the thread that delivers, which runs beside the steps.
* `stages_cold_s`, `stages_warm_s`: the work of each stage.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from kraken.manifest import MANIFEST_NAME, Manifest
from kraken.presets import PRESETS
from kraken.training.train import NoHooks, train
from pipelines.tracking import StageRun, Tracker

LIMIT_S = 900.0
"""Longest run of the pipeline."""
NUM_METRICS = 10


class Pipeline:
    """`make run` in a storage of its own."""

    def __init__(self, storage: Path, options: list[str]):
        self._storage, self._options = storage, options
        self._environment = {
            name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
        }

    def run(self, *options: str) -> float:
        """Run the pipeline; returns the wall time in seconds."""
        started_at = time.monotonic()
        self._call("run", "quickstart", "--storage", str(self._storage), *self._options, *options)
        return time.monotonic() - started_at

    def stop(self) -> None:
        """End the cluster and the endpoint."""
        self._call("stop", "--storage", str(self._storage))

    def _call(self, *words: str) -> None:
        command = [sys.executable, "-m", "jobs.local", *words]
        done = subprocess.run(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")

    def artefacts(self) -> dict[Path, Manifest]:
        """Folder -> manifest of every stage that has finished."""
        found = self._storage.glob(f"*/*/{MANIFEST_NAME}")
        return {path.parent: Manifest.read(path.parent) for path in found}


def stages_made(before: dict[Path, Manifest], after: dict[Path, Manifest]) -> dict[str, float]:
    """Stage -> seconds of its own work, for the stages that were computed between two times."""
    made = {folder: manifest for folder, manifest in after.items() if folder not in before}
    return {m.kind: m.value("training_seconds") if m.kind == "pretrain" else m.seconds for m in made.values()}


def measure_pipeline(storage: Path, steps: int, port: int) -> dict[str, object]:
    """The three runs."""
    pipeline = Pipeline(storage, ["--train.steps", str(steps), "--serve.port", str(port)])
    try:
        cold = pipeline.run()
        first = pipeline.artefacts()
        rerun = pipeline.run()
        warm = pipeline.run("--train.seed", "2", "--data.validation-fraction", "0.04")
        stages_cold, stages_warm = stages_made({}, first), stages_made(first, pipeline.artefacts())
    finally:
        pipeline.stop()
    for stages in (stages_cold, stages_warm):
        assert len(stages) == 5, f"not every stage ran: {sorted(stages)}"
    return {
        "overhead_cold_s": round(cold - sum(stages_cold.values()), 2),
        "overhead_warm_s": round(warm - sum(stages_warm.values()), 2),
        "rerun_s": round(rerun, 2),
        "stages_cold_s": {kind: round(seconds, 2) for kind, seconds in stages_cold.items()},
        "stages_warm_s": {kind: round(seconds, 2) for kind, seconds in stages_warm.items()},
    }


class Logging(NoHooks):
    """Logs ten metrics after every step, and times the calls."""

    def __init__(self, run: StageRun):
        self.run, self.seconds, self.num_calls = run, 0.0, 0

    def on_step(self, metrics: dict[str, float]) -> None:
        started_at = time.perf_counter()
        chosen = dict(list(metrics.items())[:NUM_METRICS])
        assert len(chosen) == NUM_METRICS
        self.run.log_metrics(chosen, int(metrics["step"]))
        self.seconds += time.perf_counter() - started_at
        self.num_calls += 1


def cpu_seconds(thread_name: str) -> float:
    """CPU time that a thread of this process has used."""
    [thread_id] = [thread.native_id for thread in threading.enumerate() if thread.name == thread_name]
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id == thread_id)


def measure_mlflow(storage: Path, steps: int) -> dict[str, float]:
    """Train `quickstart` on its prepared data, log ten metrics a step, and time the calls."""
    config = PRESETS["quickstart"]()
    settings = dataclasses.replace(config.train, steps=steps, log_every=1, validate_every=steps, checkpoint_every=steps)
    config = dataclasses.replace(config, storage=str(storage), train=settings)
    [prepared, *_] = sorted(storage.glob(f"prepare/*/{MANIFEST_NAME}"))
    with Tracker(str(storage)).pipeline("benchmark", "benchmark") as run:
        hooks = Logging(run)
        metrics = train(config, prepared.parent, storage / "benchmark", hooks)
        assert run.flush()
        thread_s = cpu_seconds("mlflow benchmark")
    assert hooks.num_calls == steps
    seconds = metrics["training_seconds"].value
    return {
        "mlflow_share": round(hooks.seconds / seconds, 5),
        "mlflow_thread_share": round(thread_s / seconds, 4),
        "step_ms": round(1000 * seconds / steps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run (100)")
    parser.add_argument("--port", type=int, default=8123, help="port of the endpoint while it is measured (8123)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kraken-benchmark-") as folder:
        result = measure_pipeline(Path(folder), arguments.steps, arguments.port)
        result |= measure_mlflow(Path(folder), arguments.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
