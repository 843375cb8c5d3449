"""Training on three nodes: ways stay together, lost nodes are replaced or done without, notices are heeded."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from survival import STEPS, Driver, Nodes, checkpoints, curve, states, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FINISHED = {"quickstart": "FINISHED", "prepare": "FINISHED", "pretrain": "FINISHED"}


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    cluster = Nodes(*request.param)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a run of two workers that nothing happened to, on one node."""
    storage, cluster = tmp_path_factory.mktemp("undisturbed"), Nodes(2)
    try:
        driver = Driver(cluster.address, storage)
        assert driver.wait() == 0, driver.output
    finally:
        cluster.stop()
    return storage


@pytest.fixture
def storage(undisturbed: Path, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed / "prepare", tmp_path / "storage" / "prepare")
    return tmp_path / "storage"


def of_a_worker(cluster: Nodes) -> int:
    """Index of a node that trains and is not the head."""
    return next(index for index, count in enumerate(cluster.workers()) if count and index)


@pytest.mark.parametrize("nodes", [(1, 1, 1)], indirect=True)
def test_a_lost_node_is_replaced_by_another(nodes: Nodes, storage: Path, undisturbed: Path) -> None:
    driver = Driver(nodes.address, storage)
    driver.wait_for_step(25)
    nodes.do(f"kill {of_a_worker(nodes)}")
    assert curve(storage)[-1][0] < STEPS, "it must have had work left"
    assert driver.wait() == 0, driver.output
    assert driver.steps.count(1) == 1, "it must have gone on from a checkpoint"
    assert curve(storage) == curve(undisturbed)
    assert states(storage) == FINISHED


@pytest.mark.parametrize("nodes", [(1, 1, 1)], indirect=True)
def test_without_another_training_shrinks_and_grows_again(nodes: Nodes, storage: Path, undisturbed: Path) -> None:
    """Three workers, then two, then three: the curve is that of one worker all along, but for the order of sums."""
    steps = 400
    settings = {"train__steps": steps, "train__learning_rate": 1e-4}  # small, since rounding grows with every step
    driver = Driver(nodes.address, storage, cluster__num_workers=3, cluster__min_workers=1, **settings)
    driver.wait_for_step(15)
    assert nodes.workers() == [1, 1, 1]
    nodes.do("kill 2")
    wait_until(lambda: sum(nodes.workers()) == 2 and driver.steps[-1] > 30, driver)
    nodes.do("add 1")
    wait_until(lambda: nodes.workers() == [1, 1, 0, 1], driver)
    assert driver.wait(300) == 0, driver.output
    assert [step for step, _ in curve(storage)] == list(range(1, steps + 1))
    assert states(storage) == FINISHED
    whole = storage.with_name("whole")
    shutil.copytree(storage / "prepare", whole / "prepare")
    other = Driver(nodes.address, whole, cluster__num_workers=1, **settings)
    assert other.wait(300) == 0, other.output
    for metric in ("loss", "validation_loss"):
        ours, theirs = curve(storage, metric), curve(whole, metric)
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-6)


@pytest.mark.parametrize("nodes", [(3, 3)], indirect=True)
def test_ways_stay_inside_a_node(nodes: Nodes, storage: Path) -> None:
    """Four workers fit as 3 + 1, which Ray prefers and which would divide a model; they must lie as 2 + 2."""
    driver = Driver(nodes.address, storage, cluster__num_workers=4, cluster__way_size=2)
    driver.wait_for_step(3)
    assert nodes.workers() == [2, 2]
    assert driver.wait() == 0, driver.output


@pytest.mark.parametrize("nodes", [(1, 1, 1)], indirect=True)
def test_a_notice_makes_a_checkpoint_and_training_moves(nodes: Nodes, storage: Path, undisturbed: Path) -> None:
    driver = Driver(nodes.address, storage, train__checkpoint_every=1000)  # none but on notice, and the last
    driver.wait_for_step(13)
    leaving = of_a_worker(nodes)
    drain(nodes, leaving)
    assert driver.wait() == 0, driver.output
    found = re.search(r"stopped after step (\d+) \(node \w+ is being drained\), going on at once", driver.output)
    assert found and 13 <= int(found[1]) < STEPS, driver.output
    assert curve(storage) == curve(undisturbed)
    assert states(storage) == FINISHED


@pytest.mark.parametrize("nodes", [(1, 1)], indirect=True)
def test_a_notice_without_another_node_ends_the_run_as_killed(nodes: Nodes, storage: Path, undisturbed: Path) -> None:
    driver = Driver(nodes.address, storage)
    driver.wait_for_step(13)
    drain(nodes, 1)
    assert driver.wait() == 1, driver.output
    assert "the other nodes have no room for it; run the same command again" in driver.output
    assert states(storage) == {**FINISHED, "quickstart": "KILLED", "pretrain": "KILLED"}
    stopped_at = curve(storage)[-1][0]  # the driver's output may lack what another node's log still holds
    assert checkpoints(storage)[-1] == stopped_at
    nodes.do("add 1")
    again = Driver(nodes.address, storage)
    assert again.wait() == 0, again.output
    assert again.steps[0] == stopped_at + 1
    assert curve(storage) == curve(undisturbed)


def drain(nodes: Nodes, index: int) -> None:
    """What a cloud's agent does when it is told that it will lose a machine."""
    arguments = ["--node-id", nodes.ids[index], "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    arguments += ["--reason-message", "spot", "--deadline-remaining-seconds", "120"]
    ray = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray, "drain-node", "--address", nodes.address, *arguments], check=True, capture_output=True)
