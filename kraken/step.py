"""The training step: forward, backward, clipping and update, as fast as the device allows and never waiting for it."""

import os
import shutil

import torch
from torch import Tensor, nn

from kraken.config import ModelConfig, TrainConfig
from kraken.model import Alignment, Kraken
from kraken.optim import Optimizer, learning_rate
from kraken.parallel import Replicas
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

    def __init__(self, model_config: ModelConfig, config: TrainConfig, replicas: Replicas):
        self._config, self._replicas = config, replicas
        self.precision = choose_precision(config.precision, replicas.device)
        self.model = Kraken(model_config)
        self.model.init_weights(config.seed)
        self.model.to(device=replicas.device, dtype=self.precision.master)
        self.model.align(choose_alignment(replicas.device, self.precision))
        self.optimizer = Optimizer(config, self.model)
        self._loss = SummedLoss(self.model)
        self._replicated: nn.Module = self._loss
        self._bad_step = torch.full((), -1, device=replicas.device)

    def start(self, num_steps: int) -> None:
        """Compile, if that pays for so many steps, and join the replicas; the weights are final for the first step."""
        c, model, replicas = self._config, self.model, self._replicas
        tokens = num_steps * c.sequences_per_step * model.config.context_length / replicas.size
        flops = tokens * model.training_flops_per_token()
        if should_compile(c.compile, replicas.device, flops, torch.get_num_threads()):
            model.compile_parts()
        self._replicated = replicas.wrap(self._loss)

    def __call__(self, step: int, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Train on this rank's share of a step's batch.

        Returns:
            This rank's part of the mean loss in nats (they sum up to it) and the gradient norm, still on the device.
        """
        c, replicas = self._config, self._replicas
        size = c.sequences_per_microbatch
        microbatches = list(zip(inputs_BT.split(size), targets_BT.split(size), strict=True))
        loss_sum = torch.zeros((), device=replicas.device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            with replicas.accumulating(self._replicated, enabled=not is_last):
                with self.precision.autocast(replicas.device):
                    loss = self._replicated(inputs, targets)
                # the mean over this rank's tokens: averaging the replicas then gives the mean over the global batch
                loss = loss / targets_BT.numel()
                loss.backward()
            loss_sum += loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)
        is_first_bad = (self._bad_step < 0) & ~grad_norm.isfinite()
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self.optimizer.step(learning_rate(c, step))
        self.optimizer.zero_grad()
        return loss_sum / replicas.size, grad_norm

    def first_bad_step(self) -> int | None:
        """The first step whose gradient was not finite, the same on every rank; waits for the device."""
        step = int(self._bad_step)
        return None if step < 0 else step

    @torch.no_grad()
    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed loss in nats, for validation; on this rank alone."""
        with self.precision.autocast(self._replicas.device):
            return self._loss(inputs_BT, targets_BT)
