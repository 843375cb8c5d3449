"""Training: one function for one process, torchrun or a Ray Train worker.

It resumes by itself from the newest good checkpoint in its folder, and ends in the same weights as a run that was never
stopped: the batch of a step and its learning rate depend on nothing but the step.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kraken.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from kraken.config import RunConfig
from kraken.data.loader import Loader, sequential_windows, split_windows
from kraken.data.shards import TokenShards
from kraken.manifest import ArtefactError, Manifest, Metric
from kraken.model import Kraken, next_token_loss
from kraken.optim import build_optimizer, learning_rate
from kraken.parallel import Replicas, join_replicas


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


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of the master weights and of the computation."""

    master: torch.dtype
    compute: torch.dtype

    @property
    def name(self) -> str:
        return str(self.compute).removeprefix("torch.")

    def autocast(self, device: torch.device) -> Any:
        """The context a forward pass runs in."""
        return torch.autocast(device.type, self.compute) if self.compute != self.master else nullcontext()


def choose_precision(setting: str, device: torch.device) -> Precision:
    """Resolve `train.precision` for a device.

    A CPU without bfloat16 instructions emulates them, some fifty times slower than float32.
    """
    if setting == "float64":
        return Precision(torch.float64, torch.float64)
    if setting == "auto":
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = device.type == "cuda" or capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        setting = "bfloat16" if fast else "float32"
    return Precision(torch.float32, torch.bfloat16 if setting == "bfloat16" else torch.float32)


def train(config: RunConfig, data_folder: Path, run_folder: Path, hooks: Hooks | None = None) -> dict[str, Metric]:
    """Train until `config.train.steps` optimizer steps are done, wherever the newest checkpoint left off.

    Args:
        data_folder: a prepared artefact.
        run_folder: shared by all ranks; checkpoints go here.

    Returns:
        The metrics of the finished run, the same on every rank.
    Raises:
        ArtefactError: data or checkpoint do not fit, the disk is full, or the loss is not a number.
    """
    with join_replicas(use_gpu=config.cluster.gpus_per_worker > 0) as replicas:
        return _Run(config, data_folder, run_folder, hooks or NoHooks(), replicas).run()


