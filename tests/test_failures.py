"""What ranks do together when something happens to one of them; processes over gloo."""

import dataclasses
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import find_free_port
from test_parallel import assert_equal_runs, run_config, train_on

import kraken.training.checkpointer
from kraken.checkpoint.history import read_history
from kraken.checkpoint.reader import KINDS, list_checkpoints, newest_checkpoint
from kraken.checkpoint.tensor_files import write_tensors
from kraken.config import RunConfig
from kraken.manifest import ArtefactError
from kraken.training.straggler_detector import LostRanks
from kraken.training.train import NoHooks, TrainingStopped, train

pytestmark = pytest.mark.usefixtures("one_thread")


class Scene(NoHooks):
    """What happens to rank 1: asked to stop after step 4, asleep after step 3, or a full disk at step 3."""

    def __init__(self, kind: str, rank: int):
        self.kind, self.rank, self.step = kind, rank, 0
        self.checkpoints: list[int] = []
        if kind == "full" and rank == 1:
            kraken.training.checkpointer.write_tensors = self.write  # type: ignore[assignment]

    def on_step(self, metrics: dict[str, float]) -> None:
        self.step = int(metrics["step"])
        if self.kind == "asleep" and self.rank == 1 and self.step == 3:
            time.sleep(30)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.checkpoints.append(step)

    def stop_requested(self) -> bool:
        return self.kind == "stop" and self.rank == 1 and self.step >= 4

    def write(self, path: Path, *args: Any) -> Any:
        if "000000003" in str(path):
            raise OSError(28, "No space left on device")
        return write_tensors(path, *args)


def play(rank: int, port: int, kind: str, run: RunConfig, data: Path, folder: Path, results: Any) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": run.cluster.num_workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    scene = Scene(kind, rank)
    outcome = "finished"
    try:
        train(run, data, folder, scene)
    except TrainingStopped as stopped:
        outcome = f"stopped {stopped.step}"
    except LostRanks as lost:
        outcome = f"lost {lost.ranks}: {lost}"
    except ArtefactError as error:
        outcome = f"error {error}"
    results.put((rank, outcome, scene.checkpoints))


def outcomes(kind: str, run: RunConfig, data: Path, folder: Path, wait_for: int) -> dict[int, tuple[str, list[int]]]:
    """Rank -> how its training ended and which checkpoints it was told of; of the first so many ranks to end."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = find_free_port()
    processes = [
        context.Process(target=play, args=(rank, port, kind, run, data, folder, results), daemon=True)
        for rank in range(run.cluster.num_workers)
    ]
    for process in processes:
        process.start()
    ended = [results.get(timeout=300) for _ in range(wait_for)]
    for process in processes:
        process.terminate()
        process.join()
    return {rank: (outcome, checkpoints) for rank, outcome, checkpoints in ended}


@pytest.mark.slow
def test_all_ranks_stop_when_one_is_asked_to(data: Path, tmp_path: Path) -> None:
    """At one step, with a checkpoint of it, from which one process goes on to the undisturbed run's end."""
    run = run_config(2, way=2)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, checkpoint_every=3))
    ended = outcomes("stop", run, data, tmp_path / "stopped", wait_for=2)
    assert ended[0] == ended[1] == ("stopped 5", [3, 5])
    train(run_config(), data, tmp_path / "stopped")
    train(run_config(), data, tmp_path / "whole")
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole", steps=(10,))


@pytest.mark.slow
def test_one_rank_without_room_fails_a_checkpoint_for_all(data: Path, tmp_path: Path) -> None:
    run = run_config(2, shard=2)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, checkpoint_every=3))
    ended = outcomes("full", run, data, tmp_path, wait_for=2)
    assert ended[0] == ended[1] == ("finished", [6, 9, 10])
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:09d}" for step in (6, 9, 10)]
    assert read_history(tmp_path)[-1]["failed_checkpoints"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"num_workers": 3}, {"num_workers": 2, "way_size": 2}])
def test_ranks_name_the_one_that_they_waited_for(mesh: dict[str, int], data: Path, tmp_path: Path) -> None:
    run = run_config()
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, sequences_per_step=6),
        cluster=dataclasses.replace(run.cluster, **mesh, collective_timeout_s=5.0),
    )
    count = mesh["num_workers"] - 1
    ended = outcomes("asleep", run, data, tmp_path, wait_for=count)
    assert sorted(ended) == [rank for rank in range(count + 1) if rank != 1]
    for rank, (outcome, _) in ended.items():
        assert outcome.startswith(f"lost (1,): rank {rank} has finished step 3 and waited in vain for rank 1"), outcome
        assert "collective_timeout_s=5" in outcome


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"way": 2}, {"shard": 2}])
def test_bfloat16_on_a_mesh_agrees_in_loss(mesh: dict[str, int], data: Path, tmp_path: Path) -> None:
    """bf16 rounds sums in another order there; the curves stay within one percent of one process's, bf16 or float32."""

    def precise(run: RunConfig, precision: Any) -> RunConfig:
        return dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision))

    train(precise(run_config(), "bfloat16"), data, tmp_path / "alone")
    train(precise(run_config(), "float32"), data, tmp_path / "float32")
    train_on(precise(run_config(2, **mesh), "bfloat16"), data, tmp_path / "two")
    two = [report["loss"] for report in read_history(tmp_path / "two")]
    for reference in ("alone", "float32"):
        assert two == pytest.approx([report["loss"] for report in read_history(tmp_path / reference)], rel=0.01)
    newest = newest_checkpoint(tmp_path / "two")
    assert newest is not None
    assert {x.dtype for kind in KINDS for n, x in tiny.whole(newest, kind).items() if n != "progress"} == {
        torch.float32
    }
