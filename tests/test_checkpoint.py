"""Checkpoints: written beside the training, whole or not there, and what training does when they cannot be."""

import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import kraken.training.checkpointer
from kraken.checkpoint.history import read_history
from kraken.checkpoint.pieces import Piece, held_piece, whole_piece
from kraken.checkpoint.reader import KINDS, list_checkpoints, newest_checkpoint
from kraken.checkpoint.tensor_files import read_pieces, write_tensors
from kraken.config import RunConfig
from kraken.manifest import ArtefactError, Manifest, sha256_of_file
from kraken.model.architecture import Kraken, part_of, whole_shapes
from kraken.model.ways import WayGroup
from kraken.storage import Storage
from kraken.training.train import NoHooks, TrainingStopped, train

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(NoHooks):
    """Keeps what it is told; asks to stop after so many steps were reported."""

    def __init__(self, stop_after: float = float("inf")):
        self.reports: list[dict[str, float]] = []
        self.checkpoints: list[int] = []
        self.stop_after = stop_after

    def on_step(self, metrics: dict[str, float]) -> None:
        self.reports.append(metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        Manifest.read(path).verify(path)
        self.checkpoints.append(step)

    def stop_requested(self) -> bool:
        return bool(self.reports) and self.reports[-1]["step"] >= self.stop_after


def assert_same_state(left: Path, right: Path) -> None:
    """Weights, moments and progress of two runs' newest checkpoints, to the bit."""
    a, b = newest_checkpoint(left), newest_checkpoint(right)
    assert a is not None and b is not None and a.name == b.name
    for kind in KINDS:
        found, expected = (tiny.whole(folder, kind) for folder in (a, b))
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def fail_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A disk that is full whenever one of these steps is written."""

    def write(path: Path, *args: Any) -> Any:
        if any(f"{step:09d}" in str(path) for step in steps):
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(path, *args)

    monkeypatch.setattr(kraken.training.checkpointer, "write_tensors", write)


class TestPieces:
    def test_boxes_of_one_cut_are_put_together_for_another(self) -> None:
        """A whole is cut in two ways; every box of the second is filled from the boxes of the first."""
        whole = torch.arange(7 * 5 * 3).reshape(7, 5, 3)

        def cut(*bounds: list[int]) -> list[Piece]:
            spans = [list(itertools.pairwise(b)) for b in bounds]
            return [
                Piece((7, 5, 3), tuple(a for a, _ in box), tuple(b - a for a, b in box))
                for box in itertools.product(*spans)
            ]

        def values(piece: Piece) -> torch.Tensor:
            return whole[tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))]

        first, second = cut([0, 2, 7], [0, 5], [0, 1, 3]), cut([0, 4, 5, 7], [0, 3, 5], [0, 3])
        for piece in second:
            found = torch.full(piece.shape, -1)
            for source in first:
                if (common := piece.overlap(source)) is not None:
                    found[common[0]] = values(source)[common[1]]
            assert torch.equal(found, values(piece))

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_a_piece_is_where_the_part_is(self, size: int) -> None:
        config = dataclasses.replace(tiny.config().model, num_ways=4)
        shapes = whole_shapes(config)
        for rank in range(size):
            ways = WayGroup(rank, size)
            for name, parameter in Kraken(config, ways).named_parameters():
                whole = torch.arange(shapes[name].numel()).reshape(shapes[name])
                piece = held_piece(name, parameter, shapes[name], config, ways)
                box = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))
                assert torch.equal(whole[box], part_of(name, whole, config, ways)), name

    def test_a_file_gives_back_what_was_written(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        tensors = {"a": torch.randn(3, 5, dtype=torch.float64), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.0)}
        pieces = {name: whole_piece(tuple(tensor.shape)) for name, tensor in tensors.items()}
        pieces["a"] = Piece((6, 5), (3, 0), (3, 5))
        record = write_tensors(tmp_path / "x.safetensors", tensors, pieces)
        assert record.sha256 == sha256_of_file(tmp_path / "x.safetensors")
        assert record.num_bytes == (tmp_path / "x.safetensors").stat().st_size
        assert read_pieces(tmp_path / "x.safetensors") == pieces
        loaded = load_file(tmp_path / "x.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


class TestWriting:
    def test_beside_the_training_or_not_the_checkpoint_is_the_same(self, data: Path, tmp_path: Path) -> None:
        keep = {"steps": 8, "keep_checkpoints": 8}
        train(tiny.config(**keep), data, tmp_path / "beside")
        train(tiny.config(**keep, checkpoint_in_background=False), data, tmp_path / "between")
        assert [p.name for p in list_checkpoints(tmp_path / "beside")] == [f"step_00000000{n}" for n in (2, 4, 6, 8)]
        for step in (2, 4, 6, 8):
            for kind in KINDS:
                beside, between = (
                    tiny.whole(tmp_path / name / f"step_{step:09d}", kind) for name in ("beside", "between")
                )
                for name in beside:
                    assert torch.equal(beside[name].nan_to_num(), between[name].nan_to_num()), (step, name)

    def test_the_next_update_waits_for_a_slow_copy(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is copied is what was there when the checkpoint began, however late the copying starts."""
        import time

        original = kraken.training.checkpointer.Snapshot.copy

        def late(self: Any) -> Any:
            time.sleep(0.1)
            return original(self)

        train(tiny.config(), data, tmp_path / "prompt")
        monkeypatch.setattr(kraken.training.checkpointer.Snapshot, "copy", late)
        recorder = Recorder()
        train(tiny.config(), data, tmp_path / "late", recorder)
        for folder in list_checkpoints(tmp_path / "prompt"):
            a, b = (tiny.whole(run / folder.name, "model") for run in (tmp_path / "prompt", tmp_path / "late"))
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert recorder.reports[-1]["seconds_in_checkpoint"] > 0

    def test_killed_while_writing_leaves_the_checkpoint_before(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config(steps=8)
        process = multiprocessing.get_context("spawn").Process(target=_die_writing_step_4, args=(run, data, tmp_path))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000002"]
        assert list(tmp_path.glob(".step_000000004.partial/*"))
        train(run, data, tmp_path)
        assert not list(tmp_path.glob(".*partial"))
        train(run, data, tmp_path.with_name("whole"))
        assert_same_state(tmp_path, tmp_path.with_name("whole"))

    def test_a_full_disk_does_not_stop_training(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_at(monkeypatch, 4)
        recorder = Recorder()
        with pytest.warns(UserWarning, match="checkpoint of step 4 could not be written.*the disk is full"):
            train(tiny.config(steps=8), data, tmp_path / "full", recorder)
        assert recorder.checkpoints == [2, 6, 8]
        assert recorder.reports[-1]["failed_checkpoints"] == 1
        assert not list((tmp_path / "full").glob(".*partial"))
        monkeypatch.undo()
        train(tiny.config(steps=8), data, tmp_path / "whole")
        assert_same_state(tmp_path / "full", tmp_path / "whole")

    def test_without_its_last_checkpoint_a_run_has_failed(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_at(monkeypatch, 6)
        with (
            pytest.warns(UserWarning, match="could not be written"),
            pytest.raises(ArtefactError, match="checkpoint of step 6 could not be written.*the disk is full"),
        ):
            train(tiny.config(), data, tmp_path)
        assert newest_checkpoint(tmp_path) == tmp_path / "step_000000004"

    def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(
        self, data: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "run").write_text("a file")
        recorder = Recorder()
        with pytest.raises(ArtefactError, match="rank 0 cannot write to .*run, where checkpoints go.*--storage"):
            train(tiny.config(), data, tmp_path / "run", recorder)
        assert not recorder.reports

    def test_the_best_stays_beside_the_newest(self, data: Path, tmp_path: Path) -> None:
        """A run that gets worse: after a good start, steps too large."""
        run = tiny.config(steps=10, validate_every=2, keep_checkpoints=1, warmup_steps=8, learning_rate=3.0)
        train(run, data, tmp_path / "kept")
        losses = {
            int(r["step"]): r["validation_loss"] for r in read_history(tmp_path / "kept") if "validation_loss" in r
        }
        best = min(losses, key=losses.__getitem__)
        assert best not in (10,)
        assert {path.name for path in list_checkpoints(tmp_path / "kept")} == {f"step_{best:09d}", "step_000000010"}
        train(
            dataclasses.replace(run, train=dataclasses.replace(run.train, keep_best_checkpoint=False)),
            data,
            tmp_path / "not",
        )
        assert [path.name for path in list_checkpoints(tmp_path / "not")] == ["step_000000010"]


class TestReading:
    @pytest.mark.parametrize("name", ["model_00000_of_00001.safetensors", "history.jsonl", "manifest.json"])
    def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
        self, name: str, data: Path, tmp_path: Path
    ) -> None:
        train(tiny.config(), data, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        file = tmp_path / "damaged" / "step_000000006" / name
        content = bytearray(file.read_bytes())
        content[-2] ^= 8
        file.write_bytes(content)
        recorder = Recorder()
        with pytest.warns(UserWarning, match="checkpoint passed over: .*step_000000006"):
            train(tiny.config(), data, tmp_path / "damaged", recorder)
        assert [report["step"] for report in recorder.reports] == [6]
        assert_same_state(tmp_path / "damaged", tmp_path / "whole")

    def test_a_checkpoint_of_another_optimizer_is_refused(self, data: Path, tmp_path: Path) -> None:
        train(tiny.config(steps=2), data, tmp_path)
        with pytest.raises(ArtefactError, match="does not fit the optimizer.*train.optimizer"):
            train(tiny.config(optimizer="muon"), data, tmp_path)


class TestStopping:
    def test_asked_to_stop_it_leaves_a_checkpoint_and_continues_there(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config(steps=12, checkpoint_every=12)
        hooks = Recorder(stop_after=4)
        with pytest.raises(TrainingStopped, match=r"stopped as asked after step 5 with .*step_000000005; run again"):
            train(run, data, tmp_path / "stopped", hooks)
        assert hooks.checkpoints == [5]
        resumed = Recorder()
        train(run, data, tmp_path / "stopped", resumed)
        train(run, data, tmp_path / "whole")
        assert_same_state(tmp_path / "stopped", tmp_path / "whole")

    def test_without_room_for_the_checkpoint_stopping_is_an_error(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_at(monkeypatch, 5)
        with (
            pytest.warns(UserWarning, match="could not be written"),
            pytest.raises(ArtefactError, match="checkpoint of step 5 could not be written"),
        ):
            train(tiny.config(steps=12, checkpoint_every=12), data, tmp_path, Recorder(stop_after=4))


class TestRemote:
    def test_parts_are_published_and_fetched(self, data: Path, tmp_path: Path) -> None:
        """A machine trains and is lost; another continues from what the storage has."""
        uri = (tmp_path / "remote").as_uri()
        first = Storage(uri, cache=tmp_path / "first")
        run = tiny.config(steps=8)
        with pytest.raises(TrainingStopped):
            train(run, data, first.folder("pretrain", "f" * 64), Recorder(stop_after=4), storage=first)
        second = Storage(uri, cache=tmp_path / "second")
        folder = second.folder("pretrain", "f" * 64)
        second.fetch_checkpoints(folder)
        recorder = Recorder()
        train(run, data, folder, recorder, storage=second)
        assert recorder.reports[0]["step"] == 6
        train(run, data, tmp_path / "whole")
        assert_same_state(folder, tmp_path / "whole")
        remote = {path.name for path in (tmp_path / "remote" / "pretrain" / ("f" * 16)).iterdir()}
        assert remote == {path.name for path in list_checkpoints(folder)} == {"step_000000006", "step_000000008"}

    def test_a_storage_that_is_away_does_not_stop_training(self, data: Path, tmp_path: Path) -> None:
        """The checkpoint of that moment fails, and the next ones are there again."""
        uri = (tmp_path / "remote").as_uri()
        storage = Storage(uri, cache=tmp_path / "cache")
        run_folder = storage.folder("pretrain", "f" * 64)
        remote, away = tmp_path / "remote" / "pretrain" / ("f" * 16), tmp_path / "away"

        class Outage(Recorder):
            """After step 4 the storage's place is taken by a file; after step 6 it is back."""

            def on_step(self, metrics: dict[str, float]) -> None:
                super().on_step(metrics)
                if metrics["step"] == 4:
                    remote.rename(away)
                    remote.write_text("in the way")
                elif metrics["step"] == 6:
                    remote.unlink()
                    away.rename(remote)

        run = tiny.config(steps=8, checkpoint_in_background=False)
        recorder = Outage()
        with pytest.warns(UserWarning, match="checkpoint of step 4 could not be"):
            train(run, data, run_folder, recorder, storage=storage)
        assert recorder.checkpoints == [2, 6, 8]
        assert recorder.reports[-1]["failed_checkpoints"] == 1
        train(run, data, tmp_path / "whole")
        assert_same_state(run_folder, tmp_path / "whole")

    def test_a_damaged_remote_checkpoint_is_passed_over(self, data: Path, tmp_path: Path) -> None:
        uri = (tmp_path / "remote").as_uri()
        first = Storage(uri, cache=tmp_path / "first")
        train(tiny.config(), data, first.folder("pretrain", "f" * 64), storage=first)
        for file in (tmp_path / "remote").glob("pretrain/*/step_000000006/optimizer*"):
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        second = Storage(uri, cache=tmp_path / "second")
        folder = second.folder("pretrain", "f" * 64)
        with pytest.warns(UserWarning, match="remote checkpoint passed over"):
            second.fetch_checkpoints(folder)
        assert (folder / "step_000000004" / "manifest.json").is_file()


def _die_writing_step_4(run: RunConfig, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)

    def write(path: Path, *args: Any) -> Any:
        if "000000004" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"the beginning")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_tensors(path, *args)

    kraken.training.checkpointer.write_tensors = write
    train(run, data, folder)
