"""The training step: forward, backward, clipping and update, as fast as the device allows and never waiting for it."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kraken.config import ModelConfig, TrainConfig
from kraken.model import Kraken
from kraken.model.alignment import Alignment
from kraken.model.precision import Precision, choose_precision
from kraken.plan.cost import training_flops_per_token
from kraken.training.graph import GraphedBackward
from kraken.training.optim import Optimizer, learning_rate
from kraken.training.parallel import Mesh


def choose_alignment(device: torch.device, precision: Precision) -> Alignment:
    """What the forward pass rounds sizes up to: what tensor cores and fused attention want; a CPU wants nothing."""
    on_tensor_cores = device.type == "cuda" and precision.compute == torch.bfloat16
    return Alignment(width=64, head_size=8) if on_tensor_cores else Alignment()


LOSS_MEAN_SHARE = 0.05
"""Share of the newest loss in the running mean that spikes are measured from: it looks back some twenty steps."""

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
    """A model as a module whose forward is its loss, which is what FSDP wraps."""

    def __init__(self, model: Kraken):
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, num_ids: int | None = None) -> Tensor:
        return self.model.loss(inputs_BT, targets_BT, num_ids)


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
        mesh.shard(self._loss, self.model.h, self.precision.compute)
        self._loss.to_empty(device=mesh.device)
        self.model.init_weights(config.seed)
        self.model.align(choose_alignment(mesh.device, self.precision))
        if config.recompute_activations:
            self.model.recompute_activations()
        self.optimizer = Optimizer(config, self.model, self.precision.compute)
        self._graphed: GraphedBackward | None = None
        self.progress = torch.tensor([torch.nan, 0.0], device=mesh.device, dtype=torch.float64)
        """[running mean of the loss, bad steps]; with weights and moments, all that a step leaves to the next."""
        self.before_update: Callable[[], None] = lambda: None
        """Called before weights and moments change."""
        self._is_bad: list[tuple[int, Tensor]] = []

    def start(self, num_steps: int) -> None:
        """Compile, if that pays for so many steps; the weights are the first step's.

        On GPUs compiled steps are recorded as CUDA graphs too, with the ways' sums inside, except where FSDP gathers
        parameters while the step runs.
        """
        c, mesh = self._config, self._mesh
        tokens = num_steps * c.sequences_per_step * self.model.config.context_length / mesh.size
        flops = tokens * training_flops_per_token(self.model.config)
        compiles = should_compile(c.compile, mesh.device, flops, torch.get_num_threads())
        if compiles:
            self.model.compile_parts()
        if compiles and mesh.device.type == "cuda" and mesh.axis_size("shard") == 1:
            self._graphed = GraphedBackward(self._backward, self.model)

    def close(self) -> None:
        """Drop the CUDA graphs; NCCL's groups cannot end while graphs hold their collectives."""
        if self._graphed is not None:
            self._graphed.close()

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
            if self._graphed is None:
                loss_sum += self._backward(inputs, targets, targets_BT.numel())
            else:
                loss_sum += self._graphed(inputs, targets, targets_BT.numel(), is_first=index == 0)
        mesh.average_gradients(self.model)
        grad_norm = mesh.clip_gradients(self.model, c.clip_norm)
        loss = loss_sum / mesh.num_data_ranks
        is_bad = self._judge(loss, grad_norm)
        self._is_bad.append((step, is_bad))
        self.before_update()
        skips = c.on_bad_step == "skip"
        self.optimizer.step(learning_rate(c, step), skip=is_bad if skips else None)
        self.optimizer.zero_grad()
        return (torch.where(is_bad, 0.0, loss) if skips else loss), grad_norm

    def _backward(self, inputs_BT: Tensor, targets_BT: Tensor, num_tokens: int) -> Tensor:
        """Add a microbatch's gradients; returns its part of the mean loss over `num_tokens`."""
        with self.precision.autocast(self._mesh.device):
            loss = self._loss(inputs_BT, targets_BT)
        # the mean over this rank's tokens: averaging the data ranks then gives the mean over the global batch
        loss = loss / num_tokens
        loss.backward()
        return loss.detach()

    def _judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the step is bad, as a boolean on the device; equal on every rank, since what is judged is.

        Args:
            loss: this data rank's part.
        """
        c = self._config
        is_bad = ~grad_norm.isfinite()
        mean, num_skipped = self.progress
        if c.max_loss_spike:
            whole = self._mesh.sum(loss.clone())
            is_bad |= ~whole.isfinite() | (whole - mean > c.max_loss_spike)  # of which the second is never so at first
            moved = torch.where(mean.isnan(), whole, mean + LOSS_MEAN_SHARE * (whole - mean))
            mean = torch.where(is_bad, mean, moved)
        self.progress = torch.stack((mean, num_skipped + is_bad))
        return is_bad

    def bad_steps(self) -> list[int]:
        """The bad steps since it was asked last, the same on every rank; waits for the device."""
        judged, self._is_bad = self._is_bad, []
        if not judged:
            return []
        is_bad = torch.stack([flag for _, flag in judged]).tolist()
        return [step for (step, _), bad in zip(judged, is_bad, strict=True) if bad]

    @torch.no_grad()
    def loss(self, inputs_BT: Tensor, targets_BT: Tensor, num_ids: int) -> Tensor:
        """Summed loss in nats of this data rank's sequences, for validation.

        Args:
            num_ids: ids of the tokenizer; probabilities are over them, as in every engine. The objective of the step
                itself is over the padded vocabulary.
        """
        with self.precision.autocast(self._mesh.device):
            loss: Tensor = self._loss(inputs_BT, targets_BT, num_ids)
        self._mesh.reshard(self._loss)  # so that every parameter is its shard again
        return loss
