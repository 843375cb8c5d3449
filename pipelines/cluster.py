"""Ray for the pipelines: connecting, resources per stage, and cancelling.

The only caller of `ray.init`.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kraken.config import ConfigError, RunConfig
from kraken.environment import environment
from pipelines import local_cluster, local_head
from pipelines.errors import ClusterError
from pipelines.ray_internals import stay_on_loopback

logger = logging.getLogger(__name__)

HEAD_RESOURCE = "node:__internal_head__"
"""Ray's name of a resource that only the head has."""
T = TypeVar("T")


# Connecting


@contextlib.contextmanager
def connect(config: RunConfig) -> Iterator[None]:
    """A Ray cluster for the duration: the one at hand, else a small one of its own.

    In a submitted job, or wherever RAY_ADDRESS is set, that cluster; else the storage's local cluster if it runs
    (`make run` starts it); else one inside this process, which ends with the block.

    Raises:
        ClusterError: the cluster does not answer, or refuses us.
    """
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        before = signal.getsignal(signal.SIGTERM)
        if address := os.environ.get("RAY_ADDRESS"):
            _require_answer(address)
            _init(f"RAY_ADDRESS={address}")
        elif head := local_cluster.find(config.storage):
            stack.enter_context(environment(head.client_environment()))
            stay_on_loopback()
            _init(f"the local cluster of storage={config.storage}", address=head.address)
        else:
            local_cluster.require_usable_python()
            temp_dir = local_cluster.make_temp_dir(f"embedded:{os.getpid()}:{config.storage}")
            stack.callback(shutil.rmtree, temp_dir, ignore_errors=True)
            stack.callback(local_head.end_below, temp_dir)
            token = local_cluster.write_token(temp_dir / "token")
            variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            stack.enter_context(environment({**local_cluster.RAY_SETTINGS, **variables}))
            stay_on_loopback()
            _init(
                "an embedded cluster",
                address="local",
                num_cpus=local_cluster.count_cpus(),
                object_store_memory=local_cluster.OBJECT_STORE_BYTES,
                include_dashboard=True,  # without it Train cannot return the CPUs of a run that was ended
                dashboard_host="127.0.0.1",
                dashboard_port=local_cluster.free_port(),
                _temp_dir=str(local_head.ray_dir(temp_dir)),
            )
        stack.callback(ray.shutdown)
        # for Ray's own tools, in this process and its children: without it they look for a cluster on this machine,
        # and find another one, or several
        stack.enter_context(environment({"RAY_ADDRESS": ray.get_runtime_context().gcs_address}))
        stack.enter_context(_own_sigterm(before))
        yield


def is_embedded(config: RunConfig) -> bool:
    """Whether `connect` would make a cluster that ends with its block."""
    return not (ray.is_initialized() or os.environ.get("RAY_ADDRESS") or local_cluster.find(config.storage))


def _require_answer(address: str) -> None:
    """Refuse an address at which nothing listens; `ray.init` would try for ten minutes and more."""
    if address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard, where jobs are submitted; put it into RAY_API_SERVER_ADDRESS, or "
            "give RAY_ADDRESS the host:port that `ray start` printed"
        )
    host, separator, port = address.rpartition(":")
    if not separator or "://" in address or not port.isdigit():
        return  # "auto", "local" and Ray Client's addresses are Ray's to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS={address} does not answer ({error.strerror or error}); start that cluster, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from error


def _init(which: str, **options: Any) -> None:
    """Call `ray.init`, and turn its many kinds of errors into a `ClusterError`."""
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ClusterError(
            f"{which} cannot be used: {reason}; check that it runs and that RAY_AUTH_TOKEN_PATH names its token, "
            "or unset RAY_ADDRESS to use this machine alone"
        ) from error


@contextlib.contextmanager
def _own_sigterm(before: Any) -> Iterator[None]:
    """Take SIGTERM back from Ray for the duration.

    Ray's handler prints a C++ stack and sets an alarm that kills the process after 3 s, whatever time it was given to
    end its MLflow runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    rays = signal.signal(signal.SIGTERM, before if callable(before) else _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, rays)


def _exit(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


# Resources


def stage_options(config: RunConfig, kind: str) -> dict[str, Any]:
    """Ray task options for a stage: its environment, what the task itself occupies, and where it runs.

    The environment holds the cluster's address. Ray's own actors below a stage, such as Ray Train's cleaner of
    placement groups, ask for the cluster's state by that variable; without it they search this machine for a cluster,
    and fail where another one runs beside ours. Tasks and actors that a stage starts inherit the environment.
    """
    from serve.unavailable import PROXY_SETTINGS

    # The same for every stage, so that a worker process can run several; Serve's proxy inherits PROXY_SETTINGS.
    variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **PROXY_SETTINGS}
    return {"runtime_env": {"env_vars": variables}, **stage_resources(config, kind)}


def stage_resources(config: RunConfig, kind: str) -> dict[str, Any]:
    """Ray task options for a stage: what the task itself occupies, and where.

    Preparing, pretraining and deployment occupy nothing: they wait for tasks, workers and replicas that have resources
    of their own. Preparing and pretraining stay on the driver's node, so that losing another one does not end them.
    Deployment runs on the head, where Serve's proxy listens: only there is the endpoint's port free or taken, and only
    there does a loopback address reach the endpoint. A task that asks for more than any node has would wait for ever,
    so the largest node bounds it.
    """
    if kind in ("prepare", "pretrain", "deploy"):
        node = head_node()["NodeID"] if kind == "deploy" else ray.get_runtime_context().get_node_id()
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    if kind != "evaluate":
        return {"num_cpus": 1}
    nodes = _nodes()
    cluster = config.cluster
    largest = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    options: dict[str, Any] = {"num_cpus": max(1, min(cluster.num_workers * cluster.cpus_per_worker, largest))}
    has_gpu = any(node.get("GPU", 0.0) >= 1 for node in nodes)
    if config.engine.device != "cpu" and has_gpu:
        # without them Ray hides the GPUs from the task
        on_tensorrt = config.engine.kind == "tensorrt_llm"
        options["num_gpus"] = config.model.num_ways if on_tensorrt else config.engine.num_devices
    return options


def head_node() -> dict[str, Any]:
    """Ray's record of the head, where Serve's proxy listens."""
    return next(node for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"])


def call_on_head(function: Callable[..., T], *args: Any) -> T:
    """Call a function on the head: here where this process runs on the head, else in a task; its error as raised."""
    head = head_node()["NodeID"]
    if ray.get_runtime_context().get_node_id() == head:
        return function(*args)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there, name=function.__name__)
    result: T = result_of(task.remote(*args))
    return result


def result_of(reference: Any) -> Any:
    """A task's result. If the task failed, its error is raised as the task raised it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _nodes() -> list[dict[str, float]]:
    """The resources of every node that lives."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cancel_unfinished(references: Iterable[Any]) -> None:
    """Cancel the tasks that have not ended.

    To cancel a task whose error has just arrived, and is not yet recorded, ends this process with Ray's "tried to
    complete task that was not pending".
    """
    for reference in references:
        if not ray.wait([reference], timeout=0)[0]:
            ray.cancel(reference)
