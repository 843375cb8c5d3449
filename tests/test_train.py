"""Training: its arithmetic, and that stopping, resuming and sharing the work change nothing."""

import dataclasses
import math
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import tiny
import torch

from kraken.checkpoint.reader import list_checkpoints, load_model, newest_checkpoint
from kraken.config import RunConfig, TrainConfig
from kraken.manifest import MANIFEST_NAME, ArtefactError
from kraken.model.architecture import Kraken
from kraken.training.optim import Optimizer, learning_rate
from kraken.training.train import NoHooks, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    tiny.prepared(folder)
    return folder


class Recorder(NoHooks):
    def __init__(self, stop_at: int | None = None):
        self.steps: list[dict[str, float]] = []
        self.checkpoints: list[int] = []
        self.stop_at = stop_at

    def on_step(self, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        assert (path / MANIFEST_NAME).is_file()
        self.checkpoints.append(step)
        if step == self.stop_at:
            raise InterruptedError("stopped by the test")


def final_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_folder)
    assert newest is not None
    return tiny.whole(newest, "model")


def assert_same_weights(left: Path, right: Path, tolerance: float = 0.0) -> None:
    a, b = final_weights(left), final_weights(right)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class TestSchedule:
    def test_warm_up_then_cosine_to_the_final_fraction(self) -> None:
        c = TrainConfig(steps=110, sequences_per_step=1, warmup_steps=10, learning_rate=1.0)
        assert [learning_rate(c, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
        assert learning_rate(c, 10) == 1.0
        assert learning_rate(c, 60) == pytest.approx(0.55)
        assert learning_rate(c, 110) == pytest.approx(0.1)

    def test_gains_have_no_decay(self) -> None:
        run = tiny.config()
        model = Kraken(run.model)
        optimizer = Optimizer(run.train, model, torch.float32)._adamw
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert decay[id(parameter)] == (0.0 if "ln_" in name else 0.1), name


class TestTraining:
    def test_it_learns_and_reports(self, data: Path, tmp_path: Path) -> None:
        recorder = Recorder()
        metrics = train(tiny.config(steps=30, warmup_steps=3), data, tmp_path, recorder)
        steps = [int(m["step"]) for m in recorder.steps]
        assert steps == sorted(set(steps)) and steps[-1] == 30 and {2, 3, 4, 6} <= set(steps)
        assert recorder.steps[0]["loss"] > math.log(320) - 1
        assert metrics["final_validation_loss"].value < recorder.steps[0]["loss"] - 1
        assert metrics["train_tokens"].value == 30 * 4 * 32
        assert recorder.steps[-1]["validation_loss"] == metrics["final_validation_loss"].value
        assert recorder.checkpoints == list(range(2, 31, 2))
        for report in recorder.steps:
            assert report["mfu"] > 0 and report["peak_memory_bytes"] > 0 and report["seconds_in_communication"] == 0
            assert report["seconds_in_data"] > 0 and report["failed_checkpoints"] == report["skipped_steps"] == 0
        validated = {int(m["step"]): m["validation_loss"] for m in recorder.steps if "validation_loss" in m}
        best = min((step for step in validated if step % 2 == 0), key=validated.__getitem__)
        assert {path.name for path in list_checkpoints(tmp_path)} == {f"step_{step:09d}" for step in (28, 30, best)}

    def test_equal_to_a_plain_loop(self, data: Path, tmp_path: Path) -> None:
        """The weights are those of the shortest correct training loop: no micro-batches, no hooks."""
        from kraken.data.loader import Loader
        from kraken.data.shards import TokenShards

        run = tiny.config(steps=4)
        train(run, data, tmp_path)
        loader = Loader(TokenShards(data, "train", 301), 32, 4, run.train.seed)
        model = Kraken(run.model)
        model.init_weights(run.train.seed)
        model.double()
        decayed = [p for n, p in model.named_parameters() if "ln_" not in n]
        gains = [p for n, p in model.named_parameters() if "ln_" in n]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        for step in range(4):
            inputs, targets = loader.batch(step)
            loss = tiny.next_token_loss(model(inputs), targets) / targets.numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.train, step)
            optimizer.step()
        trained = final_weights(tmp_path)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=1e-12, msg=name)

    def test_stopped_and_resumed_equals_never_stopped(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config()
        train(run, data, tmp_path / "whole")
        with pytest.raises(InterruptedError):
            train(run, data, tmp_path / "stopped", Recorder(stop_at=4))
        resumed = Recorder()
        train(run, data, tmp_path / "stopped", resumed)
        assert [int(m["step"]) for m in resumed.steps] == [6]
        assert_same_weights(tmp_path / "whole", tmp_path / "stopped")

    def test_killed_process_resumes(self, data: Path, tmp_path: Path) -> None:
        """SIGKILL between two steps, in a process of its own; the next one ends in the undisturbed run's weights."""
        run = tiny.config(steps=8)
        train(run, data, tmp_path / "whole")
        process = multiprocessing.get_context("spawn").Process(
            target=_train_and_die, args=(run, data, tmp_path / "killed")
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list_checkpoints(tmp_path / "killed")[-1].name in ("step_000000002", "step_000000004")
        train(run, data, tmp_path / "killed")
        assert_same_weights(tmp_path / "whole", tmp_path / "killed")

    @pytest.mark.slow
    def test_two_processes_equal_one(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config()
        alone = train(run, data, tmp_path / "one")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_train_as_rank, args=(rank, port, run, data, tmp_path / "two")) for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert_same_weights(tmp_path / "one", tmp_path / "two", tolerance=1e-10)
        assert alone["num_workers"].value == 1

    def test_bfloat16_stays_close_to_float32(self, data: Path, tmp_path: Path) -> None:
        losses = [
            train(tiny.config(precision=p), data, tmp_path / p)["final_validation_loss"].value
            for p in ("float32", "bfloat16")
        ]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.gpu
def test_cuda_graphs_change_nothing(data: Path, tmp_path: Path) -> None:
    run = tiny.config(precision="float32", sequences_per_step=5)  # micro-batches of 2, 2 and 1
    run = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, gpus_per_worker=1))
    for setting in ("on", "off"):
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, compile=setting))
        train(run, data, tmp_path / setting)
    assert_same_weights(tmp_path / "on", tmp_path / "off", tolerance=1e-4)


