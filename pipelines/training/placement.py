"""Placement of training workers: way groups inside a node, as few nodes as possible, sizes that divide the batch.

Pure functions of the nodes' resources. The caller passes either everything that a node owns or what is free on it.
"""

from collections.abc import Mapping

from kraken.config import ClusterConfig, RunConfig

Resources = Mapping[str, float]
"""Ray's name of a resource -> amount."""

ROUNDING = 1e-6
"""Ray counts in ten-thousandths, so that 2 CPUs may be 1.9999."""


def per_worker(cluster: ClusterConfig) -> dict[str, tuple[str, int]]:
    """Ray's name of a resource -> its setting and how much of it a worker needs."""
    needs = {
        "CPU": ("cluster.cpus_per_worker", cluster.cpus_per_worker),
        "GPU": ("cluster.gpus_per_worker", cluster.gpus_per_worker),
    }
    return {name: need for name, need in needs.items() if need[1]}


def room(cluster: ClusterConfig, resources: Resources) -> int:
    """Workers that a node with these resources has room for."""
    needs = per_worker(cluster).items()
    return int(min((resources.get(name, 0.0) + ROUNDING) // amount for name, (_, amount) in needs))


def sizes(config: RunConfig) -> list[int]:
    """Numbers of workers that training may run with, the largest first.

    A lost node shrinks the replicate axis only: every size is a multiple of shard_size times way_size, and divides the
    step's batch among its data ranks.
    """
    cluster = config.cluster
    group = cluster.shard_size * cluster.way_size
    smallest = cluster.min_workers or cluster.num_workers
    return [
        size
        for size in range(cluster.num_workers, smallest - 1, -group)
        if config.train.sequences_per_step % (size // cluster.way_size) == 0
    ]


def place(cluster: ClusterConfig, num_workers: int, nodes: Mapping[str, Resources]) -> list[str] | None:
    """A node for each worker, in the order of their ranks; None where the nodes have no room for them.

    Ways stay inside a node, and so do shards where any nodes allow it; replicas are what may lie apart.

    Args:
        nodes: id -> resources.
    """
    rooms = {node: room(cluster, resources) for node, resources in nodes.items()}
    for unit in (cluster.way_size * cluster.shard_size, cluster.way_size):
        places: list[str] = []
        for node in sorted(rooms, key=lambda node: (-rooms[node], node)):
            places += [node] * min(rooms[node] // unit * unit, num_workers - len(places))
        if len(places) == num_workers:
            return places
    return None
