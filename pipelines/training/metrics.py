"""Metrics of training on their way to MLflow: from the workers' reports in the controller, each step once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from kraken.checkpoint.folders import list_checkpoints
from kraken.checkpoint.history import HISTORY_NAME, read_history
from kraken.manifest import ArtefactError
from pipelines.outbox import one_line
from pipelines.tracking import KILLED_LIMIT_S, MetricsRef, StageRun

STOPPED = "stopped_at"
"""The only entry of the last report of workers that were asked to stop: their step."""
NOT_LOGGED = ("step", "seconds_left")
ATTACH_LIMIT_S = 5.0


class MetricsToTracker(UserCallback):
    """Runs in Ray Train's controller: the ranks' metrics go to MLflow, keyed by optimizer step."""

    def __init__(self, ref: MetricsRef):
        self.ref = ref
        self.run: StageRun | None = None  # opened where the callback runs

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Any) -> None:
        self.run = self.run or self.ref.attach()
        if STOPPED not in metrics[0]:
            log(self.run, merge(metrics))
        # the controller ends without notice
        if STOPPED in metrics[0]:
            self._end(KILLED_LIMIT_S)
        elif metrics[0]["seconds_left"] == 0.0:
            self._end()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            print(f"pretrain: worker {rank} failed ({one_line(error)})", flush=True)

    def _end(self, *limit_s: float) -> None:
        assert self.run is not None
        if not self.run.flush(*limit_s):
            self.run.abandon()  # `log_missing` delivers the rest


def merge(metrics: list[dict[str, float]]) -> dict[str, float]:
    """One report of all ranks: training's, which is equal on every rank, and what every rank's machine did."""
    merged = dict(metrics[0])
    for report in metrics[1:]:
        merged |= {name: value for name, value in report.items() if name.startswith("system/")}
    return merged


def log(run: StageRun, report: Mapping[str, float]) -> None:
    """Log one report of training under its step."""
    run.log_metrics({name: value for name, value in report.items() if name not in NOT_LOGGED}, int(report["step"]))


def log_missing(run: StageRun, folder: Path) -> None:
    """Log what the run's history holds and its MLflow run lacks: what a controller that died had not delivered.

    Args:
        folder: the run's; its history, or the one in its newest checkpoint.
    """
    found = [folder, *reversed(list_checkpoints(folder))]
    try:
        history = next(read_history(path) for path in found if (path / HISTORY_NAME).is_file())
    except (StopIteration, ArtefactError):
        return
    if not run.run_id:
        return
    attached = run.metrics_ref.attach()  # it asks anew which steps are there
    if attached.wait_until_open(ATTACH_LIMIT_S):
        for report in history:
            log(attached, report)
        attached.flush()
    attached.abandon()
