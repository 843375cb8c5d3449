"""The optimizer and its schedule: AdamW, or Muon beside it; the learning rate a pure function of the step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kraken.config import TrainConfig
from kraken.model.architecture import Kraken, is_vector
from kraken.training.muon import Muon

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENT = "momentum_buffer"


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the step that follows `step` finished ones: linear warm-up, then a cosine down to its final fraction."""
    warmup_steps = config.num_warmup_steps
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    final = config.learning_rate * config.final_learning_rate_fraction
    progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    return final + (config.learning_rate - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """Every parameter of a model under AdamW, or its hidden matrices under Muon and the rest under AdamW.

    Decay is on matrices and embeddings, none on gains and biases. Gradients are read from the parameters.

    Args:
        compute: type of Muon's matrix products.
    """

    def __init__(self, config: TrainConfig, model: Kraken, compute: torch.dtype):
        self._model = model
        self._muon = Muon(model, config.weight_decay, compute) if config.optimizer == "muon" else None
        by_muon = self._muon.parameters if self._muon else {}
        self._by_adamw = {name: p for name, p in model.named_parameters() if name not in by_muon}
        decayed = [p for name, p in self._by_adamw.items() if not is_vector(name)]
        not_decayed = [p for name, p in self._by_adamw.items() if is_vector(name)]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": not_decayed, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Update every parameter once, at this learning rate.

        Args:
            skip: a boolean on the device; where it is true, parameters, moments and counts of updates stay as they are.
        """
        for group in self._adamw.param_groups:
            group["lr"] = rate
        # what loss scaling calls an overflow: the fused kernels read it, so that nobody waits for the device
        self._adamw.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self._adamw.step()
        if self._muon is not None:
            self._muon.step(rate, skip)

    def zero_grad(self) -> None:
        """Drop the gradients: the next backward pass writes them, which is cheaper than adding to zeros."""
        self._model.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments as `{moment}.{parameter name}`, each as its parameter is held here, once a step was taken."""
        tensors = {
            f"{moment}.{name}": self._adamw.state[parameter][moment]
            for name, parameter in self._by_adamw.items()
            for moment in ADAMW_MOMENTS
        }
        moments = self._muon.moments if self._muon else {}
        return tensors | {f"{MUON_MOMENT}.{name}": moment for name, moment in moments.items()}

    def empty_state(self) -> dict[str, Tensor]:
        """Zeros where `state` has moments, before any step, for a checkpoint to fill."""
        parameters = {f"{moment}.{name}": p for name, p in self._by_adamw.items() for moment in ADAMW_MOMENTS}
        by_muon = self._muon.parameters if self._muon else {}
        parameters |= {f"{MUON_MOMENT}.{name}": p for name, p in by_muon.items()}
        return {key: torch.zeros_like(parameter, requires_grad=False) for key, parameter in parameters.items()}

    def load_state(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from the moments, each as its parameter is held here, after so many updates; they become ours."""
        for name, parameter in self._by_adamw.items():
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(num_updates), device=parameter.device),
                **{moment: moments[f"{moment}.{name}"] for moment in ADAMW_MOMENTS},
            }
        if self._muon is not None:
            self._muon.moments = {name: moments[f"{MUON_MOMENT}.{name}"] for name in self._muon.parameters}
