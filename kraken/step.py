"""The training step: forward, backward, clipping and update, as fast as the device allows and never waiting for it."""

import os
import shutil

import torch
from torch import Tensor, nn

from kraken.config import ModelConfig, TrainConfig
from kraken.model import Alignment, Kraken
from kraken.optim import Optimizer, learning_rate
from kraken.parallel import Mesh
from kraken.plan import training_flops_per_token
from kraken.precision import Precision, choose_precision


def choose_alignment(device: torch.device, precision: Precision) -> Alignment:
    """What the forward pass rounds sizes up to: what tensor cores and fused attention want; a CPU wants nothing."""
    on_tensor_cores = device.type == "cuda" and precision.compute == torch.bfloat16
    return Alignment(width=64, head_size=8) if on_tensor_cores else Alignment()


COMPILING_PAYS_S = 600.0
"""Estimated seconds of training from which a CPU run earns back the minute that compiling takes."""

CPU_FLOPS = 3e10
"""What a core does per second, for that estimate."""


def should_compile(setting: str, device: torch.device, training_flops: float, num_cores: int) -> bool:
    """Resolve `train.compile`: always on CUDA; on a CPU where there is a C++ compiler and enough to train.

    Args:
        training_flops: of this process, from its first step to its last.
    """
    if setting != "auto":
        return setting == "on"
    if device.type == "cuda":
        return True
    has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return has_compiler and training_flops / (CPU_FLOPS * num_cores) > COMPILING_PAYS_S


class SummedLoss(nn.Module):
    """A model as a module whose forward is its loss, which is what data parallelism wraps."""

    def __init__(self, model: Kraken):
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model.loss(inputs_BT, targets_BT)


class TrainingStep:
    """A model with its optimizer, and what turns a batch into an update.

    The weights are the seed's until a checkpoint fills `model` and `optimizer`; then comes `start`, then the steps.
    """

    def __init__(self, model_config: ModelConfig, config: TrainConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self.precision = choose_precision(config.precision, mesh.device)
        with torch.device("meta"):  # so that no process ever holds more than its own part and one whole parameter
            self.model = Kraken(model_config, mesh.ways).to(self.precision.master)
        self._loss = SummedLoss(self.model)
        mesh.shard(self._loss, self.model.h)
        self._loss.to_empty(device=mesh.device)
        self.model.init_weights(config.seed)
        self.model.align(choose_alignment(mesh.device, self.precision))
        if config.recompute_activations:
            self.model.recompute_activations()
        self.optimizer = Optimizer(config, self.model)
        self._averaged: nn.Module = self._loss
        self._bad_step = torch.full((), -1, device=mesh.device)

    def start(self, num_steps: int) -> None:
        """Compile, if that pays for so many steps, and join the other processes; the weights are the first step's."""
        c, mesh = self._config, self._mesh
        tokens = num_steps * c.sequences_per_step * self.model.config.context_length / mesh.size
        flops = tokens * training_flops_per_token(self.model.config)
        if should_compile(c.compile, mesh.device, flops, torch.get_num_threads()):
            self.model.compile_parts()
        self._averaged = mesh.wrap(self._loss)

    def __call__(self, step: int, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Train on this process's share of a step's batch.

        Returns:
            This data rank's part of the mean loss in nats (they sum up to it) and the gradient norm, on the device.
        """
        c, mesh = self._config, self._mesh
        size = c.sequences_per_microbatch
        microbatches = list(zip(inputs_BT.split(size), targets_BT.split(size), strict=True))
        loss_sum = torch.zeros((), device=mesh.device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            with mesh.accumulating(self._averaged, enabled=not is_last):
                with self.precision.autocast(mesh.device):
                    loss = self._averaged(inputs, targets)
                # the mean over this rank's tokens: averaging the data ranks then gives the mean over the global batch
                loss = loss / targets_BT.numel()
                loss.backward()
            loss_sum += loss.detach()
        grad_norm = mesh.clip_gradients(self.model, c.clip_norm)
        is_first_bad = (self._bad_step < 0) & ~grad_norm.isfinite()
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self.optimizer.step(learning_rate(c, step))
        self.optimizer.zero_grad()
        return loss_sum / mesh.num_data_ranks, grad_norm

    def first_bad_step(self) -> int | None:
        """The first step whose gradient was not finite, the same on every rank; waits for the device."""
        step = int(self._bad_step)
        return None if step < 0 else step

    @torch.no_grad()
    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed loss in nats of this data rank's sequences, for validation."""
        with self.precision.autocast(self._mesh.device):
            return self._loss(inputs_BT, targets_BT)
