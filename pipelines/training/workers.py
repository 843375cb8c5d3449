"""The Ray Train workers of pretraining: the function that each runs, and the loop that restarts the group."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from kraken.config import ConfigError, RunConfig
from kraken.environment import provide_home
from kraken.manifest import ArtefactError, Metric
from kraken.storage import Storage, join
from kraken.storage_id import storage_id
from kraken.training.train import Hooks, TrainingStopped, train
from pipelines.errors import ClusterError, RunStopped
from pipelines.lease import Lease, LeaseRef
from pipelines.ray_internals import silence_report_logger
from pipelines.stage import Work
from pipelines.stop import StopSwitch, StopWatch
from pipelines.training.metrics import STOPPED, MetricsToTracker, log_missing
from pipelines.training.placement import place, sizes
from pipelines.training.restarts import Placement, Trainer, own_resources
from pipelines.training.system_metrics import SystemMetrics

TRAIN_SETTINGS = {
    # `report` blocks for one interval, 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Without these two every printed line appears twice, and the start takes longer.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # We watch the nodes ourselves: Ray Train's way asks all workers to wait for each other at every look.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A group is started where there is room; a longer wait is for a node that was lost in the meantime.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
"""Ray Train's environment variables; Ray Train hands them on to its processes. A value that is set already stands."""

CONTROLLER_FAILURES = 5
"""Attempts to start a worker group; Ray's own default never stops trying."""


class WorkerHooks(Hooks):
    """Reports every step's metrics to Ray Train, from every rank; the controller chooses which of them MLflow gets."""

    def __init__(self, watch: StopWatch, system: SystemMetrics):
        self.watch, self.system = watch, system
        self.is_main = ray.train.get_context().get_world_rank() == 0

    def on_step(self, metrics: dict[str, float]) -> None:
        if self.is_main:
            print(step_line(metrics), flush=True)
        ray.train.report({**metrics, **self.system.read()})

    def on_checkpoint(self, step: int, path: Path) -> None: ...

    def stop_requested(self) -> bool:
        return self.watch.requested


def step_line(metrics: dict[str, float]) -> str:
    """One line of progress."""
    line = (
        f"pretrain: step {metrics['step']:>6.0f} | loss {metrics['loss']:.4f} | "
        f"{metrics['tokens_per_second']:>9,.0f} tokens/s | {metrics['seconds_left']:>5.0f} s left"
    )
    if "validation_loss" in metrics:
        line += f" | validation loss {metrics['validation_loss']:.4f}"
    return line


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """The arguments of the workers of one attempt; small and picklable."""

    config: RunConfig
    prepare: str
    """Fingerprint of the data."""
    pretrain: str
    """Fingerprint of the run."""
    lease: LeaseRef
    pause: StopSwitch
    """Ends this attempt, and another follows."""
    stop: StopSwitch
    """Ends the run."""


def worker_loop(attempt: Attempt) -> dict[str, Any]:
    """The body of each Ray Train worker.

    Returns:
        The finished run's metrics by name, each as value and unit; or {"stopped_at": step}.
    """
    import torch

    silence_report_logger()
    provide_home()  # torch's compiler asks for the user's name
    config = attempt.config
    torch.set_num_threads(config.cluster.cpus_per_worker)
    storage = Storage(config.storage)
    storage.fetch("prepare", attempt.prepare)
    run_folder = storage.folder("pretrain", attempt.pretrain)
    context = ray.train.get_context()
    storage.fetch_checkpoints(run_folder, thorough=context.get_local_rank() == 0)
    is_first = context.get_local_rank() == 0
    node = f"{context.get_node_rank()}/" if context.get_world_size() > context.get_local_world_size() else ""
    gpu = context.get_local_rank() if config.cluster.gpus_per_worker else None
    switches = (attempt.pause, attempt.stop) if context.get_world_rank() == 0 else ()
    watch = StopWatch(switches, attempt.pause, attempt.lease, ray.get_runtime_context().get_node_id())
    hooks = WorkerHooks(watch, SystemMetrics(node, str(storage.root), is_first, gpu))
    try:
        metrics = train(config, storage.folder("prepare", attempt.prepare), run_folder, hooks, storage)
    except TrainingStopped as stopped:
        # returned, since an error would have Ray Train start over
        ray.train.report({STOPPED: float(stopped.step)})
        return {"stopped_at": stopped.step}
    finally:
        watch.close()
    return {name: [metric.value, metric.unit] for name, metric in metrics.items()}


