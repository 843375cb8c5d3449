"""The Ray Train workers of pretraining: what each runs, and how its metrics come back to the controller and MLflow."""

import logging
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from kraken.config import RunConfig, from_dict, to_dict
from kraken.manifest import Metric
from kraken.storage import Storage, is_remote
from kraken.train import Hooks, train
from pipelines.stage import Work
from pipelines.tracking import MetricsRef, StageRun

COLLECTIVE_TIMEOUT_S = 600
"""A worker that waits longer for the others gives up, and the group is restarted."""

CONTROLLER_FAILURES = 2
"""Attempts to start a worker group; Ray's own default never stops trying."""


class WorkerHooks(Hooks):
    """Reports to Ray Train from every rank; what is written, the controller decides."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.is_main = ray.train.get_context().get_world_rank() == 0

    def on_step(self, metrics: dict[str, float]) -> None:
        if self.is_main:
            print(step_line(metrics), flush=True)
        ray.train.report(metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        if self.is_main:
            self.storage.publish(path)


def step_line(metrics: dict[str, float]) -> str:
    """One line of progress."""
    line = (
        f"pretrain: step {metrics['step']:>6.0f} | loss {metrics['loss']:.4f} | "
        f"{metrics['tokens_per_second']:>9,.0f} tokens/s | {metrics['seconds_left']:>5.0f} s left"
    )
    if "validation_loss" in metrics:
        line += f" | validation loss {metrics['validation_loss']:.4f}"
    return line


class MetricsToTracker(UserCallback):
    """Runs in Ray Train's controller: rank 0's metrics go to MLflow, keyed by optimizer step."""

    def __init__(self, ref: MetricsRef):
        self.ref = ref
        self.run: StageRun | None = None  # opened where the callback runs

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Any) -> None:
        self.run = self.run or self.ref.attach()
        values = dict(metrics[0])
        step, seconds_left = int(values.pop("step")), values.pop("seconds_left")
        self.run.log_metrics(values, step)
        if seconds_left == 0.0:  # the controller ends without notice
            self.run.flush()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            print(
                f"pretrain: worker {rank} failed ({type(error).__name__}); restarting from the last checkpoint",
                flush=True,
            )


def worker_loop(loop_config: dict[str, Any]) -> dict[str, list[Any]]:
    """What each Ray Train worker runs."""
    import torch
    from ray.train.v2._internal.execution import context

    # named by its file, which Ray's own log level does not reach; it repeats every report
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    config = from_dict(RunConfig, loop_config["config"])
    torch.set_num_threads(config.cluster.cpus_per_worker)
    storage = Storage(config.storage)
    storage.fetch("prepare", loop_config["prepare"])
    run_folder = storage.folder("pretrain", loop_config["pretrain"])
    storage.fetch_checkpoints(run_folder)
    metrics = train(config, storage.folder("prepare", loop_config["prepare"]), run_folder, WorkerHooks(storage))
    return {name: [metric.value, metric.unit] for name, metric in metrics.items()}


def fit(work: Work) -> dict[str, Metric]:
    """Train on the cluster to the end, with as many restarts as allowed; returns the metrics of the finished run."""
    cluster = work.config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    state = f"{work.storage.uri}/ray_train" if is_remote(work.storage.uri) else str(work.storage.root / "ray_train")
    trainer = TorchTrainer(
        worker_loop,  # type: ignore[arg-type]  # typed for Train v1, which returned nothing
        train_loop_config={
            "config": to_dict(work.config),
            "prepare": work.parents["prepare"].fingerprint,
            "pretrain": work.fingerprint,
        },
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RayRunConfig(
            name=work.fingerprint[:16],
            storage_path=state,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # of Train v2
            ),
            callbacks=[MetricsToTracker(work.run.metrics_ref)],  # type: ignore[list-item]  # of Train v2
        ),
    )
    result: Any = trainer.fit()
    return {name: Metric(value, unit) for name, (value, unit) in result.return_value.items()}
