"""What is refused before any worker starts: a cluster too small, too little memory, a storage that is not shared."""

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import strange_nodes
import tiny
import torch

from kraken.config import ConfigError, RunConfig
from kraken.model import Kraken
from kraken.presets import kraken_760m_4way, quickstart
from pipelines import memory, preflight
from pipelines.errors import ClusterError
from pipelines.preflight import Probe
from pipelines.training.placement import place, sizes

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}


def config(base: RunConfig | None = None, **changes: Any) -> RunConfig:
    run = base or quickstart()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, sequences_per_step=48))
    return dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, **changes))


def named(*resources: dict[str, float]) -> dict[str, dict[str, float]]:
    return {f"node{index}": node for index, node in enumerate(resources)}


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
            r"needs 4 CPUs in one node for cluster.way_size=4, .* the cluster has 2 \+ 2 ",
        ),
        (
            {"num_workers": 8, "way_size": 4, "gpus_per_worker": 1},
            [{"CPU": 8.0, "GPU": 6.0}, {"CPU": 8.0, "GPU": 2.0}],
            r"needs 4 GPUs in one node for cluster.way_size=4, .* the cluster has 6 \+ 2 \(room for 6 \+ 2 workers\)",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    changes: dict[str, int], resources: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.require_size(config(**changes).cluster, named(*resources))


def test_a_cluster_that_fits_passes() -> None:
    preflight.require_size(config().cluster, named(SMALL))
    preflight.require_size(config(num_workers=4, cpus_per_worker=4, gpus_per_worker=1).cluster, named(SMALL, LARGE))


class TestPlacement:
    def test_ways_are_never_divided(self) -> None:
        cluster = config(num_workers=4, way_size=2).cluster
        places = place(cluster, 4, {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}})
        assert places == ["a", "a", "b", "b"]
        assert place(cluster, 4, {"a": {"CPU": 3.0}, "b": {"CPU": 1.0}}) is None

    def test_shards_stay_together_where_that_is_possible(self) -> None:
        cluster = config(num_workers=8, way_size=2, shard_size=2).cluster
        assert place(cluster, 8, {"a": {"CPU": 6.0}, "b": {"CPU": 4.0}}) == ["a"] * 4 + ["b"] * 4
        assert place(cluster, 8, {"a": {"CPU": 6.0}, "b": {"CPU": 3.0}}) == ["a"] * 6 + ["b"] * 2

    def test_as_few_nodes_as_possible(self) -> None:
        assert place(config().cluster, 2, {"a": {"CPU": 1.0}, "b": {"CPU": 2.0}}) == ["b", "b"]

    def test_ray_rounds(self) -> None:
        assert place(config().cluster, 2, {"a": {"CPU": 1.99999999}}) == ["a", "a"]

    def test_sizes_divide_the_batch_and_keep_the_ways(self) -> None:
        assert sizes(config(num_workers=8, way_size=2, min_workers=2)) == [8, 6, 4, 2]
        assert sizes(config(num_workers=8)) == [8]
        # 48 sequences are not divided by 7 or 5
        assert sizes(config(num_workers=8, min_workers=4)) == [8, 6, 4]

    def test_a_smallest_size_that_cannot_be_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"min_workers=3 is no multiple of 2 .* up to cluster.num_workers=4"):
            config(num_workers=4, way_size=2, min_workers=3)
        with pytest.raises(ConfigError, match="is not divisible by the 5 parts that cluster.min_workers=5"):
            config(num_workers=8, min_workers=5)


