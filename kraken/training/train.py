"""Training: one function for one process, torchrun or a Ray Train worker.

It resumes by itself from the newest good checkpoint in its folder, and ends in the same weights as a run that was never
stopped: the batch of a step and its learning rate depend on nothing but the step.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kraken.checkpoint.folders import list_checkpoints, newest_checkpoint, reason, step_folder, step_of
from kraken.checkpoint.history import History, write_history
from kraken.checkpoint.reader import CheckpointReader
from kraken.config import RunConfig, to_dict
from kraken.data.loader import Loader, sequential_windows, split_windows
from kraken.data.prefetch import Prefetcher
from kraken.data.shards import TokenShards
from kraken.data.splits import require_windows
from kraken.manifest import ArtefactError, Manifest, Metric
from kraken.plan.cost import num_parameters, training_flops_per_token
from kraken.storage import Storage
from kraken.training.checkpointer import Checkpointer, Label
from kraken.training.control_all_reduce import ControlAllReduce
from kraken.training.parallel import Mesh, join_mesh
from kraken.training.report import Reporter
from kraken.training.state import TrainingState
from kraken.training.step import TrainingStep
from kraken.training.straggler_detector import StragglerDetector

MOST_SKIPPED_IN_A_ROW = 100
"""With `train.on_bad_step=skip`, training ends when reports over so many steps saw no good one."""


class Hooks(Protocol):
    """What training tells its caller, on every rank and equally often."""

    def on_step(self, metrics: dict[str, float]) -> None:
        """Every `train.log_every` steps; `metrics["step"]` counts finished optimizer steps."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Once the checkpoint of a step is finished and durable at `path`; at the same step on every rank, which is a
        later one than the checkpoint's when it was written in the background."""

    def stop_requested(self) -> bool:
        """Asked on every rank after every step; one rank that says True stops all of them, at the same step."""
        ...


class NoHooks:
    """Training that tells nobody, and that nobody stops."""

    def on_step(self, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, step: int, path: Path) -> None: ...

    def stop_requested(self) -> bool:
        return False


class TrainingStopped(Exception):
    """Training was asked to stop, and did after a checkpoint of everything until then.

    Args:
        step: optimizer steps that the checkpoint holds.
    """

    def __init__(self, step: int, checkpoint: Path | None = None):
        super().__init__(step, checkpoint)  # so that it can travel between processes
        self.step, self.checkpoint = step, checkpoint

    def __str__(self) -> str:
        return f"training stopped as asked after step {self.step} with {self.checkpoint}; run again to continue there"


def train(
    config: RunConfig, data_folder: Path, run_folder: Path, hooks: Hooks | None = None, storage: Storage | None = None
) -> dict[str, Metric]:
    """Train until `config.train.steps` optimizer steps are done, wherever the newest checkpoint left off.

    Args:
        data_folder: a prepared artefact.
        run_folder: shared by all ranks; checkpoints go here, and at the end the run's history.
        storage: where it is remote, `run_folder` lies in its cache, which each node has for itself, and every rank
            publishes its part of a checkpoint. Bring the newest one there before (`Storage.fetch_checkpoints`).

    Returns:
        The metrics of the finished run, the same on every rank.
    Raises:
        ArtefactError: data or checkpoint do not fit, nothing can be written, or the loss is not a number; as LostRanks,
            some ranks did not come to a collective.
        TrainingStopped: a rank's `stop_requested` said so; running again continues.
    """
    c = config.cluster
    use_gpu = c.gpus_per_worker > 0
    with join_mesh(use_gpu, c.shard_size, c.way_size, c.overlap, c.collective_timeout_s) as mesh:
        stragglers = StragglerDetector(mesh, c.collective_timeout_s)
        try:
            return _Run(config, data_folder, run_folder, hooks or NoHooks(), storage, mesh, stragglers).run()
        except RuntimeError as error:
            if (lost := stragglers.explain(error)) is not None:
                raise lost from error
            raise


def validation_report(loss: float) -> dict[str, float]:
    """What a validation adds to a step's report."""
    return {"validation_loss": loss, "validation_perplexity": math.exp(loss)}


