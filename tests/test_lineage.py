"""Lineage: a training continues an earlier one, in one process on a tiny model, without Ray."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kraken.checkpoint.folders import list_checkpoints, newest_checkpoint, step_folder
from kraken.checkpoint.history import read_history
from kraken.checkpoint.reader import KINDS
from kraken.config import ConfigError, RunConfig, to_dict
from kraken.manifest import ArtefactError, Manifest, finish_artefact, make_fingerprint
from kraken.storage import Storage
from kraken.training.train import NoHooks, train
from pipelines import end_to_end, lineage, pretrain
from pipelines.identity import determining
from pipelines.stage import Work

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTANT = {"final_learning_rate_fraction": 1.0, "warmup_steps": 2}
"""A schedule that does not depend on the number of steps."""


class StopAt(NoHooks):
    def __init__(self, step: int | None):
        self.step = step

    def on_checkpoint(self, step: int, path: Path) -> None:
        if step == self.step:
            raise InterruptedError


class Run:
    """Stands for the stage's MLflow run; the tests read its tags."""

    def __init__(self) -> None:
        self.tags: dict[str, Any] = {}

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self.tags |= tags


class Trainings:
    """Trainings in one storage, by the stage's own code."""

    def __init__(self, uri: str, data: Path, monkeypatch: pytest.MonkeyPatch):
        import pipelines.training.workers

        self.uri, self.data = uri, data
        prepared = Manifest.read(data)
        self.prepare = dataclasses.replace(prepared, config={"data": to_dict(tiny.config().data)})
        self.stop_at: int | None = None
        monkeypatch.setattr(pipelines.training.workers, "fit", self.fit)

    def config(self, continue_from: str | None = None, **train: Any) -> RunConfig:
        return dataclasses.replace(tiny.config(**train), storage=self.uri, continue_from=continue_from)

    def fingerprint(self, config: RunConfig) -> str:
        section = determining("pretrain", lineage.section(config))
        return make_fingerprint("pretrain", section, {"prepare": self.prepare.fingerprint})

    def folder(self, config: RunConfig) -> Path:
        return Storage(self.uri).folder("pretrain", self.fingerprint(config))

    def resolve(self, config: RunConfig) -> RunConfig:
        return lineage.resolve(config, self.prepare.fingerprint)

    def suggest(self, config: RunConfig) -> str:
        return lineage.suggest(config, self.prepare.fingerprint, self.fingerprint(config))

    def fit(self, work: Work) -> Any:
        work.storage.fetch_checkpoints(work.folder)
        return train(work.config, self.data, work.folder, StopAt(self.stop_at), work.storage)

    def __call__(self, config: RunConfig, stop_at: int | None = None) -> Manifest | None:
        """Train as the stage does; None when it was interrupted."""
        config, self.stop_at = self.resolve(config), stop_at
        fingerprint, storage = self.fingerprint(config), Storage(self.uri)
        folder = storage.folder("pretrain", fingerprint)
        self.run: Any = Run()
        work = Work(config, fingerprint, storage, folder, {"prepare": self.prepare}, self.run)
        try:
            metrics, details = pretrain.STAGE.work(work)
        except InterruptedError:
            return None
        return finish_artefact(
            folder,
            started_at=0.0,
            kind="pretrain",
            fingerprint=fingerprint,
            config=lineage.section(config),
            parents={"prepare": self.prepare.fingerprint},
            metrics=metrics,
            details=details,
        )