class TestMemory:
    def test_state_is_what_torch_allocates(self) -> None:
        run = tiny.config()
        model = Kraken(run.model).double()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        need = memory.of_worker(run)
        assert (need.weights, need.gradients, need.optimizer) == (weights, weights, 2 * weights)
        assert torch.float64 == next(model.parameters()).dtype

    def test_ways_and_shards_divide_it(self) -> None:
        whole = memory.of_worker(config(num_workers=4))
        divided = memory.of_worker(config(num_workers=4, way_size=2, shard_size=2))
        assert divided.weights == pytest.approx(whole.weights / 4, abs=1)
        assert divided.activations * 2 == pytest.approx(whole.activations, rel=1e-6)

    def test_a_model_that_does_not_fit_is_refused_with_the_way_out(self) -> None:
        run = config(kraken_760m_4way(), num_workers=1, gpus_per_worker=1)
        record = {"NodeID": "a" * 56, "NodeManagerAddress": "10.0.0.1", "Resources": LARGE}
        message = (
            r"a worker needs about [\d.]+ GiB \(weights 2.8, gradients 2.8, optimizer 5.7, activations [\d.]+\), and "
            r"a GPU of node 10.0.0.1 aaaaaaaa has 8.0 GiB; .*raise cluster.way_size or cluster.shard_size"
        )
        with pytest.raises(ConfigError, match=message):
            preflight._require_memory(run, {"a": record}, {"a": 8 * 2**30})
        preflight._require_memory(run, {"a": record}, {"a": 0})  # nobody knows

    def test_all_workers_of_a_node_share_its_memory(self) -> None:
        run = config(num_workers=2)
        need = memory.of_worker(run).total

        def check(have: float) -> None:
            resources = {"CPU": 2.0, "memory": have}
            record = {"NodeID": "a" * 56, "NodeManagerAddress": "10.0.0.1", "Resources": resources}
            preflight._require_memory(run, {"a": record}, {"a": 0})

        check(2 * need)
        with pytest.raises(ConfigError, match="x 2 workers, and the node of node 10.0.0.1"):
            check(2 * need - 1)

    def test_nvidias_tool_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert memory.of_smallest_gpu() == 40960 * 2**20
        monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
        assert memory.of_smallest_gpu() == 0


class TestStorage:
    def test_a_probe_is_seen_where_the_storage_is_shared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "SHARE_LIMIT_S", 0.0)
        for storage in (str(tmp_path / "local"), (tmp_path / "remote").as_uri()):
            probe = Probe(storage, "probe")
            probe.write("driver")
            assert probe.sees("driver") and not probe.sees("node")
            probe.remove()
            assert not probe.sees("driver")

    def test_a_storage_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=re.escape("cannot be written")):
            preflight.look_at(dataclasses.replace(config(), storage=str(tmp_path / "file" / "below")), {}, 0.0)


def test_a_busy_cluster_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_resources_per_node", lambda: named({"CPU": 1.0}))
    with pytest.raises(ClusterError, match="needs 2 CPUs, 1 are free: other jobs hold the rest"):
        preflight._wait_until_free(config(), time.monotonic() + 0.1)
    preflight._wait_until_free(config(min_workers=1), time.monotonic() + 0.1)  # begins with what there is


@pytest.mark.ray
class TestNodes:
    def test_a_good_cluster_passes_and_nothing_is_left(self, ray_cluster: str, tmp_path: Path) -> None:
        preflight.check(dataclasses.replace(config(), storage=str(tmp_path)))
        assert list(tmp_path.glob(".preflight/*")) == []

    def test_a_node_may_answer_later_than_busy_resources_are_waited_for(
        self, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first task on a fresh node fetches the code and imports the libraries."""
        monkeypatch.setattr(preflight, "_look", strange_nodes.late)
        preflight.check(dataclasses.replace(config(), storage=str(tmp_path)), limit_s=1.0)

    @pytest.mark.parametrize(
        ("look", "error", "message"),
        [
            (
                strange_nodes.unshared,
                ConfigError,
                r"is not shared with node [\d.]+ \w{8} \(this one\): it does not see",
            ),
            (
                strange_nodes.forgetful,
                ConfigError,
                "what it writes there does not arrive here; give a folder",
            ),
            (strange_nodes.silent, ClusterError, "did not answer within the preflight's 3 s"),
        ],
    )
    def test_a_node_that_does_not_share_the_storage_is_named(
        self,
        ray_cluster: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        look: Any,
        error: type[Exception],
        message: str,
    ) -> None:
        monkeypatch.setattr(preflight, "_look", look)
        look_limit_s = 3.0 if look is strange_nodes.silent else preflight.LOOK_LIMIT_S
        with pytest.raises(error, match=message):
            preflight.check(dataclasses.replace(config(), storage=str(tmp_path)), look_limit_s=look_limit_s)
        assert list(tmp_path.glob(".preflight/*")) == []
