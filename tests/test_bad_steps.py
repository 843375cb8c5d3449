"""Bad steps: a gradient that is not finite or a loss that jumps ends training, or leaves no trace in it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from kraken.checkpoint.history import read_history
from kraken.checkpoint.reader import KINDS, newest_checkpoint
from kraken.config import ConfigError, RunConfig
from kraken.data.loader import Loader
from kraken.manifest import ArtefactError
from kraken.training.parallel import Mesh
from kraken.training.state import TrainingState
from kraken.training.step import TrainingStep
from kraken.training.train import NoHooks, train

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[torch.Tensor, torch.Tensor]


def batches(run: RunConfig, count: int) -> list[Batch]:
    """Batches that a model can learn: every token is followed by the next number."""
    random = torch.Generator().manual_seed(0)
    T = run.model.context_length
    starts = [torch.randint(100, (run.train.sequences_per_step, 1), generator=random) for _ in range(count)]
    ids = [start + torch.arange(T + 1) for start in starts]
    return [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids]


def trained(run: RunConfig, steps: list[tuple[int, Batch]], poisoned: int | None = None) -> TrainingStep:
    """A training step after these; the gradient of the poisoned one is not finite."""
    step = TrainingStep(run.model, run.train, Mesh(torch.device("cpu")))
    step.start(len(steps))
    for index, batch in steps:
        handle = None
        if index == poisoned:
            handle = step.model.ln_f.weight.register_hook(lambda gradient: gradient * torch.nan)
        step(index, *batch)
        if handle is not None:
            handle.remove()
    return step


def tensors_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """Weights, moments and counts of updates."""
    state = TrainingState(step, Mesh(torch.device("cpu"))).to_write()
    tensors = {f"{kind}/{name}": held.tensor for kind, part in state.items() for name, held in part.items()}
    del tensors["optimizer/progress"]
    counts = {id(p): s["step"] for p, s in step.optimizer._adamw.state.items()}
    return tensors | {f"count/{n}": counts[id(p)] for n, p in step.model.named_parameters() if id(p) in counts}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_skipped_step_leaves_no_trace(optimizer: Any, bad: int) -> None:
    run = tiny.config(on_bad_step="skip", optimizer=optimizer)
    steps = list(enumerate(batches(run, 5)))
    skipping = trained(run, steps, poisoned=bad)
    undisturbed = trained(run, [step for step in steps if step[0] != bad])
    assert skipping.bad_steps() == [bad] and undisturbed.bad_steps() == []
    assert float(skipping.progress[1]) == 1
    found, expected = tensors_of(skipping), tensors_of(undisturbed)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_a_spike_is_measured_from_the_running_mean() -> None:
    run = tiny.config(on_bad_step="skip", max_loss_spike=0.5, learning_rate=3e-2, steps=200)
    good = batches(run, 40)
    random = torch.randint(300, good[0][0].shape, generator=torch.Generator().manual_seed(1))
    steps = list(enumerate([*good[:30], (random, random.flip(1)), *good[30:]]))
    spiking = trained(run, steps)
    assert spiking.bad_steps() == [30]
    found, expected = tensors_of(spiking), tensors_of(trained(run, [step for step in steps if step[0] != 30]))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    generous = dataclasses.replace(run.train, max_loss_spike=50.0)
    assert trained(dataclasses.replace(run, train=generous), steps).bad_steps() == []


class Keeper(NoHooks):
    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def on_step(self, metrics: dict[str, float]) -> None:
        self.reports.append(metrics)


@pytest.fixture
def noise_at_step_21(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of one step are noise, which a model that has learned something finds surprising."""
    original = Loader.batch

    def batch(self: Loader, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        inputs, targets = original(self, step, rank, num_ranks)
        if step == 20:
            noise = np.random.Generator(np.random.Philox(3)).integers(300, size=targets.shape)
            return torch.from_numpy(noise), torch.from_numpy(noise[:, ::-1].copy())
        return inputs, targets

    monkeypatch.setattr(Loader, "batch", batch)


SPIKES = {"steps": 24, "max_loss_spike": 0.7, "checkpoint_every": 6, "validate_every": 24, "log_every": 4}


@pytest.mark.usefixtures("noise_at_step_21")
class TestTraining:
    def test_stop_says_where_and_keeps_the_checkpoint_before(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(
            ArtefactError,
            match=r"not finite or 0.7 nats above the running mean at step 21: training windows 80..83 of the global "
            r"order, the first at token \d+ .*last good checkpoint is .*step_000000018",
        ):
            train(tiny.config(**SPIKES), data, tmp_path)
        assert newest_checkpoint(tmp_path) == tmp_path / "step_000000018"

    def test_skip_counts_and_says_which_windows(self, data: Path, tmp_path: Path) -> None:
        keeper = Keeper()
        with pytest.warns(UserWarning, match=r"step 21 skipped.*training windows 80\.\.83") as warned:
            train(tiny.config(**SPIKES, on_bad_step="skip"), data, tmp_path, keeper)
        assert sum("skipped" in str(warning.message) for warning in warned) == 1
        assert [report["skipped_steps"] for report in keeper.reports] == [0, 0, 0, 0, 0, 1]
        assert keeper.reports[-1]["loss"] < keeper.reports[0]["loss"]

    @pytest.mark.filterwarnings("ignore:step 21 skipped")
    def test_a_resumed_run_judges_and_counts_alike(self, data: Path, tmp_path: Path) -> None:
        """The running mean and the counts of updates travel in the checkpoint."""
        run = tiny.config(**(SPIKES | {"steps": 30, "validate_every": 30}), on_bad_step="skip")
        train(run, data, tmp_path / "whole")

        class Stop(NoHooks):
            def on_checkpoint(self, step: int, path: Path) -> None:
                if step in (18, 24):
                    raise InterruptedError

        for _ in range(2):
            with pytest.raises(InterruptedError):
                train(run, data, tmp_path / "resumed", Stop())
        train(run, data, tmp_path / "resumed")
        for kind in KINDS:
            a, b = (tiny.whole(tmp_path / name / "step_000000030", kind) for name in ("whole", "resumed"))
            assert all(torch.equal(a[name], b[name]) for name in a)
        whole, resumed = (read_history(tmp_path / name) for name in ("whole", "resumed"))
        assert [r["loss"] for r in whole] == [r["loss"] for r in resumed]
        assert [r["skipped_steps"] for r in whole] == [r["skipped_steps"] for r in resumed]


def test_nothing_but_bad_steps_ends_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kraken.training.train

    monkeypatch.setattr(kraken.training.train, "MOST_SKIPPED_IN_A_ROW", 5)
    original = TrainingStep._judge

    def judge(self: TrainingStep, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        return original(self, loss, grad_norm * torch.nan)

    monkeypatch.setattr(TrainingStep, "_judge", judge)
    with (
        pytest.warns(UserWarning, match="step . skipped"),
        pytest.raises(ArtefactError, match="the 6 steps until step 6 were all skipped.*train.max_loss_spike"),
    ):
        train(tiny.config(steps=40, on_bad_step="skip"), data, tmp_path)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.max_loss_spike=-1.0 is negative"):
        tiny.config(max_loss_spike=-1.0)
