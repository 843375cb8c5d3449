"""The optimizer and its schedule: AdamW, or Muon beside it; the learning rate a pure function of the step."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kraken.config import TrainConfig
from kraken.model import Kraken, is_vector

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENT = "momentum_buffer"


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the step that follows `step` finished ones: linear warm-up, then a cosine down to its final fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.learning_rate * config.final_learning_rate_fraction
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return final + (config.learning_rate - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def is_hidden_matrix(parameter_name: str) -> bool:
    """Whether Muon takes a parameter: matrices between hidden states; not embeddings, gains and biases."""
    return not is_vector(parameter_name) and not parameter_name.startswith(("wte", "wpe"))


class Optimizer:
    """Every parameter of a model under AdamW, or its hidden matrices under Muon and the rest under AdamW.

    Decay is on matrices and embeddings, none on gains and biases. Gradients are read from the parameters.
    """

    def __init__(self, config: TrainConfig, model: Kraken):
        self._config = config
        parameters = dict(model.named_parameters())
        self._by_muon = {n: p for n, p in parameters.items() if config.optimizer == "muon" and is_hidden_matrix(n)}
        self._by_adamw = {n: p for n, p in parameters.items() if n not in self._by_muon}
        decayed = [p for name, p in self._by_adamw.items() if not is_vector(name)]
        not_decayed = [p for name, p in self._by_adamw.items() if is_vector(name)]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": not_decayed, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
        # Muon orthogonalises one matrix at a time: every way's q, k, v, gate and so on is one, and shares our memory
        self._matrices = {
            name: [nn.Parameter(m.detach()) for m in matrices_of(name, p, model)] for name, p in self._by_muon.items()
        }
        self._model = model
        every_matrix = [matrix for matrices in self._matrices.values() for matrix in matrices]
        self._muon = (
            torch.optim.Muon(
                every_matrix,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.beta2,
                adjust_lr_fn="match_rms_adamw",
            )
            if every_matrix
            else None
        )

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Update every parameter once, at this learning rate.

        Args:
            skip: a boolean on the device; where it is true, parameters, moments and counts of updates stay as they are.
        """
        for optimizer in (self._adamw, self._muon):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate
        # what loss scaling calls an overflow: the fused kernels read it, so that nobody waits for the device
        self._adamw.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self._adamw.step()
        if self._muon is not None:
            for name, parameter in self._by_muon.items():
                assert parameter.grad is not None
                gradients = matrices_of(name, parameter.grad, self._model)
                for matrix, gradient in zip(self._matrices[name], gradients, strict=True):
                    matrix.grad = gradient
            with self._kept(self._muon, skip):
                self._muon.step()

    @contextmanager
    @torch.no_grad()
    def _kept(self, muon: torch.optim.Muon, skip: Tensor | None) -> Iterator[None]:
        """Undo what happens inside where `skip` is true, from copies, since torch's Muon has no switch for that."""
        if skip is None:
            yield
            return
        matrices = [matrix for matrices in self._matrices.values() for matrix in matrices]
        before = [
            (matrix.clone(), muon.state[matrix][MUON_MOMENT].clone() if muon.state[matrix] else None)
            for matrix in matrices
        ]
        yield
        for matrix, (weights, moment) in zip(matrices, before, strict=True):
            held = muon.state[matrix][MUON_MOMENT]
            matrix.copy_(torch.where(skip, weights, matrix))
            held.copy_(torch.where(skip, torch.zeros_like(held) if moment is None else moment, held))

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
        for name, matrices in self._matrices.items():
            assert self._muon is not None
            buffer = torch.empty_like(self._by_muon[name], requires_grad=False)
            for part, matrix in zip(matrices_of(name, buffer, self._model), matrices, strict=True):
                part.copy_(self._muon.state[matrix][MUON_MOMENT])
            tensors[f"{MUON_MOMENT}.{name}"] = buffer
        return tensors

    def empty_state(self) -> dict[str, Tensor]:
        """Zeros where `state` has moments, before any step, for a checkpoint to fill."""
        parameters = [(f"{moment}.{name}", p) for name, p in self._by_adamw.items() for moment in ADAMW_MOMENTS]
        parameters += [(f"{MUON_MOMENT}.{name}", p) for name, p in self._by_muon.items()]
        return {key: torch.zeros_like(parameter, requires_grad=False) for key, parameter in parameters}

    @torch.no_grad()
    def load_state(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from the moments, each as its parameter is held here, after so many updates; they become ours."""
        for name, parameter in self._by_adamw.items():
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(num_updates), device=parameter.device),
                **{moment: moments[f"{moment}.{name}"] for moment in ADAMW_MOMENTS},
            }
        for name, matrices in self._matrices.items():
            assert self._muon is not None
            buffer = moments[f"{MUON_MOMENT}.{name}"]
            for part, matrix in zip(matrices_of(name, buffer, self._model), matrices, strict=True):
                self._muon.state[matrix] = {MUON_MOMENT: part.clone()}


def matrices_of(name: str, tensor: Tensor, model: Kraken) -> list[Tensor]:
    """The single matrices [O, I] that a parameter of that name stacks: views of ways, of q, k, v, of gate and value."""
    if tensor.dim() == 2:
        return [tensor]
    num_parts = 1
    if name.endswith("c_attn.weight"):
        num_parts = 3
    elif name.endswith("c_fc.weight") and model.config.activation == "swiglu":
        num_parts = 2
    return [part for matrix in tensor.unbind(0) for part in matrix.chunk(num_parts)]
