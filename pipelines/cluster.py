"""Ray for the pipelines: connecting, resources per stage, and a check of the cluster before anything waits for it.

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
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
import ray._raylet
from ray._private import ray_constants

from kraken.config import ClusterConfig, ConfigError, RunConfig
from pipelines import local_cluster
from pipelines.local_cluster import ClusterError

logger = logging.getLogger(__name__)

BUSY_LIMIT_S = 10.0
"""How long `preflight` waits for resources that others hold."""


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
            stack.enter_context(_environment(head.client_environment()))
            _stay_on_loopback()
            _init(f"the local cluster of storage={config.storage}", address=head.address)
        else:
            temp_dir = local_cluster.make_temp_dir(f"embedded:{os.getpid()}:{config.storage}")
            stack.callback(shutil.rmtree, temp_dir, ignore_errors=True)
            token = local_cluster.write_token(temp_dir / "token")
            variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            stack.enter_context(_environment({**local_cluster.RAY_SETTINGS, **variables}))
            _stay_on_loopback()
            _init(
                "an embedded cluster",
                address="local",
                num_cpus=local_cluster.count_cpus(),
                object_store_memory=local_cluster.OBJECT_STORE_BYTES,
                include_dashboard=True,  # without it Train cannot return the CPUs of a run that was ended
                dashboard_host="127.0.0.1",
                dashboard_port=local_cluster.free_port(),
                _temp_dir=str(local_cluster.ray_dir(temp_dir)),
            )
        stack.callback(ray.shutdown)
        stack.enter_context(_own_sigterm(before))
        yield


def _require_answer(address: str) -> None:
    """Refuse an address that nobody listens on; `ray.init` would try for ten minutes and more."""
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
    """`ray.init`, its many errors as one."""
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ClusterError(
            f"{which} cannot be used: {reason}; check that it runs and that RAY_AUTH_TOKEN_PATH names its token, "
            "or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _stay_on_loopback() -> None:
    """Make a Ray that is already imported heed RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 and RAY_AUTH_MODE.

    It read both while it was imported. The first keeps it from replacing 127.0.0.1 by the machine's outward address,
    where the local cluster does not listen.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    raylet: Any = ray._raylet  # compiled, without types
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the duration."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def stage_resources(config: RunConfig, kind: str) -> dict[str, Any]:
    """Ray task options for a stage: what the task itself occupies.

    Preparing, pretraining and deployment occupy nothing: they wait for tasks, workers and replicas that have resources
    of their own. A task that asks for more than any node has would wait for ever, so the largest node bounds it.
    """
    if kind in ("prepare", "pretrain", "deploy"):
        return {"num_cpus": 0}
    if kind != "evaluate":
        return {"num_cpus": 1}
    nodes = _nodes()
    cluster = config.cluster
    largest = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    options: dict[str, Any] = {"num_cpus": max(1, min(cluster.num_workers * cluster.cpus_per_worker, largest))}
    has_gpu = any(node.get("GPU", 0.0) >= 1 for node in nodes)
    if config.engine.device != "cpu" and has_gpu:
        # without them Ray hides the GPUs from the task
        options["num_gpus"] = config.model.num_ways if config.engine.kind == "tensorrt_llm" else 1
    return options


def preflight(config: RunConfig, busy_limit_s: float = BUSY_LIMIT_S) -> None:
    """Check that the training workers will get their resources, rather than let them wait for ever.

    Raises:
        ConfigError: the cluster is too small.
        ClusterError: it is large enough, but others still hold its resources after `busy_limit_s`.
    """
    _check_size(config.cluster, _nodes())
    needed = {name: config.cluster.num_workers * amount for name, (_, amount) in _per_worker(config.cluster).items()}
    started_at = time.monotonic()
    announced = False
    while lacking := _lacking(needed):
        waited_s = time.monotonic() - started_at
        if waited_s > busy_limit_s:
            raise ClusterError(
                f"training needs {lacking}: other jobs hold the rest; wait for them, or stop one "
                "(`ray job list`, `ray job stop ID`), then run the same command again"
            )
        if waited_s > 2 and not announced:  # what a task just returned shows up within a second or two
            logger.warning("training needs %s; waiting up to %.0f s for others", lacking, busy_limit_s)
            announced = True
        time.sleep(0.25)


def _check_size(cluster: ClusterConfig, nodes: list[dict[str, float]]) -> None:
    """Compare what the workers need with what the nodes have, free or not."""
    per_worker = _per_worker(cluster)
    for name, (setting, amount) in per_worker.items():
        total = sum(node.get(name, 0.0) for node in nodes)
        if cluster.num_workers * amount > total:
            raise ConfigError(
                f"training needs {cluster.num_workers * amount} {name}s "
                f"(cluster.num_workers={cluster.num_workers} x {setting}={amount}), the cluster has {total:g}; "
                "lower one of the two, or add nodes"
            )
    places_of = [int(min(node.get(name, 0.0) // amount for name, (_, amount) in per_worker.items())) for node in nodes]
    places = sum(places_of)
    if places < cluster.num_workers:
        each = " and ".join(f"{amount} {name}s" for name, (_, amount) in per_worker.items())
        raise ConfigError(
            f"cluster.num_workers={cluster.num_workers} need {each} each on one node, and the nodes have room for "
            f"{places:g}; lower cluster.cpus_per_worker or cluster.num_workers, or add larger nodes"
        )
    way = cluster.way_size
    if sum(count // way * way for count in places_of) < cluster.num_workers:
        have = " + ".join(str(count) for count in places_of if count)
        raise ConfigError(
            f"cluster.way_size={way} needs {way} workers in one node for each of the "
            f"{cluster.num_workers // way} groups that share a model, and the nodes have room for {have}; lower "
            "cluster.way_size or cluster.num_workers, or add larger nodes"
        )


def _per_worker(cluster: ClusterConfig) -> dict[str, tuple[str, int]]:
    """Ray's name of a resource -> its setting and how much of it a worker needs."""
    needs = {
        "CPU": ("cluster.cpus_per_worker", cluster.cpus_per_worker),
        "GPU": ("cluster.gpus_per_worker", cluster.gpus_per_worker),
    }
    return {name: need for name, need in needs.items() if need[1]}


def _lacking(needed: dict[str, int]) -> str:
    """What is needed and not free, in words; empty when all is."""
    free = ray.available_resources()
    parts = [(amount, name, free.get(name, 0.0)) for name, amount in needed.items() if free.get(name, 0.0) < amount]
    return " and ".join(f"{amount} {name}s, {available:g} are free" for amount, name, available in parts)


def _nodes() -> list[dict[str, float]]:
    """The resources of every node that lives."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
