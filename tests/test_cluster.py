"""What is asked of a cluster, and what is refused before anything waits. Connecting is in test_local_cluster.py."""

import dataclasses
from typing import Any

import pytest

from kraken.config import ConfigError, RunConfig
from kraken.presets import quickstart
from pipelines import cluster
from pipelines.local_cluster import ClusterError

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}


def config(**changes: Any) -> RunConfig:
    run = quickstart()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, sequences_per_step=8))
    return dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, **changes))


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float], free: dict[str, float] | None = None) -> None:
    total = {name: sum(node.get(name, 0.0) for node in resources) for name in ("CPU", "GPU")}
    monkeypatch.setattr(cluster, "_nodes", lambda: list(resources))
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: total if free is None else free)


@pytest.mark.parametrize(
    ("changes", "resources", "message"),
    [
        (
            {"cpus_per_worker": 2},
            [SMALL],
            r"needs 4 CPUs \(cluster.num_workers=2 x cluster.cpus_per_worker=2\).* has 2;",
        ),
        (
            {"gpus_per_worker": 1},
            [SMALL],
            r"needs 2 GPUs \(cluster.num_workers=2 x cluster.gpus_per_worker=1\).* has 0;",
        ),
        ({"cpus_per_worker": 3}, [SMALL, SMALL, SMALL], "need 3 CPUs each on one node, and the nodes have room for 0"),
        ({"cpus_per_worker": 9}, [LARGE, SMALL, SMALL], "room for 1"),
        (
            {"num_workers": 4, "way_size": 4},
            [SMALL, SMALL],
            r"way_size=4 needs 4 workers in one node for each of the 1 groups .* have room for 2 \+ 2",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], resources: list[dict[str, float]], message: str
) -> None:
    nodes(monkeypatch, *resources)
    with pytest.raises(ConfigError, match=message):
        cluster.preflight(config(**changes))


def test_a_cluster_that_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, SMALL)
    cluster.preflight(config())
    nodes(monkeypatch, SMALL, LARGE)
    cluster.preflight(config(num_workers=4, cpus_per_worker=4, gpus_per_worker=1))


def test_a_busy_cluster_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, SMALL, free={"CPU": 1.0})
    with pytest.raises(ClusterError, match="needs 2 CPUs, 1 are free: other jobs hold the rest"):
        cluster.preflight(config(), busy_limit_s=0.1)


def test_stages_ask_for_what_a_node_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, SMALL)
    asked = {kind: cluster.stage_resources(config(), kind) for kind in ("prepare", "pretrain", "convert", "deploy")}
    assert asked == {
        "prepare": {"num_cpus": 0},
        "pretrain": {"num_cpus": 0},  # its workers have their own; a task that held one would starve them
        "convert": {"num_cpus": 1},
        "deploy": {"num_cpus": 0},
    }
    assert cluster.stage_resources(config(num_workers=4), "evaluate") == {"num_cpus": 2}
    nodes(monkeypatch, SMALL, LARGE)
    assert cluster.stage_resources(config(num_workers=4, cpus_per_worker=2), "evaluate") == {
        "num_cpus": 8,
        "num_gpus": 1,
    }
    nodes(monkeypatch, {"CPU": 0.0})
    assert cluster.stage_resources(config(), "evaluate") == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("http://127.0.0.1:8265", ConfigError, "RAY_API_SERVER_ADDRESS"),
        ("127.0.0.1:9", ClusterError, "RAY_ADDRESS=127.0.0.1:9 does not answer"),
    ],
)
def test_a_wrong_address_is_refused_at_once(address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cluster._require_answer(address)
