"""Before any worker starts: whether the cluster can do the training that is asked of it. A verdict within a minute.

Sizes, memory and storage are checked here, so that what would fail or wait hours later is said at once.
"""

import logging
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kraken.config import ClusterConfig, ConfigError, RunConfig
from kraken.storage import Storage, is_remote
from pipelines import memory
from pipelines.errors import ClusterError
from pipelines.ray_internals import available_resources_per_node
from pipelines.training.placement import Resources, per_worker, place, room, sizes

logger = logging.getLogger(__name__)

LIMIT_S = 10.0
"""How long resources that others hold are waited for."""
LOOK_LIMIT_S = 60.0
"""How long a node may take to answer. A node's first task fetches the code and imports the libraries, which takes more
than ten seconds from a slow disk or on a busy machine."""
SHARE_LIMIT_S = 2.0
"""Longest delay with which a shared folder shows on one node what another has written."""


def check(config: RunConfig, limit_s: float = LIMIT_S, look_limit_s: float = LOOK_LIMIT_S) -> None:
    """Check that training can run: its workers will get their resources, fit into memory and share the storage.

    Raises:
        ConfigError: the cluster is too small, or the storage is not shared.
        ClusterError: it is large enough, but others still hold its resources after `limit_s`, or a node does not
            answer within `look_limit_s`.
    """
    nodes = _nodes()
    require_size(config.cluster, {node: record["Resources"] for node, record in nodes.items()})
    hosts = {node: record for node, record in nodes.items() if room(config.cluster, record["Resources"])}
    _require_memory(config, hosts, look_at(config, hosts, look_limit_s))
    _wait_until_free(config, time.monotonic() + limit_s)


# Size


def require_size(cluster: ClusterConfig, nodes: dict[str, Resources]) -> None:
    """Compare what the workers need with what the nodes have, free or not."""
    needs = per_worker(cluster)
    for name, (setting, amount) in needs.items():
        have = [node[name] for node in nodes.values() if node.get(name)]
        if cluster.num_workers * amount > sum(have):
            raise ConfigError(
                f"training needs {cluster.num_workers * amount} {name}s "
                f"(cluster.num_workers={cluster.num_workers} x {setting}={amount}), the cluster has {sum(have):g}; "
                "lower one of the two, or add nodes"
            )
    rooms = [room(cluster, resources) for resources in nodes.values()]
    each = " and ".join(f"{amount} {name}s" for name, (_, amount) in needs.items())
    if sum(rooms) < cluster.num_workers:
        raise ConfigError(
            f"cluster.num_workers={cluster.num_workers} need {each} each on one node, and the nodes have room for "
            f"{sum(rooms)}; lower cluster.cpus_per_worker or cluster.num_workers, or add larger nodes"
        )
    if place(cluster, cluster.num_workers, nodes) is None:
        way, name = cluster.way_size, "GPU" if "GPU" in needs else "CPU"
        amounts = sorted((node[name] for node in nodes.values() if node.get(name)), reverse=True)
        parts = " + ".join(f"{amount:g}" for amount in amounts)
        raise ConfigError(
            f"training needs {way * needs[name][1]} {name}s in one node for cluster.way_size={way}, for each of "
            f"{cluster.num_workers // way} groups that share a model, and the cluster has {parts} (room for "
            f"{' + '.join(str(count) for count in sorted(rooms, reverse=True))} workers); lower cluster.way_size or "
            "cluster.num_workers, or add larger nodes"
        )


# Memory and storage, seen from the nodes


def look_at(config: RunConfig, nodes: dict[str, Any], limit_s: float) -> dict[str, int]:
    """Node -> memory in bytes of its smallest GPU, 0 without one; proves on the way that the nodes share the storage.

    Raises:
        ConfigError: a node does not see what we write, or cannot write what we see.
        ClusterError: a node does not answer within the limit.
    """
    probe = Probe(config.storage, uuid.uuid4().hex)
    try:
        probe.write("driver")
    except OSError as error:
        raise ConfigError(f"storage={config.storage} cannot be written ({error}); choose another --storage") from error
    try:
        looks = {
            node: ray.remote(num_cpus=0, max_retries=0)(_look)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), name="preflight")
            .remote(probe, node)
            for node in nodes
        }
        done, late = ray.wait(list(looks.values()), num_returns=len(looks), timeout=max(0.5, limit_s))
        for reference in late:
            ray.cancel(reference, force=True)
        found: dict[str, int] = {}
        for node, reference in looks.items():
            name = _name(nodes[node])
            if reference not in done:
                raise ClusterError(
                    f"{name} did not answer within the preflight's {limit_s:.0f} s; look at its Ray logs, or remove it "
                    "from the cluster, then run again"
                )
            try:
                why, found[node] = ray.get(reference)
            except ray.exceptions.RayError as failure:
                reason = str(getattr(failure, "cause", None) or failure).strip().splitlines()[-1]
                raise ClusterError(f"{name} cannot run the preflight's task: {reason}") from failure
            why = why or ("" if probe.sees(node) else "what it writes there does not arrive here")
            if why:
                raise ConfigError(
                    f"storage={config.storage} is not shared with {name}: {why}; give a folder that every node "
                    "mounts under this path, or a URI such as s3://bucket/prefix"
                )
        return found
    finally:
        probe.remove()