def fit(work: Work) -> dict[str, Metric]:
    """Train on the cluster to the end, with as many restarts as allowed; returns the metrics of the finished run.

    Raises:
        RunStopped: training was asked to stop, or a node is drained and the others have no room. A checkpoint is there.
        ConfigError, ArtefactError, ClusterError: the error that ended the workers or kept them from starting.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    stop = work.stop or StopSwitch.make()
    pipeline = work.pipeline.metrics_ref if work.pipeline else None
    with Lease(f"{storage_id(work.config.storage)}/{work.fingerprint}") as lease:
        while True:
            log_missing(work.run, work.folder, pipeline)
            pause = StopSwitch.make()
            attempt = Attempt(
                config=work.config,
                prepare=work.parents["prepare"].fingerprint,
                pretrain=work.fingerprint,
                lease=lease,
                pause=pause,
                stop=stop,
            )
            try:
                result: Any = _trainer(work, attempt).fit()
            except TrainingFailedError as error:
                raise as_ours(error) from error
            log_missing(work.run, work.folder, pipeline)
            if "stopped_at" not in result.return_value:
                return {name: Metric(value, unit) for name, (value, unit) in result.return_value.items()}
            step = result.return_value["stopped_at"]
            if reason := stop.reason():
                raise RunStopped(f"training stopped after step {step} ({reason}); the same command continues there")
            if not any(place(work.config.cluster, size, own_resources()) for size in sizes(work.config)):
                raise RunStopped(
                    f"training stopped after step {step} ({pause.reason()}), and the other nodes have no room for "
                    "it; run the same command again when they have, it continues there"
                )
            print(f"pretrain: stopped after step {step} ({pause.reason()}), going on at once", flush=True)


def _trainer(work: Work, attempt: Attempt) -> Trainer:
    """Ray Train's trainer for one attempt."""
    pipeline = work.pipeline.metrics_ref if work.pipeline else None
    cluster = work.config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    scaling = ScalingConfig(
        num_workers=cluster.num_workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
    )
    return Trainer(
        lambda: worker_loop(attempt),
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=math.ceil(cluster.collective_timeout_s)
        ),
        scaling_config=scaling,
        run_config=RayRunConfig(
            name=work.fingerprint[:16],
            storage_path=join(work.storage.uri, "ray_train"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # of Train v2
            ),
            callbacks=[MetricsToTracker(work.run.metrics_ref, pipeline)],  # type: ignore[list-item]  # of Train v2
        ),
        placement=Placement(scaling, work.config, attempt.pause),  # type: ignore[arg-type]  # of Train v2
    )


def as_ours(error: TrainingFailedError) -> Exception:
    """The most informative of the errors that ended training, as one of this project's kinds."""
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        return cause if isinstance(cause, ClusterError) else ClusterError(f"Ray Train gave up: {cause}")
    assert isinstance(error, WorkerGroupError)
    failures = sorted(error.worker_failures.items())
    # where one rank raised one of these, the others saw it vanish from a collective
    for kind in (ConfigError, ArtefactError):
        for _, failure in failures:
            if isinstance(failure, kind):
                return failure
    rank, failure = failures[0]
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or ["without a message"]
    return ArtefactError(f"training failed on rank {rank}: {type(failure).__name__}: {lines[0]}")
