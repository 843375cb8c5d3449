"""Metrics of training in a real MLflow database: each step once, whoever logs it, and none missing."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from kraken.checkpoint.history import write_history
from pipelines.tracking import Tracker
from pipelines.training.metrics import STOPPED, MetricsToTracker, log_missing


def reports(*steps: int) -> list[dict[str, float]]:
    return [{"step": float(step), "loss": 1 / step, "seconds_left": 1.0} for step in steps]


def test_what_a_dead_controller_had_not_delivered_comes_from_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    for step in (2, 4):
        (folder / f"step_{step:09d}").mkdir(parents=True)
        write_history(folder / f"step_{step:09d}", reports(*range(1, step + 1)))
    tracker = Tracker(str(tmp_path))
    with tracker.pipeline("key", "tiny") as pipeline, pipeline.stage("pretrain", "pretrain") as stage:
        dead = MetricsToTracker(stage.metrics_ref, pipeline.ref.metrics_ref)
        for report in reports(1, 2):  # of 3 and 4 nothing arrived
            dead.after_report(None, [report, report], None)
        assert dead.run is not None and dead.run.flush()
        assert dead.pipeline is not None and dead.pipeline.flush()
        log_missing(stage, folder, pipeline.ref.metrics_ref)
        next_one = MetricsToTracker(stage.metrics_ref, pipeline.ref.metrics_ref)
        for report in reports(3, 4, 5, 6):  # as after a restart from an older checkpoint
            next_one.after_report(None, [report, report], None)
        next_one.after_report(None, [{STOPPED: 6.0}], None)
        write_history(folder, reports(*range(1, 9)))  # a finished run's
        log_missing(stage, folder, pipeline.ref.metrics_ref)
    for run_id in (stage.run_id, pipeline.run_id):
        points = MlflowClient(tracker.tracking_uri).get_metric_history(run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in range(1, 9)]
    run = MlflowClient(tracker.tracking_uri).get_run(stage.run_id)
    assert "seconds_left" not in run.data.metrics and STOPPED not in run.data.metrics


def test_a_run_without_a_history_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    with Tracker(str(tmp_path)).pipeline("key", "tiny") as pipeline:
        log_missing(pipeline, tmp_path / "run")
        (tmp_path / "run" / "history.jsonl").write_text("{damaged")
        log_missing(pipeline, tmp_path / "run")
