"""Where the next group of workers runs and how many it has, on clusters that are only described."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from kraken.config import RunConfig
from kraken.presets import quickstart
from pipelines.errors import ClusterError
from pipelines.training import restarts
from pipelines.training.restarts import Placement


class Switch:
    """Stands for the switch that asks a running group to make room for a larger one."""

    flipped = ""

    def flip(self, reason: str) -> None:
        self.flipped = reason


class Cluster:
    """Nodes of some CPUs each, of which others hold some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: dict[str, float]):
        self.cpus, self.free, self.now = cpus, dict(cpus), 0.0
        monkeypatch.setattr(restarts, "own_resources", lambda: {node: {"CPU": n} for node, n in self.cpus.items()})
        monkeypatch.setattr(
            restarts, "available_resources_per_node", lambda: {node: {"CPU": n} for node, n in self.free.items()}
        )
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(restarts, "time", clock)


def config(**cluster: Any) -> RunConfig:
    run = quickstart()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, sequences_per_step=24))
    return dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, **cluster))


def placement(monkeypatch: pytest.MonkeyPatch, run: RunConfig, grow: Any = None) -> Placement:
    scaling = ScalingConfig(num_workers=run.cluster.num_workers, resources_per_worker={"CPU": 1})
    policy = Placement(scaling, run, grow or Switch())
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    policy._shared_config = ScalingConfig(num_workers=run.cluster.num_workers)
    return policy


def start(policy: Placement, cluster: Cluster) -> list[str] | None:
    """Nodes of the group that the policy starts, whose room it then holds; None where it waits."""
    decision = policy.make_decision_for_non_running_worker_group()
    if isinstance(decision, NoopDecision):
        return None
    assert isinstance(decision, ResizeDecision)
    labels = policy._shared_config._label_selector_per_worker(decision.num_workers)
    nodes = [label["ray.io/node-id"] for label in labels]
    for node in nodes:
        cluster.free[node] = cluster.free.get(node, 0.0) - 1
    policy.after_controller_state_update(None, RunningState())
    return nodes


def test_a_group_that_failed_restarts_in_its_own_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {"a": 2.0, "b": 1.0})
    policy = placement(monkeypatch, config(num_workers=3))
    assert start(policy, cluster) == ["a", "a", "b"]
    policy.after_controller_state_update(None, RestartingState(training_failed_error=None))
    assert cluster.free == {"a": 0.0, "b": 0.0}
    assert isinstance(policy.make_decision_for_non_running_worker_group(), ResizeDecision)
    policy.after_controller_state_update(None, ReschedulingState(training_failed_error=None))
    # a group that did not start holds nothing, so this room is others'
    assert start(policy, cluster) is None


@pytest.mark.parametrize(("left", "size"), [({"a": 4.0, "b": 2.0}, 6), ({"a": 4.0}, 4), ({"a": 3.0, "b": 3.0}, 4)])
def test_a_lost_node_shrinks_the_group_at_once(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, float], size: int
) -> None:
    cluster = Cluster(monkeypatch, {"a": 4.0, "b": 4.0})
    policy = placement(monkeypatch, config(num_workers=8, min_workers=2, way_size=2))
    nodes = start(policy, cluster)
    assert nodes == ["a"] * 4 + ["b"] * 4
    cluster.cpus = left
    cluster.free = dict.fromkeys(left, 0.0)
    nodes = start(policy, cluster)
    assert nodes is not None and len(nodes) == size
    assert all(nodes.count(node) % 2 == 0 for node in nodes), "ways stay together"


def test_room_that_others_hold_is_waited_for_and_then_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {"a": 2.0, "b": 2.0})
    cluster.free = {"a": 2.0, "b": 0.0}
    policy = placement(monkeypatch, config(num_workers=4, min_workers=2))
    assert start(policy, cluster) is None
    cluster.now = restarts.SETTLE_S + 1
    assert start(policy, cluster) == ["a", "a"]


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {"a": 1.0})
    policy = placement(monkeypatch, config(num_workers=4, min_workers=2, way_size=2))
    assert start(policy, cluster) is None
    cluster.now = restarts.ROOM_LIMIT_S + 1
    with pytest.raises(ClusterError, match=r"2 workers of 1 CPU each, 2 of them .* the nodes have 1 CPU; bring"):
        policy.make_decision_for_non_running_worker_group()


def test_it_grows_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, grow = Cluster(monkeypatch, {"a": 2.0}), Switch()
    policy = placement(monkeypatch, config(num_workers=4, min_workers=2), grow)
    nodes = start(policy, cluster)
    assert nodes == ["a", "a"]

    def look() -> str:
        cluster.now += restarts.GROW_EVERY_S + 1
        state = SimpleNamespace(num_workers=2)
        assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
        return grow.flipped

    assert look() == ""
    cluster.cpus, cluster.free = {"a": 2.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    assert look() == ""
    cluster.cpus, cluster.free = {"a": 2.0, "b": 1.0}, {"a": 0.0, "b": 1.0}
    assert look() == "there is room for more workers"  # for three, which divide 24 sequences
