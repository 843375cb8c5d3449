"""Training: one function for one process, torchrun or a Ray Train worker.

It resumes by itself from the newest good checkpoint in its folder, and ends in the same weights as a run that was never
stopped: the batch of a step and its learning rate depend on nothing but the step.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kraken.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from kraken.config import RunConfig
from kraken.data.loader import Loader, sequential_windows, split_windows
from kraken.data.prefetch import Prefetcher
from kraken.data.shards import TokenShards
from kraken.history import History, write_history
from kraken.manifest import ArtefactError, Manifest, Metric
from kraken.optim import learning_rate
from kraken.parallel import Mesh, join_mesh
from kraken.plan import num_parameters, training_flops_per_token
from kraken.step import TrainingStep


class Hooks(Protocol):
    """What training tells its caller, on every rank and equally often."""

    def on_step(self, metrics: dict[str, float]) -> None:
        """Every `train.log_every` steps; `metrics["step"]` counts finished optimizer steps."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After each checkpoint; `path` is finished."""


class NoHooks:
    """Training that tells nobody."""

    def on_step(self, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, step: int, path: Path) -> None: ...


def train(config: RunConfig, data_folder: Path, run_folder: Path, hooks: Hooks | None = None) -> dict[str, Metric]:
    """Train until `config.train.steps` optimizer steps are done, wherever the newest checkpoint left off.

    Args:
        data_folder: a prepared artefact.
        run_folder: shared by all ranks; checkpoints go here, and at the end the run's history.

    Returns:
        The metrics of the finished run, the same on every rank.
    Raises:
        ArtefactError: data or checkpoint do not fit, the disk is full, or the loss is not a number.
    """
    c = config.cluster
    with join_mesh(c.gpus_per_worker > 0, c.shard_size, c.way_size, c.overlap) as mesh:
        return _Run(config, data_folder, run_folder, hooks or NoHooks(), mesh).run()


