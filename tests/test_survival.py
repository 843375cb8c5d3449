"""Training survives: whatever fails, the curve ends as that of a run left alone, in one MLflow run, each step once."""

import contextlib
import io
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from survival import ROOT, STEPS, Driver, Server, checkpoints, command, curve, runs, states, wait_until, workers

from jobs import local
from pipelines import local_cluster
from pipelines.curves import CURVES
from pipelines.local_jobs import Job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FINISHED = {"quickstart": "FINISHED", "prepare": "FINISHED", "pretrain": "FINISHED"}
KILLED = {"quickstart": "KILLED", "prepare": "FINISHED", "pretrain": "KILLED"}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a run that nothing happened to."""
    storage = tmp_path_factory.mktemp("undisturbed")
    driver = Driver(ray_cluster, storage)
    assert driver.wait() == 0, driver.output
    assert [step for step, _ in curve(storage)] == list(range(1, STEPS + 1))
    assert states(storage) == FINISHED
    return storage


@pytest.fixture
def storage(undisturbed: Path, tmp_path: Path) -> Path:
    """A storage with the data prepared and nothing else."""
    shutil.copytree(undisturbed / "prepare", tmp_path / "storage" / "prepare")
    return tmp_path / "storage"


def assert_the_pipeline_has_the_curves(storage: Path, uri: str | None = None) -> None:
    """No step lacks in the pipeline's own run, and none is there twice."""
    for metric in CURVES:
        assert curve(storage, metric, uri, name="quickstart") == curve(storage, metric, uri), metric


def assert_as_undisturbed(storage: Path, undisturbed: Path, run_id: str | None = None) -> None:
    """Bit for bit: the same number of workers adds the same numbers in the same order."""
    assert curve(storage) == curve(undisturbed)
    assert curve(storage, "validation_loss") == curve(undisturbed, "validation_loss")
    assert_the_pipeline_has_the_curves(storage)
    assert states(storage) == FINISHED
    assert run_id is None or runs(storage)["pretrain"].info.run_id == run_id


def test_the_controller_logs_what_workers_and_machines_do(undisturbed: Path) -> None:
    promised = "loss learning_rate grad_norm tokens_per_second tokens_per_second_per_device mfu peak_memory_bytes "
    promised += "seconds_in_data seconds_in_checkpoint seconds_in_communication skipped_steps validation_loss "
    promised += "validation_perplexity system/cpu_utilization_percentage system/system_memory_usage_percentage"
    assert {*promised.split()} <= runs(undisturbed)["pretrain"].data.metrics.keys()


def test_sigterm_leaves_a_checkpoint_of_that_step_and_the_command_goes_on_there(
    ray_cluster: str, storage: Path, undisturbed: Path
) -> None:
    settings = {"train__checkpoint_every": 1000}  # none but on notice, and the last
    first = Driver(ray_cluster, storage, **settings)
    first.wait_for_step(23)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 130, first.output
    [*_, stopped_at] = checkpoints(storage)
    assert first.steps[-1] <= stopped_at < STEPS, first.output
    assert states(storage) == KILLED
    run_id = runs(storage)["pretrain"].info.run_id
    assert curve(storage)[-1][0] == stopped_at
    second = Driver(ray_cluster, storage, **settings)
    assert second.wait() == 0, second.output
    assert second.steps[0] == stopped_at + 1
    assert_as_undisturbed(storage, undisturbed, run_id)


def test_a_killed_worker_is_replaced(ray_cluster: str, storage: Path, undisturbed: Path) -> None:
    """A report counts the steps since the one before, also where a checkpoint and a new group lie between."""
    driver = Driver(ray_cluster, storage, train__log_every=3)
    driver.wait_for_step(24)
    workers()[0].kill()
    assert curve(storage)[-1][0] < STEPS, "it must have had work left"
    assert driver.wait() == 0, driver.output
    reported = sorted({*range(3, STEPS + 1, 3), *range(20, STEPS + 1, 20)})
    assert driver.steps.count(3) == 1, "it must have gone on from a checkpoint"
    losses = dict(curve(undisturbed))
    means = [
        sum(losses[step] for step in range(before + 1, done + 1)) / (done - before)
        for before, done in pairwise([0, *reported])
    ]
    assert [step for step, _ in curve(storage)] == reported
    assert [loss for _, loss in curve(storage)] == pytest.approx(means, rel=1e-12)
    assert curve(storage, "validation_loss") == curve(undisturbed, "validation_loss")
    assert states(storage) == FINISHED


