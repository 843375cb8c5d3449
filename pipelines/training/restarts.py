"""Placement and restarts of Ray Train's worker groups: nodes and size of the next group, or the reason to give up.

Ray Train's own policies place workers wherever there is room and wait for it for ever. Ours keep way groups inside a
node, leave out nodes that are lost or about to be, shrink to a size that the batch divides by, grow again when nodes
come back, and give up after a while. Ray Train takes them through one private method of its trainer.
"""

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from kraken.config import ConfigError, RunConfig
from kraken.manifest import ArtefactError
from pipelines.errors import ClusterError
from pipelines.ray_internals import (
    DefaultFailurePolicy,
    FailureDecision,
    NoopDecision,
    ReschedulingState,
    ResizeDecision,
    RunningState,
    ScalingDecision,
    ScalingPolicy,
    available_resources_per_node,
    draining_nodes,
)
from pipelines.stop import StopSwitch
from pipelines.training.placement import Resources, per_worker, place, sizes

NODE_LABEL = "ray.io/node-id"
ROOM_LIMIT_S = 60.0
"""Longest wait for nodes with enough free resources, after which training ends with an error."""
SETTLE_S = 10.0
"""How long a smaller group waits for a larger one's room, which a group that just ended may not have returned yet."""
PAUSE_S = 0.2
ANSWER_LIMIT_S = 2.0
GROW_EVERY_S = 15.0
"""How often a shrunken group looks for room to grow; growing costs a checkpoint and a restart."""


class Trainer(TorchTrainer):
    """Ray Train's trainer with our policies."""

    def __init__(self, *args: Any, placement: "Placement", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._placement = placement

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = self._placement
        options["failure_policy"] = Restarts(options["failure_policy"].failure_config)
        return super()._initialize_and_run_controller(**options)  # type: ignore[misc]  # of Train v2


class Restarts(DefaultFailurePolicy):
    """Restarts the group after a failure, but not after an error that would come again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            # lost ranks are a kind of ArtefactError, and the one that a new group mends
            kinds = {type(error) for error in training_failed_error.worker_failures.values()}
            if kinds & {ConfigError, ArtefactError}:
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class Placement(ScalingPolicy):
    """Decides size and nodes of each worker group; runs in Ray Train's controller.

    Args:
        grow: flipped when a shrunken group could be larger: its workers then write a checkpoint and return.
    """

    def __init__(self, scaling_config: ScalingConfig, config: RunConfig, grow: StopSwitch):
        super().__init__(scaling_config)
        self._config, self._grow = config, grow
        self._waiting_since: float | None = None
        self._looked_at = time.monotonic()
        self._places: list[str] = []
        self._held: Counter[str] = Counter()

    def after_controller_start(self, train_run_context: Any) -> None:
        super().after_controller_start(train_run_context)
        # the object that the worker group is made from; ours is a copy of it
        self._shared_config = train_run_context.scaling_config

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        # a group that failed keeps its room until the next one starts
        if isinstance(current_state, RunningState):
            self._held = Counter(self._places)
        elif isinstance(current_state, ReschedulingState):
            self._held = Counter()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._config.cluster.num_workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        waited_s = now - self._waiting_since
        if places := self._choose(settled=waited_s > SETTLE_S):
            self._waiting_since, self._looked_at = None, time.monotonic()
            return self._resize(places)
        if waited_s > ROOM_LIMIT_S:
            raise ClusterError(no_room(self._config, own_resources()))
        time.sleep(PAUSE_S)  # Ray Train asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        num_workers = worker_group_state.num_workers
        now = time.monotonic()
        if num_workers < self._config.cluster.num_workers and now - self._looked_at > GROW_EVERY_S:
            self._looked_at = now
            room = self._room(own_resources())
            if any(place(self._config.cluster, size, room) for size in sizes(self._config) if size > num_workers):
                self._grow.flip("there is room for more workers")
        return NoopDecision()

    def _choose(self, settled: bool) -> list[str] | None:
        """Nodes of the largest group that has room now; before things have settled, only the largest there could be."""
        owned = own_resources()
        room = self._room(owned)
        for size in sizes(self._config):
            if places := place(self._config.cluster, size, room):
                return places
            if not settled and place(self._config.cluster, size, owned):
                return None  # its room is there, and not free yet
        return None

    def _resize(self, places: list[str]) -> ResizeDecision:
        # bundles are placed by label; workers get their ranks by node, in the order of the bundles
        labels = [{NODE_LABEL: node} for node in places]
        spare = self._shared_config.max_workers - len(places)
        self._shared_config.label_selector = labels + labels[-1:] * spare
        nodes = len(set(places))
        print(f"pretrain: {len(places)} workers on {nodes} node{'s' if nodes > 1 else ''}", flush=True)
        self._places = places
        return ResizeDecision(
            num_workers=len(places), resources_per_worker=self.scaling_config._resources_per_worker_not_none
        )

    def _room(self, owned: Mapping[str, Resources]) -> dict[str, Resources]:
        """Node -> what a group could have there: what is free, and what the present group holds."""
        free = available_resources_per_node()
        return {
            node: {
                name: min(resources.get(name, 0.0), free.get(node, {}).get(name, 0.0) + self._held[node] * amount)
                for name, (_, amount) in per_worker(self._config.cluster).items()
            }
            for node, resources in owned.items()
        }


def own_resources() -> dict[str, Resources]:
    """Node -> what it has, free or not; of nodes that live, answer and stay."""
    leaving = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return {node["NodeID"]: node["Resources"] for node in nodes if answers(node)}


def answers(node: Mapping[str, Any]) -> bool:
    """Whether a node's Ray can be reached; the cluster itself takes a quarter of a minute to notice that it cannot."""
    with contextlib.suppress(OSError):
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_LIMIT_S).close()
        return True
    return False


def no_room(config: RunConfig, nodes: Mapping[str, Resources]) -> str:
    """The error message for a group that found no room, with the way out."""
    cluster = config.cluster
    smallest = sizes(config)[-1]
    needs = " and ".join(f"{amount} {name}" for name, (_, amount) in per_worker(cluster).items())
    have = " + ".join(
        ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in per_worker(cluster))
        for resources in nodes.values()
    )
    return (
        f"{smallest} workers of {needs} each, {cluster.way_size} of them (cluster.way_size) in one node, found no room "
        f"for {ROOM_LIMIT_S:.0f} s; the nodes have {have or 'nothing'}; bring the lost node back and run the same "
        "command again, which continues, or let training shrink with a lower cluster.min_workers"
    )
