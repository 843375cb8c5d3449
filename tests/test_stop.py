"""Stopping training and the right to do it, on a store that stands for Ray's; with real Ray in test_survival.py."""

import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kraken.config import ConfigError
from kraken.manifest import ArtefactError
from pipelines import lease, stop
from pipelines.errors import ClusterError, RunStopped
from pipelines.lease import Lease, LeaseRef
from pipelines.stop import StopSwitch, StopWatch
from pipelines.tracking import end_status


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    values: dict[str, str] = {}

    def put(key: str, value: str, *, overwrite: bool = True) -> None:
        if overwrite or key not in values:
            values[key] = value

    for module in (lease, stop):
        monkeypatch.setattr(module, "get", lambda key: values.get(key, ""))
        monkeypatch.setattr(module, "put", put)
    monkeypatch.setattr(lease, "delete", lambda key: values.pop(key, None))
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 0.3)
    monkeypatch.setattr(stop, "POLL_S", 0.01)
    monkeypatch.setattr(stop, "draining_nodes", set)
    yield values


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestLease:
    def test_it_is_returned(self, store: dict[str, str]) -> None:
        with Lease("run") as ref:
            assert json.loads(store["lease/run"])["pid"] == os.getpid()
            assert not ref.is_lost()
        assert store == {}
        with Lease("run"):
            pass

    def test_a_living_holder_keeps_it(self, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KRAKEN_SUBMISSION", "job-7")
        with (
            Lease("run") as ref,
            pytest.raises(ClusterError, match=r"runs already, in process \d+ of submission job-7"),
            Lease("run"),
        ):
            raise AssertionError("two hold it")
        assert not ref.is_lost()

    def test_a_dead_holder_loses_it(self, store: dict[str, str]) -> None:
        store["lease/run"] = json.dumps({"holder": "dead", "pid": 1, "submission": "", "count": 7})
        started_at = time.monotonic()
        with Lease("run"):
            assert time.monotonic() - started_at >= lease.DEAD_AFTER_S
            assert LeaseRef("lease/run", "dead").is_lost()

    def test_the_refusal_says_how_to_follow_and_to_stop_the_holder(
        self, store: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KRAKEN_SUBMISSION", "job-7")
        commands = r"follow it with `ray job logs job-7 --follow`, or stop it with `ray job stop job-7`"
        with Lease("run"), pytest.raises(ClusterError, match=commands), Lease("run"):
            raise AssertionError("two hold it")
        monkeypatch.delenv("KRAKEN_SUBMISSION")
        monkeypatch.setattr(lease, "submission", lambda: None)
        without = rf"process {os.getpid()} on .* which no submitted job owns.*kill -INT {os.getpid()}"
        with Lease("run", "comparison"), pytest.raises(ClusterError, match=without), Lease("run", "comparison"):
            raise AssertionError("two hold it")

    def test_of_two_that_come_at_once_one_gets_it(self, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        both = threading.Barrier(2)
        looked: set[str] = set()
        outcomes = []

        def look_together(key: str) -> str:
            value = store.get(key, "")
            name = threading.current_thread().name
            if name.startswith("attempt") and name not in looked:
                looked.add(name)
                both.wait(10)
            return value

        monkeypatch.setattr(lease, "get", look_together)

        def enter() -> None:
            try:
                with Lease("run"):
                    time.sleep(0.2)
                    outcomes.append("held")
            except ClusterError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=enter, name=f"attempt {index}") for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted("held" if outcome == "held" else "refused" for outcome in outcomes) == ["held", "refused"]
        assert any("this very training runs already" in outcome for outcome in outcomes)

    def test_who_lost_it_does_not_take_it_back(self, store: dict[str, str]) -> None:
        with Lease("run") as ref:
            taken = json.dumps({"holder": "other", "pid": 1, "submission": "", "count": 0})
            store["lease/run"] = taken
            time.sleep(0.1)
            assert ref.is_lost()
        assert store == {"lease/run": taken}


class TestStopWatch:
    def watch(self, *switches: StopSwitch, pause: StopSwitch, node: str = "n1") -> StopWatch:
        return StopWatch(switches, pause, LeaseRef("lease/run", "me"), node)

    def test_any_switch_is_seen(self) -> None:
        for chosen in (0, 1):
            switches = StopSwitch.make(), StopSwitch.make()
            watch = self.watch(*switches, pause=switches[0])
            assert not watch.requested
            switches[chosen].flip("because")
            switches[chosen].flip("another reason")
            wait_until(lambda watch=watch: watch.requested)
            watch.close()
            assert [switch.reason() for switch in switches] == ["because" * (i == chosen) for i in (0, 1)]

    def test_a_notice_of_its_own_node_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pause = StopSwitch.make()
        mine, other = self.watch(pause=pause, node="n1"), self.watch(pause=pause, node="n2")
        monkeypatch.setattr(stop, "draining_nodes", lambda: {"n1"})
        wait_until(lambda: mine.requested)
        assert pause.reason() == "node n1 is being drained"
        assert not other.requested
        mine.close()
        other.close()

    def test_a_worker_that_was_replaced_ends(self, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        ended = threading.Event()

        monkeypatch.setattr(stop.os, "_exit", lambda status: ended.set())
        watch = self.watch(pause=StopSwitch.make())
        store["lease/run"] = json.dumps({"holder": "me", "pid": 1, "submission": "", "count": 0})
        assert not ended.wait(0.1)
        store["lease/run"] = json.dumps({"holder": "other", "pid": 1, "submission": "", "count": 0})
        assert ended.wait(10)
        watch.close()

    def test_a_store_that_is_away_for_a_moment_harms_nobody(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def away() -> set[str]:
            raise OSError("no route")

        monkeypatch.setattr(stop, "draining_nodes", away)
        monkeypatch.setattr(stop, "AWAY_S", 0.01)
        watch = self.watch(pause=StopSwitch.make())
        time.sleep(0.1)
        assert watch.is_alive and not watch.requested
        watch.close()
        assert "cannot see whether to stop (no route)" in capsys.readouterr().out


def test_a_run_that_was_stopped_ends_as_killed() -> None:
    assert end_status(RunStopped("asked to")) == "KILLED"
    assert end_status(RuntimeError("no")) == "FAILED"


class TestWorkersErrors:
    """What the user sees and MLflow holds of the errors of a whole group."""

    def error(self, failures: dict[int, Exception]) -> Exception:
        from ray.train.v2.api.exceptions import WorkerGroupError

        from pipelines.training.workers import as_ours

        return as_ours(WorkerGroupError("[Rank 0 Error Snippet]:", failures))

    def test_the_one_that_says_most_is_chosen(self) -> None:
        connection = RuntimeError("Connection closed by peer\nmore")
        lost = ArtefactError("rank 1 did not arrive")
        assert self.error({0: connection, 1: lost}) is lost
        wrong = ConfigError("choose another")
        assert self.error({0: lost, 1: wrong}) is wrong
        assert str(self.error({0: connection})) == (
            "training failed on rank 0: RuntimeError: Connection closed by peer"
        )

    def test_what_would_come_again_is_not_tried_again(self) -> None:
        from ray.train import FailureConfig
        from ray.train.v2._internal.execution.failure_handling import FailureDecision
        from ray.train.v2.api.exceptions import WorkerGroupError

        from kraken.training.straggler_detector import LostRanks
        from pipelines.training.restarts import Restarts

        def decide(error: Exception) -> FailureDecision:
            return Restarts(FailureConfig(max_failures=1)).make_decision(WorkerGroupError("", {0: error}))

        assert decide(RuntimeError("killed")) == FailureDecision.RETRY
        assert decide(LostRanks("rank 1 did not arrive", (1,))) == FailureDecision.RETRY
        assert decide(ArtefactError("loss is not finite")) == FailureDecision.RAISE
        assert decide(ConfigError("choose another")) == FailureDecision.RAISE


class TestMetrics:
    def test_ranks_are_one_report(self) -> None:
        from pipelines.training.metrics import merge

        reports = [
            {"step": 3.0, "loss": 1.0, "system/0/disk_usage_percentage": 7.0},
            {"step": 3.0, "loss": 1.0, "system/1/disk_usage_percentage": 8.0},
        ]
        assert merge(reports) == {
            "step": 3.0,
            "loss": 1.0,
            "system/0/disk_usage_percentage": 7.0,
            "system/1/disk_usage_percentage": 8.0,
        }