class Probe:
    """Small files in the storage that show who sees whose.

    Args:
        name: unique, so that nobody takes another's probe for his own.
    """

    def __init__(self, storage: str, name: str):
        self._storage, self._name = storage, name

    def write(self, author: str) -> None:
        """Leave a file; OSError where that is not possible."""
        storage, path = self._open(author)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(author)
        storage.publish_files([path])

    def sees(self, author: str) -> bool:
        """Whether an author's file is to be seen from here, where a shared folder may show it a moment later."""
        storage, path = self._open(author)
        deadline = time.monotonic() + SHARE_LIMIT_S
        while True:
            if path in storage.remote_files(path.parent) if is_remote(self._storage) else path.is_file():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def remove(self) -> None:
        """Delete all of them."""
        storage, path = self._open("")
        shutil.rmtree(path.parent, ignore_errors=True)
        storage.prune(path.parent)

    def _open(self, author: str) -> tuple[Storage, Path]:
        storage = Storage(self._storage)
        return storage, storage.root / ".preflight" / self._name / f"by_{author}"


def _look(probe: Probe, node: str) -> tuple[str, int]:
    """Runs on a node: why it does not share the storage, empty if it does, and the memory of its smallest GPU."""
    try:
        if not probe.sees("driver"):
            return "it does not see what was just written there from here", 0
        probe.write(node)
    except OSError as error:
        return f"it cannot write there ({error})", 0
    return "", memory.of_smallest_gpu()


def _require_memory(config: RunConfig, nodes: dict[str, Any], gpu_bytes: dict[str, int]) -> None:
    """Compare what a worker needs with what the nodes that would hold the workers have."""
    cluster = config.cluster
    places = place(cluster, cluster.num_workers, {node: record["Resources"] for node, record in nodes.items()})
    assert places is not None, "sizes are checked first"
    need = memory.of_worker(config)
    for node in dict.fromkeys(places):
        if cluster.gpus_per_worker:
            have, count, what = gpu_bytes[node], 1, "a GPU"
            if not have:  # without nvidia-smi nobody knows
                continue
        else:
            have, count, what = int(nodes[node]["Resources"].get("memory", 0)), places.count(node), "the node"
        if count * need.total > have:
            of_all = f" x {count} workers" if count > 1 else ""
            raise ConfigError(
                f"a worker needs about {need}{of_all}, and {what} of {_name(nodes[node])} has {have / 2**30:.1f} GiB; "
                f"{memory.way_out(config)}"
            )


# Others


def _wait_until_free(config: RunConfig, deadline: float) -> None:
    """Wait for what others hold, or what a task that just ended has not returned yet."""
    started_at, announced = time.monotonic(), False
    while lacking := _lacking(config):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"training needs {lacking}: other jobs hold the rest; wait for them, or stop one "
                "(`ray job list`, `ray job stop ID`), then run the same command again"
            )
        if time.monotonic() - started_at > 2 and not announced:  # what a task returned shows up within a second or two
            logger.warning("training needs %s; waiting %.0f s for others", lacking, deadline - time.monotonic())
            announced = True
        time.sleep(0.25)


def _lacking(config: RunConfig) -> str:
    """The resources that training needs and that are not free, in words; empty if the fewest workers have room."""
    cluster, free = config.cluster, available_resources_per_node()
    if any(place(cluster, size, free) for size in sizes(config)):
        return ""
    parts = []
    for name, (_, amount) in per_worker(cluster).items():
        have = sum(resources.get(name, 0.0) for resources in free.values())
        parts.append(f"{sizes(config)[-1] * amount} {name}s, {have:g} are free")
    return " and ".join(parts)


def _nodes() -> dict[str, Any]:
    """Id -> Ray's record of every node that lives."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _name(record: dict[str, Any]) -> str:
    here = " (this one)" if record.get("NodeManagerHostname") == os.uname().nodename else ""
    return f"node {record.get('NodeManagerAddress', '')} {record['NodeID'][:8]}{here}"