def test_a_killed_driver_leaves_nobody_behind_and_is_continued(
    ray_cluster: str, storage: Path, undisturbed: Path
) -> None:
    first = Driver(ray_cluster, storage)
    first.wait_for_step(25)
    run_id = runs(storage)["pretrain"].info.run_id
    orphans = workers()
    first.process.kill()
    first.wait()
    second = Driver(ray_cluster, storage)
    assert second.wait() == 0, second.output
    assert not any(orphan.is_running() for orphan in orphans)
    assert second.steps[0] in range(21, STEPS, 20)
    assert_as_undisturbed(storage, undisturbed, run_id)


def test_the_same_training_twice_at_once_is_refused(ray_cluster: str, storage: Path, undisturbed: Path) -> None:
    settings = {"cluster__num_workers": 1, "train__steps": 300}
    first = Driver(ray_cluster, storage, **settings)
    first.wait_for_step(1)
    second = Driver(ray_cluster, storage, **settings)
    assert second.wait() == 1
    assert "this very training runs already" in second.output
    assert first.wait() == 0, first.output
    assert [step for step, _ in curve(storage)] == list(range(1, 301))


def test_training_goes_on_without_its_tracking_server(
    ray_cluster: str, storage: Path, undisturbed: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    server = Server(tmp_path, free_port())
    try:
        driver = Driver(ray_cluster, storage, {"MLFLOW_TRACKING_URI": server.uri}, train__steps=200)
        driver.wait_for_step(10)
        server.stop()
        away_at = driver.steps[-1]
        driver.wait_for_step(away_at + 30)
        server.start()
        assert driver.wait() == 0, driver.output
        assert [step for step, _ in curve(storage, uri=server.uri)] == list(range(1, 201))
        assert_the_pipeline_has_the_curves(storage, server.uri)
        assert states(storage, server.uri) == FINISHED
    finally:
        server.stop()


def test_a_stopped_job_leaves_a_checkpoint(storage: Path, undisturbed: Path, tmp_path: Path) -> None:
    """`ray job stop`: SIGTERM to the driver, and SIGKILL after the time that the cluster gives."""
    head = local_cluster.start(str(tmp_path), lambda message: None)
    try:
        job = Job(head, "stopped")
        job.submit(["python", *command(storage, train__steps=300)], working_dir=ROOT, excludes=local.excludes(ROOT))
        wait_until(lambda: checkpoints(storage) != [])
        job.stop()
        out = io.StringIO()
        assert job.follow(out)["status"] == "STOPPED"
        assert "stopping after a checkpoint" in out.getvalue()
        wait_until(lambda: states(storage) == KILLED)  # Ray calls the job stopped while its driver still ends its runs
        [*_, stopped_at] = checkpoints(storage)
        assert curve(storage)[-1][0] == stopped_at > 20
    finally:
        local_cluster.stop(str(tmp_path), lambda message: None)


def test_a_stuck_rank_is_named(ray_cluster: str, storage: Path, undisturbed: Path) -> None:
    settings = {"cluster__collective_timeout_s": 5, "cluster__max_failures": 0}
    driver = Driver(ray_cluster, storage, **settings)
    driver.wait_for_step(5)
    stuck = workers()[1]
    stuck.suspend()
    try:
        assert driver.wait() == 1, driver.output
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray has ended it
            stuck.resume()
    error = driver.output.strip().splitlines()[-1]
    assert "rank 0" in error or "rank 1" in error, error
    found = runs(storage)
    assert found["pretrain"].info.status == found["quickstart"].info.status == "FAILED"
    assert found["pretrain"].data.tags["kraken.error"].partition(": ")[2][:60] in error
    again = Driver(ray_cluster, storage, **settings)
    assert again.wait() == 0, again.output
    assert_as_undisturbed(storage, undisturbed)