class _Run:
    """The state of one training run on one rank."""

    def __init__(
        self,
        config: RunConfig,
        data_folder: Path,
        run_folder: Path,
        hooks: Hooks,
        storage: Storage | None,
        mesh: Mesh,
        stragglers: StragglerDetector,
    ):
        self.config, self.run_folder, self.hooks, self.mesh, self.stragglers = (
            config,
            run_folder,
            hooks,
            mesh,
            stragglers,
        )
        c = config.train
        if c.sequences_per_step % mesh.num_data_ranks:
            raise ArtefactError(
                f"train.sequences_per_step={c.sequences_per_step} is not divisible by the {mesh.num_data_ranks} data "
                f"ranks; choose a multiple of {mesh.num_data_ranks}"
            )
        self.data = Manifest.read(data_folder)
        self.num_ids = num_ids = int(self.data.value("vocabulary_ids"))
        if num_ids > config.model.vocab_size:
            raise ArtefactError(
                f"the data's tokenizer has {num_ids} ids, model.vocab_size={config.model.vocab_size} is smaller; "
                "prepare the data with this config"
            )
        T = config.model.context_length
        require_windows(data_folder, self.data, T)
        self.loader = Loader(TokenShards(data_folder, "train", num_ids), T, c.sequences_per_step, c.seed)
        self.validation_shards = TokenShards(data_folder, "validation", num_ids)
        # a little less than the gradients' collectives have: NCCL ends the process when their time is out, unexplained
        self.control = ControlAllReduce(mesh, 0.9 * config.cluster.collective_timeout_s)
        self.label = Label(
            config=to_dict(config.model),
            data_fingerprint=self.data.fingerprint,
            tokenizer_fingerprint=self.data.details["tokenizer_fingerprint"],
        )
        self.checkpointer = Checkpointer(
            run_folder,
            mesh,
            self.control,
            self.label,
            keep=c.keep_checkpoints,
            keep_best=c.keep_best_checkpoint,
            on_finished=hooks.on_checkpoint,
            storage=storage,
        )
        self.step = TrainingStep(config.model, c, mesh)
        self.state = TrainingState(self.step, mesh)
        self.first_step, self.history, self.interval = self._resume()
        self.step.start(c.steps - self.first_step)
        self.step.before_update = self.checkpointer.snapshot.before_change
        self.tokens_per_step = c.sequences_per_step * T
        self.num_skipped_in_a_row = 0

    def _resume(self) -> tuple[int, History, dict[str, float]]:
        """Continue from the newest checkpoint that is good on every rank; newer ones are set aside by all together.

        Raises:
            ArtefactError: the checkpoint does not fit, or holds skipped steps that the settings do not allow, or a run
                that began at another one's checkpoint has none left.
        """
        below = 10**9
        while True:
            steps = [step_of(path) for path in list_checkpoints(self.run_folder)] if self.mesh.is_main else []
            (newest,) = self.control.largest(max((step for step in steps if step < below), default=0))
            if newest == 0:
                if self.config.continue_from is not None:
                    raise ArtefactError(
                        f"{self.run_folder} continues {self.config.continue_from}, and no good checkpoint is left in "
                        "it; run the same command again while that training's checkpoint is there"
                    )
                return 0, [], {}
            wanted = self.state.to_read()
            checkpoint = None
            try:
                checkpoint = CheckpointReader(step_folder(self.run_folder, newest))
                checkpoint.verify(wanted.places)
            except ArtefactError as error:
                checkpoint = None
                warnings.warn(f"checkpoint passed over: {reason(error)}", stacklevel=2)
            (is_damaged,) = self.control.largest(int(checkpoint is None))
            if checkpoint is not None and not is_damaged:
                checkpoint.require_fitting(
                    self.config.model,
                    data_fingerprint=self.label.data_fingerprint,
                    tokenizer_fingerprint=self.label.tokenizer_fingerprint,
                )
                wanted.read(checkpoint)
                self.label = dataclasses.replace(self.label, origin=checkpoint.manifest.details.get("origin"))
                self.checkpointer.set_label(self.label)
                self._require_no_skipped_steps(newest)
                self._warn_of_late_trace(newest)
                history = checkpoint.read_history()
                self.control.largest(0)  # nobody deletes what another still reads
                return newest, history, checkpoint.manifest.details["interval"]
            self.checkpointer.set_aside(newest)
            below = newest

    def _require_no_skipped_steps(self, step: int) -> None:
        """Refuse a checkpoint of this run that has passed over bad steps, where the settings say to stop at them."""
        inherited = int((self.label.origin or {}).get("skipped_steps", 0))
        num_skipped = int(self.step.progress[1]) - inherited
        if num_skipped > 0 and self.config.train.on_bad_step == "stop":
            raise ArtefactError(
                f"{num_skipped} of the {step} steps in {step_folder(self.run_folder, step)} were bad and skipped, and "
                "train.on_bad_step=stop would have ended training there; go on with train.on_bad_step=skip, or change "
                "what makes them bad, such as train.learning_rate"
            )

    def _warn_of_late_trace(self, step: int) -> None:
        trace_step = self.config.train.trace_step
        has_trace = any(self.run_folder.glob("trace_rank_*.json"))
        if 0 < trace_step <= step and not has_trace and self.mesh.is_main:
            warnings.warn(
                f"train.trace_step={trace_step} is past: training continues at step {step}; for a trace choose a step "
                "after it",
                stacklevel=2,
            )

    def run(self) -> dict[str, Metric]:
        c, mesh = self.config.train, self.mesh
        self.reporter = Reporter(
            self.config,
            mesh,
            self.control,
            self.checkpointer,
            self.step.precision.compute,
            self.first_step,
            self.history,
            self.interval,
        )
        first, last = self.first_step, c.steps
        with (
            self.checkpointer,
            Prefetcher(self.loader, mesh.data_rank, mesh.num_data_ranks, mesh.device, first, last) as self.batches,
        ):
            try:
                self._run_steps()
            finally:
                self.step.close()
        if self.history and "validation_loss" in self.history[-1]:
            validation_loss = self.history[-1]["validation_loss"]
        else:  # of a checkpoint that was written by a run with other settings
            validation_loss = self._validate()
            if self.history and self.history[-1]["step"] == c.steps:
                self.history[-1] |= validation_report(validation_loss)
        seconds = self.history[-1]["seconds"] if self.history else 0.0
        if mesh.is_main:
            write_history(self.run_folder, self.history)
            self.checkpointer.delete_set_aside()
        self.control.close()
        return {
            "parameters": Metric(num_parameters(self.config.model), "parameters"),
            "steps": Metric(c.steps, "optimizer steps"),
            "train_tokens": Metric(c.steps * self.tokens_per_step, "tokens"),
            "final_validation_loss": Metric(validation_loss, "nats/token"),
            "training_seconds": Metric(seconds, "s"),
            "mean_tokens_per_second": Metric(c.steps * self.tokens_per_step / max(seconds, 1e-9), "tokens/s"),
            "training_flops_per_token": Metric(training_flops_per_token(self.config.model), "FLOP/token"),
            "skipped_steps": Metric(int(self.step.progress[1]), "optimizer steps"),
            "num_workers": Metric(mesh.size, "processes"),
        }

    def _run_steps(self) -> None:
        """Train, report and write checkpoints from the first step that is left to the last."""
        c = self.config.train
        for step in range(self.first_step, c.steps):
            with self._traced(step + 1):
                with self.reporter.data.running():
                    batch = self.batches.batch(step)
                loss, grad_norm = self.step(step, *batch)
            self.reporter.add(loss)
            done = step + 1
            self.stragglers.note(done)
            last = done == c.steps
            stops = self._read_control() and not last
            validates = last or done % c.validate_every == 0
            saves = last or stops or done % c.checkpoint_every == 0
            reports = validates or done % c.log_every == 0
            if saves or reports:
                # whoever waits for the device now would wait for absent ranks where no timeout of ours can tell who
                self.control.largest(0)
                self._judge_bad_steps(done)
            if reports:
                report = self.reporter.report(done, grad_norm)
                if validates:
                    validation_loss = self._validate()
                    report |= validation_report(validation_loss)
                self.history.append(report)
                self.hooks.on_step(report)
                self.reporter.restart_clock()
            if saves:
                self.checkpointer.start(done, self.state.to_write(), self.history, self.reporter.interval())
                if last or stops or not c.checkpoint_in_background:
                    self.checkpointer.finish(must_succeed=last or stops)
            if stops:
                raise TrainingStopped(done, step_folder(self.run_folder, done))
            if not last:
                self.control.start((int(bool(self.hooks.stop_requested())), *self.checkpointer.numbers()))

    def _read_control(self) -> bool:
        """Read what the ranks said after the step before; whether one of them asked to stop."""
        round_ = self.control.result()
        if round_ is None:
            return False
        stop, busy, failed_rank = round_
        self.checkpointer.advance(busy, failed_rank)
        return stop > 0

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        """Record the step that the settings ask for, on every process."""
        if step != self.config.train.trace_step:
            yield
            return
        with torch.profiler.profile() as profiler:
            yield
        self.run_folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.run_folder / f"trace_rank_{self.mesh.rank}.json"))

    def _validate(self) -> float:
        """Mean loss in nats per token over the same windows every time, spread evenly over the validation split.

        Probabilities are over the tokenizer's ids, without the padding ids of the vocabulary, as in every engine.
        """
        mesh = self.mesh
        total = torch.zeros(2, device=mesh.device, dtype=torch.float64)
        for windows in self._validation_batches():
            inputs, targets = (x.to(mesh.device) for x in split_windows(windows))
            total[0] += self.step.loss(inputs, targets, self.num_ids)
            total[1] += targets.numel()
        loss_sum, num_tokens = mesh.sum(total).tolist()
        return loss_sum / num_tokens

    def _validation_batches(self) -> Iterator[np.ndarray]:
        """This rank's validation windows, [B, T+1] each."""
        c, T = self.config.train, self.config.model.context_length
        spans = [span for span in sequential_windows(self.validation_shards.num_tokens, T) if span[1] == T + 1]
        assert spans, "the validation split's length is checked before the first step"
        chosen = spans[:: max(1, len(spans) // c.validation_windows)][: c.validation_windows]
        mine = chosen[self.mesh.data_rank :: self.mesh.num_data_ranks]
        for first in range(0, len(mine), c.sequences_per_microbatch):
            batch = mine[first : first + c.sequences_per_microbatch]
            yield np.stack([self.validation_shards.read(*span) for span in batch])

    def _judge_bad_steps(self, done: int) -> None:
        """Say which steps since the last look were bad; waits for the device.

        Raises:
            ArtefactError: there was one, and the settings say stop; what it spoiled reaches no checkpoint.
        """
        c = self.config.train
        bad_steps = self.step.bad_steps()
        if bad_steps and c.on_bad_step == "stop":
            self.checkpointer.finish()
            last_good = newest_checkpoint(self.run_folder)
            raise ArtefactError(
                f"{self._what_is_bad()} at step {bad_steps[0] + 1}: {self._windows(bad_steps[0])}; the last good "
                f"checkpoint is {last_good or 'none'}, and nothing was written since; pass over such steps with "
                "train.on_bad_step=skip, which continues from there, or lower train.learning_rate, warm up longer or "
                "train in float32, which continue from there with --continue-from latest"
            )
        self.reporter.num_bad += len(bad_steps)
        if self.mesh.is_main:
            for step in bad_steps:
                warnings.warn(f"step {step + 1} skipped, {self._what_is_bad()}: {self._windows(step)}", stacklevel=2)
        if self.reporter.num_bad < self.reporter.num_steps:
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_in_a_row += len(bad_steps)
        if self.num_skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise ArtefactError(
                f"the {self.num_skipped_in_a_row} steps until step {done} were all skipped, {self._what_is_bad()}; "
                "lower train.learning_rate, warm up longer, or raise train.max_loss_spike; --continue-from latest "
                "starts such a training from the newest checkpoint"
            )

    def _what_is_bad(self) -> str:
        spike = self.config.train.max_loss_spike
        return "loss or gradient is not finite" + (f" or {spike:g} nats above the running mean" if spike else "")

    def _windows(self, step: int) -> str:
        """Which data a step trained on."""
        count = self.config.train.sequences_per_step
        first = step * count
        return (
            f"training windows {first}..{first + count - 1} of the global order, the first at token "
            f"{self.loader.window_start(first)} of the train split"
        )
