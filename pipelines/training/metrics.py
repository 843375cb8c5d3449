"""Metrics of training on their way to MLflow: from the workers' reports in the controller, each step once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from kraken.checkpoint.folders import list_checkpoints
from kraken.checkpoint.history import HISTORY_NAME, History, read_history
from kraken.manifest import ArtefactError
from pipelines.curves import curve
from pipelines.outbox import one_line
from pipelines.tracking import KILLED_LIMIT_S, MetricsRef, StageRun

STOPPED = "stopped_at"
"""The only entry of the last report of workers that were asked to stop: their step."""
NOT_LOGGED = ("step", "seconds_left")
ATTACH_LIMIT_S = 5.0
HISTORY_BATCH = 1000
"""Reports of a history that wait for delivery together."""


class MetricsToTracker(UserCallback):
    """Runs in Ray Train's controller: the ranks' metrics go to MLflow, keyed by optimizer step.

    Args:
        ref: run of the pretrain stage, which gets every metric.
        pipeline: run of the pipeline, which gets the curves.
    """

    def __init__(self, ref: MetricsRef, pipeline: MetricsRef | None = None):
        self.ref, self.pipeline_ref = ref, pipeline
        self.run: StageRun | None = None  # opened where the callback runs
        self.pipeline: StageRun | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Any) -> None:
        self.run = self.run or self.ref.attach()
        if self.pipeline_ref is not None:
            self.pipeline = self.pipeline or self.pipeline_ref.attach()
        if STOPPED not in metrics[0]:
            merged = merge(metrics)
            self.run.log_metrics(logged(merged), int(merged["step"]))
            if self.pipeline is not None:
                self.pipeline.log_metrics(curve(merged), int(merged["step"]))
        # the controller ends without notice
        if STOPPED in metrics[0]:
            self._end(KILLED_LIMIT_S)
        elif metrics[0]["seconds_left"] == 0.0:
            self._end()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            print(f"pretrain: worker {rank} failed ({one_line(error)})", flush=True)

    def _end(self, *limit_s: float) -> None:
        for run in (self.run, self.pipeline):
            if run is not None and not run.flush(*limit_s):
                run.abandon()  # `log_missing` delivers the rest


def merge(metrics: list[dict[str, float]]) -> dict[str, float]:
    """One report of all ranks: training's, which is equal on every rank, and what every rank's machine did."""
    merged = dict(metrics[0])
    for report in metrics[1:]:
        merged |= {name: value for name, value in report.items() if name.startswith("system/")}
    return merged


def logged(report: Mapping[str, float]) -> dict[str, float]:
    """The part of a report that the stage's run shows."""
    return {name: value for name, value in report.items() if name not in NOT_LOGGED}


def log_missing(run: StageRun, folder: Path, pipeline: MetricsRef | None = None) -> None:
    """Log what the run's history holds and its MLflow run lacks: what a controller that died had not delivered.

    Args:
        folder: the run's; its history, or the one in its newest checkpoint.
        pipeline: run of the pipeline, which gets the curves.
    """
    found = [folder, *reversed(list_checkpoints(folder))]
    try:
        history = next(read_history(path) for path in found if (path / HISTORY_NAME).is_file())
    except (StopIteration, ArtefactError):
        return
    if not run.run_id:
        return
    _deliver(run.metrics_ref, history, logged)
    if pipeline is not None:
        _deliver(pipeline, history, curve)


def _deliver(ref: MetricsRef, history: History, part: Callable[[Mapping[str, float]], Mapping[str, float]]) -> None:
    attached = ref.attach()  # it asks anew which steps are there
    if attached.wait_until_open(ATTACH_LIMIT_S):
        for start in range(0, len(history), HISTORY_BATCH):  # a long history does not fit into the outbox
            for report in history[start : start + HISTORY_BATCH]:
                attached.log_metrics(part(report), int(report["step"]))
            if not attached.flush():
                break
    attached.abandon()
