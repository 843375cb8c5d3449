"""Damaged checkpoints: they are set aside, never take a good one's place, and never cost more than themselves."""

import warnings
from pathlib import Path

import pytest
import tiny

from kraken.checkpoint.folders import list_checkpoints, list_set_aside, newest_checkpoint, step_folder
from kraken.storage import Storage
from kraken.training.train import NoHooks, train

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "model_00000_of_00001.safetensors"


class StopAfter(NoHooks):
    """Ends training right after the checkpoint of a step, as a SIGKILL would."""

    def __init__(self, step: int):
        self.step = step

    def on_checkpoint(self, step: int, path: Path) -> None:
        if step == self.step:
            raise InterruptedError


def steps(folders: list[Path]) -> list[int]:
    return [int(path.name.split("_")[1].split(".")[0]) for path in folders]


def truncate(folder: Path) -> None:
    """`truncate -s 100`."""
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(100)


def flip_a_bit(folder: Path) -> None:
    """Damage that only a hash shows."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("harm", [truncate, flip_a_bit])
def test_a_damaged_newest_checkpoint_costs_no_good_one(keep: int, harm: object, data: Path, tmp_path: Path) -> None:
    """Newest one damaged, going on, killed again: training then starts at the newest good one, not at step 0."""
    run = tiny.config(steps=12, keep_checkpoints=2, keep_best_checkpoint=False)
    with pytest.raises(InterruptedError):
        train(run, data, tmp_path, StopAfter(8))
    assert steps(list_checkpoints(tmp_path)) == [6, 8]
    harm(step_folder(tmp_path, 8))  # type: ignore[operator]
    # every step, so that one before the damaged one's is written
    again = tiny.config(steps=12, keep_checkpoints=keep, keep_best_checkpoint=False, checkpoint_every=1)
    with (
        pytest.warns(UserWarning, match="step_000000008 is damaged and set aside as step_000000008.damaged; training"),
        pytest.raises(InterruptedError),
    ):
        train(again, data, tmp_path, StopAfter(7))
    assert steps(list_checkpoints(tmp_path)) == [6, 7][-keep:]
    assert steps(list_set_aside(tmp_path)) == [8]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step_000000007"
    with pytest.warns(UserWarning, match="step_000000008.damaged, a damaged checkpoint that was set aside, is deleted"):
        train(run, data, tmp_path)
    assert steps(list_checkpoints(tmp_path)) == [10, 12] and not list_set_aside(tmp_path)


def test_one_that_is_damaged_while_training_runs_does_not_count(data: Path, tmp_path: Path) -> None:
    class Harm(NoHooks):
        def on_checkpoint(self, step: int, path: Path) -> None:
            if step == 6:
                truncate(path)

    run = tiny.config(steps=8, keep_checkpoints=2, keep_best_checkpoint=False)
    with pytest.warns(UserWarning, match=r"step_000000006/.* is 100 bytes long.*set aside as step_000000006.damaged"):
        train(run, data, tmp_path, Harm())
    assert steps(list_checkpoints(tmp_path)) == [4, 8], "the two newest good ones"


def test_only_the_newest_damaged_ones_stay(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        train(tiny.config(steps=12, checkpoint_every=1, keep_checkpoints=9), data, tmp_path, StopAfter(8))
    for step in range(4, 9):
        truncate(step_folder(tmp_path, step))
    with warnings.catch_warnings(), pytest.raises(InterruptedError):
        warnings.simplefilter("ignore")
        train(tiny.config(steps=12, checkpoint_every=1, keep_checkpoints=9), data, tmp_path, StopAfter(4))
    assert steps(list_set_aside(tmp_path)) == [7, 8]
    assert steps(list_checkpoints(tmp_path)) == [1, 2, 3, 4]


class TestRemote:
    @pytest.fixture
    def remote(self, data: Path, tmp_path: Path) -> Path:
        """A run's folder in a remote storage, with the checkpoints of steps 6 and 8; the cache is on another node."""
        storage = self.storage(tmp_path, "first")
        run_folder = storage.folder("pretrain", "f" * 64)
        run = tiny.config(steps=12, keep_best_checkpoint=False)
        with pytest.raises(InterruptedError):
            train(run, data, run_folder, StopAfter(8), storage)
        folder = tmp_path / "remote" / "pretrain" / ("f" * 16)
        assert steps(list_checkpoints(folder)) == [6, 8]
        return folder

    def storage(self, tmp_path: Path, node: str) -> Storage:
        return Storage((tmp_path / "remote").as_uri(), cache=tmp_path / node)

    def resume(self, data: Path, tmp_path: Path, node: str, stop_at: int, keep: int = 1) -> Path:
        storage = self.storage(tmp_path, node)
        run_folder = storage.folder("pretrain", "f" * 64)
        storage.fetch_checkpoints(run_folder)
        run = tiny.config(steps=12, checkpoint_every=1, keep_checkpoints=keep, keep_best_checkpoint=False)
        with pytest.raises(InterruptedError):
            train(run, data, run_folder, StopAfter(stop_at), storage)
        return run_folder

    @pytest.mark.parametrize("harm", [truncate, flip_a_bit])
    def test_a_damaged_one_is_set_aside_there_too(self, harm: object, remote: Path, data: Path, tmp_path: Path) -> None:
        harm(remote / "step_000000008")  # type: ignore[operator]
        with pytest.warns(UserWarning, match="remote checkpoint passed over|set aside"):
            self.resume(data, tmp_path, "second", stop_at=7)
        assert steps(list_checkpoints(remote)) == [7]
        assert steps(list_set_aside(remote)) == [8]
        newest = newest_checkpoint(remote)
        assert newest is not None and newest.name == "step_000000007"

    def test_one_without_a_manifest_takes_no_place(self, remote: Path, data: Path, tmp_path: Path) -> None:
        """What a node that died was uploading."""
        (remote / "step_000000008" / "manifest.json").unlink()
        with pytest.warns(UserWarning, match="step_000000008 .* holds no manifest.json; set aside"):
            self.resume(data, tmp_path, "second", stop_at=7)
        assert steps(list_checkpoints(remote)) == [7]

    @pytest.mark.parametrize("harm", [truncate, flip_a_bit])
    def test_a_damaged_copy_in_the_cache_is_fetched_again(
        self, harm: object, remote: Path, data: Path, tmp_path: Path
    ) -> None:
        cached = self.storage(tmp_path, "first").folder("pretrain", "f" * 64)
        harm(cached / "step_000000008")  # type: ignore[operator]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.resume(data, tmp_path, "first", stop_at=9)
        assert steps(list_checkpoints(remote)) == [9] and not list_set_aside(remote)