class _Run:
    """The state of one training run on one rank."""

    def __init__(self, config: RunConfig, data_folder: Path, run_folder: Path, hooks: Hooks, mesh: Mesh):
        self.config, self.run_folder, self.hooks, self.mesh = config, run_folder, hooks, mesh
        c = config.train
        if c.sequences_per_step % mesh.num_data_ranks:
            raise ArtefactError(
                f"train.sequences_per_step={c.sequences_per_step} is not divisible by the {mesh.num_data_ranks} data "
                f"ranks; choose a multiple of {mesh.num_data_ranks}"
            )
        self.data = Manifest.read(data_folder)
        self.tokenizer_fingerprint: str = self.data.details["tokenizer_fingerprint"]
        num_ids = int(self.data.value("vocabulary_ids"))
        if num_ids > config.model.vocab_size:
            raise ArtefactError(
                f"the data's tokenizer has {num_ids} ids, model.vocab_size={config.model.vocab_size} is smaller; "
                "prepare the data with this config"
            )
        T = config.model.context_length
        self.loader = Loader(TokenShards(data_folder, "train", num_ids), T, c.sequences_per_step, c.seed)
        self.validation_shards = TokenShards(data_folder, "validation", num_ids)
        self.step = TrainingStep(config.model, c, mesh)
        self.first_step, self.history = self._resume()
        self.step.start(c.steps - self.first_step)
        self.tokens_per_step = c.sequences_per_step * T

    def _resume(self) -> tuple[int, History]:
        # every rank reads the same folder; the barrier keeps one from deleting what another is about to read
        checkpoint = newest_checkpoint(self.run_folder)
        step = 0
        history: History = []
        if checkpoint is not None:
            step, history = load_checkpoint(
                checkpoint,
                self.step.model,
                self.step.optimizer,
                data_fingerprint=self.data.fingerprint,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
            )
        self.mesh.barrier()
        return step, history

    def run(self) -> dict[str, Metric]:
        c, mesh = self.config.train, self.mesh
        with Prefetcher(
            self.loader, mesh.data_rank, mesh.num_data_ranks, mesh.device, self.first_step, c.steps
        ) as self.batches:
            self._run_steps()
        if self.history and "validation_loss" in self.history[-1]:
            validation_loss = self.history[-1]["validation_loss"]
        else:  # of a checkpoint that was written by a run with other settings
            validation_loss = self._validate()
        seconds = self.history[-1]["seconds"] if self.history else 0.0
        if mesh.is_main:
            write_history(self.run_folder, self.history)
        return {
            "parameters": Metric(num_parameters(self.config.model), "parameters"),
            "steps": Metric(c.steps, "optimizer steps"),
            "train_tokens": Metric(c.steps * self.tokens_per_step, "tokens"),
            "final_validation_loss": Metric(validation_loss, "nats/token"),
            "training_seconds": Metric(seconds, "s"),
            "mean_tokens_per_second": Metric(c.steps * self.tokens_per_step / max(seconds, 1e-9), "tokens/s"),
            "training_flops_per_token": Metric(training_flops_per_token(self.config.model), "FLOP/token"),
            "num_workers": Metric(mesh.size, "processes"),
        }

    def _run_steps(self) -> None:
        """Train, report and write checkpoints from the first step that is left to the last."""
        c = self.config.train
        seconds_before = self.history[-1]["seconds"] if self.history else 0.0
        started_at = interval_started_at = time.monotonic()
        loss_sum, interval_steps = torch.zeros((), device=self.mesh.device, dtype=torch.float64), 0
        for step in range(self.first_step, c.steps):
            with self._traced(step + 1):
                loss, grad_norm = self.step(step, *self.batches.batch(step))
            loss_sum += loss
            interval_steps += 1
            done = step + 1
            last = done == c.steps
            validates = last or done % c.validate_every == 0
            saves = last or done % c.checkpoint_every == 0
            if not (validates or saves or done % c.log_every == 0):
                continue
            self._require_finite()
            if validates or done % c.log_every == 0:
                # the sum waits for the device, so that the clock is read when the steps are done
                mean_loss = float(self.mesh.sum(loss_sum)) / interval_steps
                seconds = time.monotonic() - interval_started_at
                report = {
                    "step": float(done),
                    "loss": mean_loss,
                    "learning_rate": learning_rate(c, step),
                    "grad_norm": float(grad_norm),
                    "tokens": float(done * self.tokens_per_step),
                    "tokens_per_second": interval_steps * self.tokens_per_step / seconds,
                    "tokens_per_second_per_device": interval_steps * self.tokens_per_step / seconds / self.mesh.size,
                    "seconds": seconds_before + time.monotonic() - started_at,
                    "seconds_left": (c.steps - done) * (time.monotonic() - started_at) / (done - self.first_step),
                }
                if validates:
                    validation_loss = self._validate()
                    report |= {"validation_loss": validation_loss, "validation_perplexity": math.exp(validation_loss)}
                self.history.append(report)
                self.hooks.on_step(report)
                loss_sum.zero_()
                interval_started_at, interval_steps = time.monotonic(), 0
            if saves:
                self._checkpoint(done)

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
        """Mean loss in nats per token over the same windows every time, spread evenly over the validation split."""
        mesh = self.mesh
        total = torch.zeros(2, device=mesh.device, dtype=torch.float64)
        for windows in self._validation_batches():
            inputs, targets = (x.to(mesh.device) for x in split_windows(windows))
            total[0] += self.step.loss(inputs, targets)
            total[1] += targets.numel()
        loss_sum, num_tokens = mesh.sum(total).tolist()
        return loss_sum / num_tokens

    def _validation_batches(self) -> Iterator[np.ndarray]:
        """This rank's validation windows, [B, T+1] each."""
        c, T = self.config.train, self.config.model.context_length
        spans = [span for span in sequential_windows(self.validation_shards.num_tokens, T) if span[1] == T + 1]
        if not spans:
            raise ArtefactError(
                f"the validation split of {self.validation_shards.num_tokens} tokens is shorter than "
                f"model.context_length={T}; give more text, a larger data.validation_fraction or a shorter context"
            )
        chosen = spans[:: max(1, len(spans) // c.validation_windows)][: c.validation_windows]
        mine = chosen[self.mesh.data_rank :: self.mesh.num_data_ranks]
        for first in range(0, len(mine), c.sequences_per_microbatch):
            batch = mine[first : first + c.sequences_per_microbatch]
            yield np.stack([self.validation_shards.read(*span) for span in batch])

    def _checkpoint(self, step: int) -> None:
        path = self.run_folder / f"step_{step:09d}"
        weights, moments = self._whole_state()
        failure = torch.zeros(1, device=self.mesh.device)
        error: ArtefactError | None = None
        if self.mesh.is_main:
            try:
                path = save_checkpoint(
                    self.run_folder,
                    step,
                    self.config.model,
                    weights,
                    moments,
                    self.history,
                    data_fingerprint=self.data.fingerprint,
                    tokenizer_fingerprint=self.tokenizer_fingerprint,
                    keep=self.config.train.keep_checkpoints,
                )
            except ArtefactError as caught:
                error = caught
                failure += 1
        # a sum every rank waits for: it says that the checkpoint is finished, or that all must stop together
        if float(self.mesh.sum(failure)) > 0:
            raise error or ArtefactError(f"rank 0 could not write the checkpoint of step {step}")
        self.hooks.on_checkpoint(step, path)

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments put together on the main process; empty on the others, which take part in it."""
        weights, moments = {}, {}
        for name, parameter in self.step.model.named_parameters():
            if (whole := self.mesh.whole(name, parameter)) is not None:
                weights[name] = whole
        for key, moment in self.step.optimizer.state().items():
            if (whole := self.mesh.whole(key.partition(".")[2], moment)) is not None:
                moments[key] = whole
        return weights, moments

    def _require_finite(self) -> None:
        """Raises:
        ArtefactError: a step since the last report had a gradient that is not finite; its NaNs reach no checkpoint.
        """
        step = self.step.first_bad_step()
        if step is None:
            return
        first = step * self.config.train.sequences_per_step
        token = self.loader.window_start(first)
        last_good = newest_checkpoint(self.run_folder)
        raise ArtefactError(
            f"loss or gradient is not finite at step {step + 1}: training windows "
            f"{first}..{first + self.config.train.sequences_per_step - 1} of the global order, the first at token "
            f"{token} of the train split; the last good checkpoint is {last_good or 'none'}, and nothing was written "
            "since; lower train.learning_rate, warm up longer, or train in float32"
        )