class _Run:
    """The state of one training run on one rank."""

    def __init__(self, config: RunConfig, data_folder: Path, run_folder: Path, hooks: Hooks, replicas: Replicas):
        self.config, self.run_folder, self.hooks, self.replicas = config, run_folder, hooks, replicas
        c = config.train
        if c.sequences_per_step % replicas.size:
            raise ArtefactError(
                f"train.sequences_per_step={c.sequences_per_step} is not divisible by the {replicas.size} processes; "
                f"choose a multiple of {replicas.size}"
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
        self.precision = choose_precision(c.precision, replicas.device)
        self.model = Kraken(config.model)
        self.model.init_weights(c.seed)
        self.model.to(device=replicas.device, dtype=self.precision.master)
        self.optimizer = build_optimizer(c, self.model)
        self.first_step = self._resume()
        self.replicated = replicas.wrap(self.model)

    def _resume(self) -> int:
        # every rank reads the same folder; the barrier keeps one from deleting what another is about to read
        checkpoint = newest_checkpoint(self.run_folder)
        step = 0
        if checkpoint is not None:
            step = load_checkpoint(
                checkpoint,
                self.model,
                self.optimizer,
                data_fingerprint=self.data.fingerprint,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
            )
        self.replicas.barrier()
        return step

    def run(self) -> dict[str, Metric]:
        c = self.config.train
        tokens_per_step = c.sequences_per_step * self.config.model.context_length
        started_at = interval_started_at = time.monotonic()
        loss_sum, interval_steps = torch.zeros((), device=self.replicas.device, dtype=torch.float64), 0
        validation_loss = math.nan
        for step in range(self.first_step, c.steps):
            rate = learning_rate(c, step)
            loss, grad_norm = self._step(step, rate)
            loss_sum += loss
            interval_steps += 1
            done = step + 1
            last = done == c.steps
            validated = last or done % c.validate_every == 0
            if validated:
                validation_loss = self._validate()
            if last or validated or done % c.log_every == 0:
                mean_loss = float(self.replicas.sum(loss_sum)) / interval_steps
                seconds = time.monotonic() - interval_started_at
                metrics = {
                    "step": float(done),
                    "loss": mean_loss,
                    "learning_rate": rate,
                    "grad_norm": float(grad_norm),
                    "tokens": float(done * tokens_per_step),
                    "tokens_per_second": interval_steps * tokens_per_step / seconds,
                    "tokens_per_second_per_device": interval_steps * tokens_per_step / seconds / self.replicas.size,
                    "seconds_left": (c.steps - done) * (time.monotonic() - started_at) / (done - self.first_step),
                }
                if validated:
                    metrics |= {"validation_loss": validation_loss, "validation_perplexity": math.exp(validation_loss)}
                self._require_finite(metrics, done)
                self.hooks.on_step(metrics)
                loss_sum.zero_()
                interval_started_at, interval_steps = time.monotonic(), 0
            if last or done % c.checkpoint_every == 0:
                self._checkpoint(done)
        if math.isnan(validation_loss):  # resumed after the last step: nothing was left to train
            validation_loss = self._validate()
        seconds = time.monotonic() - started_at
        trained_now = (c.steps - self.first_step) * tokens_per_step
        return {
            "parameters": Metric(self.model.num_parameters(), "parameters"),
            "steps": Metric(c.steps, "optimizer steps"),
            "train_tokens": Metric(c.steps * tokens_per_step, "tokens"),
            "final_validation_loss": Metric(validation_loss, "nats/token"),
            "mean_tokens_per_second": Metric(trained_now / seconds, "tokens/s"),
            "training_flops_per_token": Metric(self.model.training_flops_per_token(), "FLOP/token"),
            "num_workers": Metric(self.replicas.size, "processes"),
        }

    def _step(self, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's part of the mean loss and the gradient norm, still on the device."""
        c, replicas = self.config.train, self.replicas
        inputs_BT, targets_BT = (
            x.to(replicas.device, non_blocking=True) for x in self.loader.batch(step, replicas.rank, replicas.size)
        )
        microbatches = list(
            zip(inputs_BT.split(c.sequences_per_microbatch), targets_BT.split(c.sequences_per_microbatch), strict=True)
        )
        loss_sum = torch.zeros((), device=replicas.device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            with replicas.accumulating(self.replicated, enabled=not is_last):
                with self.precision.autocast(replicas.device):
                    logits = self.replicated(inputs)
                # the mean over this rank's tokens: averaging the replicas then gives the mean over the global batch
                loss = next_token_loss(logits, targets) / targets_BT.numel()
                loss.backward()
            loss_sum += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss_sum / replicas.size, grad_norm

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss in nats per token over the same windows every time, spread evenly over the validation split."""
        replicas = self.replicas
        total = torch.zeros(2, device=replicas.device, dtype=torch.float64)
        for windows in self._validation_batches():
            inputs, targets = (x.to(replicas.device) for x in split_windows(windows))
            with self.precision.autocast(replicas.device):
                logits = self.model(inputs)
            total += torch.stack([next_token_loss(logits, targets).double(), torch.tensor(float(targets.numel()))])
        loss_sum, num_tokens = replicas.sum(total).tolist()
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
        mine = chosen[self.replicas.rank :: self.replicas.size]
        for first in range(0, len(mine), c.sequences_per_microbatch):
            batch = mine[first : first + c.sequences_per_microbatch]
            yield np.stack([self.validation_shards.read(*span) for span in batch])

    def _checkpoint(self, step: int) -> None:
        path = self.run_folder / f"step_{step:09d}"
        failure = torch.zeros(1, device=self.replicas.device)
        error: ArtefactError | None = None
        if self.replicas.is_main:
            try:
                path = save_checkpoint(
                    self.run_folder,
                    step,
                    self.model,
                    self.optimizer,
                    data_fingerprint=self.data.fingerprint,
                    tokenizer_fingerprint=self.tokenizer_fingerprint,
                    keep=self.config.train.keep_checkpoints,
                )
            except ArtefactError as caught:
                error = caught
                failure += 1
        # a sum every rank waits for: it says that the checkpoint is finished, or that all must stop together
        if float(self.replicas.sum(failure)) > 0:
            raise error or ArtefactError(f"rank 0 could not write the checkpoint of step {step}")
        self.hooks.on_checkpoint(step, path)

    def _require_finite(self, metrics: dict[str, float], step: int) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                last_good = newest_checkpoint(self.run_folder)
                raise ArtefactError(
                    f"{name} is {metrics[name]} within the {self.config.train.log_every} steps up to step {step}; "
                    f"the last good checkpoint is {last_good or 'none'}; lower train.learning_rate or warm up longer"
                )
