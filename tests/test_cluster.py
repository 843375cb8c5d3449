"""What is asked of a cluster. Connecting is in test_local_cluster.py, what is refused in test_preflight.py."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from kraken.config import ConfigError, RunConfig
from kraken.presets import quickstart
from pipelines import cluster
from pipelines.errors import ClusterError

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}


def config(**changes: Any) -> RunConfig:
    run = quickstart()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, sequences_per_step=8))
    return dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, **changes))


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    monkeypatch.setattr(cluster, "_nodes", lambda: list(resources))


def test_stages_ask_for_what_a_node_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, SMALL)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
    monkeypatch.setattr(cluster, "head_node", lambda: {"NodeID": "1" * 56})
    asked = {kind: cluster.stage_resources(config(), kind) for kind in ("prepare", "pretrain", "convert", "deploy")}
    for kind in ("prepare", "pretrain"):  # the driver's node, which is lost with the driver only
        assert asked[kind].pop("scheduling_strategy").node_id == "0" * 56
    assert asked["deploy"].pop("scheduling_strategy").node_id == "1" * 56, "Serve's proxy listens on the head"
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