class TestBadInput:
    def test_damaged_checkpoint_is_passed_over(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config()
        train(run, data, tmp_path)
        weights = tmp_path / "step_000000006" / "model_00000_of_00001.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.warns(UserWarning, match="does not match its hash"):
            assert newest_checkpoint(tmp_path) == tmp_path / "step_000000004"

    def test_checkpoint_of_another_shape_is_refused(self, data: Path, tmp_path: Path) -> None:
        import dataclasses

        run = tiny.config(steps=2)
        train(run, data, tmp_path)
        wider = dataclasses.replace(run, model=dataclasses.replace(run.model, width=32))
        with pytest.raises(ArtefactError, match="another model shape"):
            train(wider, data, tmp_path)

    def test_unprepared_data_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="never finished there"):
            train(tiny.config(), tmp_path, tmp_path / "run")

    def test_infinite_loss_stops_with_the_last_good_checkpoint(self, data: Path, tmp_path: Path) -> None:
        run = tiny.config(
            steps=20, learning_rate=1e200, clip_norm=1e300, warmup_steps=0, checkpoint_every=1, log_every=1
        )
        with pytest.raises(
            ArtefactError,
            match=r"not finite at step \d+: training windows \d+\.\..*first at token.*last good checkpoint is .*step_",
        ):
            train(run, data, tmp_path)


def test_load_model_gives_the_trained_weights(data: Path, tmp_path: Path) -> None:
    train(tiny.config(steps=2), data, tmp_path)
    model, manifest = load_model(tmp_path / "step_000000002")
    assert manifest.value("step") == 2
    weights = final_weights(tmp_path)
    assert all(torch.equal(p.detach(), weights[n]) for n, p in model.named_parameters())


class _KillAfterStep5(NoHooks):
    def on_step(self, metrics: dict[str, float]) -> None:
        if metrics["step"] >= 5:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(run: RunConfig, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    train(run, data, folder, _KillAfterStep5())


def _train_as_rank(rank: int, port: int, run: RunConfig, data: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train(run, data, folder)