@pytest.fixture
def trainings(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    return Trainings(str(tmp_path / "storage"), data, monkeypatch)


def assert_equal_checkpoints(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Weights and moments of two checkpoints."""
    for kind in KINDS:
        left, right = tiny.whole(a, kind), tiny.whole(b, kind)
        assert left.keys() == right.keys()
        for name in left.keys() - {"progress"}:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=name)


def damage(folder: Path) -> None:
    """`truncate -s 100` of the weights."""
    with (folder / "model_00000_of_00001.safetensors").open("r+b") as file:
        file.truncate(100)


class TestSameRun:
    def test_other_settings_of_operation_continue_to_the_same_weights(self, trainings: Trainings) -> None:
        trainings(trainings.config(), stop_at=4)
        folder = trainings.folder(trainings.config())
        other = trainings.config(
            log_every=1, sequences_per_microbatch=4, checkpoint_every=3, keep_checkpoints=1, validate_every=5
        )
        assert trainings.folder(other) == folder
        assert lineage.newest_step(Storage(trainings.uri), trainings.fingerprint(other)) == 4
        trainings(other)
        whole = folder.with_name("whole")
        train(trainings.config(), trainings.data, whole)
        assert_equal_checkpoints(step_folder(folder, 6), step_folder(whole, 6), tolerance=1e-10)

    def test_the_advice_at_a_bad_step_continues(self, trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stopped at a bad step, then continued with the setting that the message names; and not reused for `stop`."""
        from kraken.training.step import TrainingStep

        original = TrainingStep._judge

        def judge(self: TrainingStep, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
            return original(self, loss, grad_norm * (torch.nan if len(steps) == 5 else 1.0))

        def step(self: TrainingStep, index: int, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            steps[:] = range(index + 1)
            return call(self, index, *batch)

        steps: list[int] = []
        call = TrainingStep.__call__
        monkeypatch.setattr(TrainingStep, "_judge", judge)
        monkeypatch.setattr(TrainingStep, "__call__", step)
        with pytest.raises(ArtefactError, match=r"at step 5: .*train\.on_bad_step=skip, which continues from there"):
            trainings(trainings.config())
        skipping = trainings.config(on_bad_step="skip")
        began: list[int] = []
        start = TrainingStep.start
        monkeypatch.setattr(
            TrainingStep, "start", lambda self, num_steps: (began.append(num_steps), start(self, num_steps))[1]
        )
        with pytest.warns(UserWarning, match="step 5 skipped"):
            manifest = trainings(skipping)
        assert began == [2], "two of six steps were left"
        assert manifest is not None and manifest.value("skipped_steps") == 1
        assert pretrain.is_valid(skipping, manifest)
        with pytest.raises(ConfigError, match=r"skipped 1 bad steps.*accept it with train\.on_bad_step=skip"):
            pretrain.is_valid(trainings.config(), manifest)
        with pytest.raises(ArtefactError, match=r"1 of the 6 steps .* go on with train\.on_bad_step=skip"):
            trainings(trainings.config())
        longer = trainings(trainings.config(steps=8, continue_from="latest"))
        assert longer is not None and longer.value("skipped_steps") == 1
        assert longer.details["continued_from"]["skipped_steps"] == 1, (
            "the earlier training's, which is no reason to stop"
        )
        assert pretrain.is_valid(trainings.config(steps=8), longer)

    def test_a_trace_of_a_finished_run_is_refused(self, trainings: Trainings) -> None:
        manifest = trainings(trainings.config(steps=2))
        assert manifest is not None and pretrain.is_valid(trainings.config(steps=2), manifest)
        with pytest.raises(ConfigError, match="train.trace_step=1, but the finished training .* left no trace"):
            pretrain.is_valid(trainings.config(steps=2, trace_step=1), manifest)

    def test_a_dry_run_says_where_it_continues(self, trainings: Trainings) -> None:
        trainings(trainings.config(), stop_at=4)
        other = trainings.config(log_every=1)
        found = {"prepare": trainings.prepare.fingerprint, "pretrain": trainings.fingerprint(other)}
        lines = end_to_end.describe(end_to_end.plan(other, "pretrain", found)).splitlines()
        assert lines[2].startswith("pretrain") and lines[2].endswith("continue at step 4") and len(lines) == 3
        damage(step_folder(trainings.folder(other), 4))
        assert "continue at step 2" in end_to_end.describe(end_to_end.plan(other, "pretrain", found))


class TestContinuing:
    def test_continued_equals_never_stopped(self, trainings: Trainings) -> None:
        trainings(trainings.config(steps=4, **CONSTANT))
        first = trainings.fingerprint(trainings.config(steps=4, **CONSTANT))
        manifest = trainings(trainings.config(steps=8, continue_from=first[:8], **CONSTANT))
        assert manifest is not None
        exact = f"{first}@4"
        assert trainings.run.tags == {lineage.CONTINUED_FROM_TAG: exact}
        assert manifest.details["continued_from"] == {"fingerprint": first, "step": 4, "skipped_steps": 0}
        assert manifest.config["continue_from"] == exact
        folder = trainings.folder(trainings.config(steps=8, continue_from=exact, **CONSTANT))
        whole = folder.with_name("whole")
        train(trainings.config(steps=8, **CONSTANT), trainings.data, whole)
        assert_equal_checkpoints(step_folder(folder, 8), step_folder(whole, 8))
        losses, expected = ([report["loss"] for report in read_history(place)] for place in (folder, whole))
        assert losses == pytest.approx(expected, abs=1e-12)
        assert list_checkpoints(trainings.folder(trainings.config(steps=4, **CONSTANT))), "the earlier one stays"

    def test_the_same_command_continues_the_same_run(self, trainings: Trainings) -> None:
        """`latest` means the earlier training, also when this one is the latest, and whatever that one did since."""
        trainings(trainings.config(), stop_at=4)
        longer = trainings.config(steps=12, continue_from="latest")
        assert trainings(longer, stop_at=8) is None
        exact = trainings.resolve(longer)
        assert exact.continue_from == f"{trainings.fingerprint(trainings.config())}@4"
        assert lineage.newest_step(Storage(trainings.uri), trainings.fingerprint(exact)) == 8
        trainings(trainings.config())  # the earlier one goes on to its end
        assert trainings.resolve(longer) == exact
        assert trainings.resolve(exact) == exact

    def test_latest_passes_over_one_that_was_ended_at_its_start(self, trainings: Trainings) -> None:
        """The advice is printed, the command is ended and given again with the flag."""
        trainings(trainings.config(), stop_at=4)
        longer = trainings.config(steps=12, continue_from="latest")
        plain = trainings.config(steps=12)
        record = lineage.RunRecord(
            fingerprint=trainings.fingerprint(plain),
            section=lineage.section(plain),
            prepare=trainings.prepare.fingerprint,
            data={},
            created_at="9999",
        )
        record.write(trainings.folder(plain))
        assert trainings.resolve(longer).continue_from == f"{trainings.fingerprint(trainings.config())}@4"
        trainings(plain, stop_at=2)
        with pytest.raises(ConfigError, match="has these very settings; leave --continue-from out"):
            trainings.resolve(longer)

    def test_the_identity_includes_the_origin(self, trainings: Trainings) -> None:
        prints = {
            trainings.fingerprint(trainings.config(continue_from=origin))
            for origin in (None, "a" * 64 + "@2", "a" * 64 + "@4", "b" * 64 + "@4")
        }
        assert len(prints) == 4

    def test_another_rate_is_advised_and_starts_at_the_newest_good_checkpoint(self, trainings: Trainings) -> None:
        trainings(trainings.config(), stop_at=4)
        first = trainings.fingerprint(trainings.config())
        damage(step_folder(trainings.folder(trainings.config()), 4))
        other = trainings.config(learning_rate=1e-3)
        assert trainings.suggest(other) == (
            f"starts at step 0; training {first[:12]} (train.learning_rate=0.01) has a checkpoint of step 2 to go on "
            f"from: --continue-from {first[:12]}"
        )
        assert (
            trainings.resolve(trainings.config(learning_rate=1e-3, continue_from="latest")).continue_from
            == f"{first}@2"
        )
        assert trainings.suggest(trainings.config(seed=5)) == ""

    def test_a_run_that_was_continued_is_named_by_its_origin(self, trainings: Trainings) -> None:
        trainings(trainings.config(steps=4))
        first = trainings.fingerprint(trainings.config(steps=4))
        trainings(trainings.config(steps=8, continue_from="latest"), stop_at=6)
        assert trainings.suggest(trainings.config(steps=8)).endswith(
            f"of step 6 to go on from: --continue-from {first}@4"
        )

    def test_other_validation_windows_cost_a_validation(self, trainings: Trainings) -> None:
        """Losses over other windows do not stand beside each other, and no step is trained again."""
        first = trainings(trainings.config())
        other = trainings.config(validation_windows=2)
        assert "of step 6 to go on from" in trainings.suggest(other)
        manifest = trainings(trainings.config(validation_windows=2, continue_from="latest"))
        assert first is not None and manifest is not None
        assert manifest.value("final_validation_loss") != first.value("final_validation_loss")
        history = read_history(Storage(trainings.uri).folder("pretrain", manifest.fingerprint))
        assert [report["step"] for report in history if "validation_loss" in report] == [6]
        assert history[-1]["validation_loss"] == manifest.value("final_validation_loss")

    def test_nothing_left_of_a_continued_run_is_an_error(self, trainings: Trainings) -> None:
        """Rather than a training from step 0 under the name of a continued one."""
        trainings(trainings.config(steps=4))
        first = trainings.folder(trainings.config(steps=4))
        longer = trainings.config(steps=8, continue_from="latest")
        trainings(longer, stop_at=6)
        exact = trainings.resolve(longer)
        folder = trainings.folder(exact)
        for path in (*list_checkpoints(folder), *list_checkpoints(first)):
            damage(path)
        with pytest.raises(ArtefactError, match="its manifest says"):
            trainings(longer)
        with pytest.warns(UserWarning), pytest.raises(ArtefactError, match="no good checkpoint is left"):
            train(exact, trainings.data, folder)

    def test_a_remote_storage(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kraken.storage.tempfile.gettempdir", lambda: str(tmp_path / "one"))
        trainings = Trainings((tmp_path / "remote").as_uri(), data, monkeypatch)
        trainings(trainings.config(steps=4, **CONSTANT), stop_at=2)
        monkeypatch.setattr("kraken.storage.tempfile.gettempdir", lambda: str(tmp_path / "two"))  # another node
        longer = trainings.config(steps=6, **CONSTANT)
        assert "has a checkpoint of step 2" in trainings.suggest(longer)
        assert not list((tmp_path / "two").rglob("step_*")), "looking leaves nothing in the cache"
        manifest = trainings(trainings.config(steps=6, continue_from="latest", **CONSTANT))
        assert manifest is not None
        remote = tmp_path / "remote" / "pretrain" / manifest.fingerprint[:16]
        assert {path.name for path in list_checkpoints(remote)} == {"step_000000004", "step_000000006"}
        train(trainings.config(steps=6, **CONSTANT), data, tmp_path / "whole")
        assert_equal_checkpoints(remote / "step_000000006", tmp_path / "whole" / "step_000000006")


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: _model(c, width=32), "has model.width=16, this one model.width=32"),
            (lambda c: _train(c, seed=5), "has train.seed=1337, this one train.seed=5"),
            (lambda c: _train(c, sequences_per_step=8), "train.sequences_per_step=4, this one .*=8"),
            (lambda c: _train(c, optimizer="muon"), "has train.optimizer=adamw, this one train.optimizer=muon"),
            (lambda c: _train(c, steps=3), r"is at step 4 already, and train.steps=3 .*give --train.steps above 4"),
            (lambda c: _train(c, steps=4, learning_rate=1.0), "is at step 4 already"),
            (lambda c: c, "has these very settings; leave --continue-from out"),
            (lambda c: dataclasses.replace(c, continue_from="ffff0000"), "names no training in .*the newest there are"),
            (lambda c: dataclasses.replace(c, continue_from=c.continue_from + "@3"), "these very settings"),
            (
                lambda c: dataclasses.replace(_train(c, steps=9), continue_from=c.continue_from + "@3"),
                "has no good checkpoint of step 3",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, trainings: Trainings, change: Callable[[RunConfig], RunConfig], message: str
    ) -> None:
        trainings(trainings.config(), stop_at=4)
        first = trainings.fingerprint(trainings.config())
        with pytest.raises(ConfigError, match=message):
            trainings.resolve(change(trainings.config(continue_from=first[:12])))

    def test_other_data_are_named(self, trainings: Trainings) -> None:
        trainings(trainings.config(steps=4))
        first = trainings.fingerprint(trainings.config(steps=4))
        config = trainings.config(steps=8, continue_from=first[:12])
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.3))
        with pytest.raises(ConfigError, match=r"data.validation_fraction=0.2, this one data.validation_fraction=0.3"):
            lineage.resolve(other, "another")
        with pytest.raises(ConfigError, match="the corpus has changed"):
            lineage.resolve(config, "another")

    def test_a_prefix_of_several_is_ambiguous(self, trainings: Trainings) -> None:
        for number in range(2):
            folder = Storage(trainings.uri).folder("pretrain", f"abcd{number}" + "0" * 59)
            config = lineage.section(trainings.config(steps=4 + number))
            lineage.RunRecord(
                fingerprint=f"abcd{number}" + "0" * 59,
                section=config,
                prepare=trainings.prepare.fingerprint,
                data={},
                created_at=str(number),
            ).write(folder)
        with pytest.raises(
            ConfigError, match=re.escape("names several trainings; give more characters of one of: abcd1")
        ):
            trainings.resolve(trainings.config(steps=9, continue_from="abcd"))
        with pytest.raises(ConfigError, match="has no good checkpoint"):
            trainings.resolve(trainings.config(steps=9, continue_from="latest"))

    def test_a_text_that_is_no_fingerprint(self) -> None:
        with pytest.raises(ConfigError, match="continue_from=newest is no fingerprint; give .*or latest"):
            dataclasses.replace(tiny.config(), continue_from="newest")


class TestFinalCheckpoint:
    def test_an_older_checkpoint_does_not_pass_for_the_result(self, trainings: Trainings) -> None:
        manifest = trainings(trainings.config())
        assert manifest is not None
        folder = trainings.folder(trainings.config())
        work = Work(trainings.config(), "f", Storage(trainings.uri), folder, {"pretrain": manifest}, trainings.run)
        assert pretrain.final_checkpoint(work) == step_folder(folder, 6)
        content = bytearray((step_folder(folder, 6) / "model_00000_of_00001.safetensors").read_bytes())
        content[-1] ^= 1
        (step_folder(folder, 6) / "model_00000_of_00001.safetensors").write_bytes(content)
        with (
            pytest.warns(UserWarning, match="does not match its hash"),
            pytest.raises(ArtefactError, match=r"step_000000006, the result .* is damaged; .*continues from step_00"),
        ):
            pretrain.final_checkpoint(work)
        assert newest_checkpoint(folder.with_name("none")) is None


def _model(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _train(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
