"""The curves of a training in its pipeline's MLflow run, so that comparing two pipelines compares their training.

The run of the pretrain stage has every metric. The pipeline's run has the few that are compared, by the same steps.
"""

from collections.abc import Mapping

from kraken.checkpoint.history import History
from pipelines.tracking import StageRun

CURVES = ("learning_rate", "loss", "mfu", "tokens_per_second", "validation_loss")
"""Metrics of a report that the pipeline's run shows by optimizer step."""
MOST_POINTS = 2000
"""Reports of a reused training that are logged at most; the UI draws fewer."""


def curve(report: Mapping[str, float]) -> dict[str, float]:
    """The part of a report that the pipeline's run shows."""
    return {name: report[name] for name in CURVES if name in report}


def log_curves(run: StageRun, history: History) -> None:
    """Log the curves of a finished training that is reused; steps that are logged already are not logged twice."""
    for report in thinned(history):
        run.log_metrics(curve(report), int(report["step"]))


def thinned(history: History, most: int = MOST_POINTS) -> History:
    """At most about `most` reports, evenly spaced, with the first, the last and every validation."""
    if len(history) <= most:
        return history
    stride = -(-len(history) // most)
    last = len(history) - 1
    return [r for i, r in enumerate(history) if i % stride == 0 or i == last or "validation_loss" in r]
