"""Muon for the matrices between hidden states, many of one shape at a time.

Of a matrix G with the momentum B <- lerp(B, G, 1 - m), the update is lerp(G, B, m) (Nesterov), made nearly orthogonal
by five Newton-Schulz steps and scaled to the size of AdamW's: 0.2 * sqrt(max(O, I)). Sources: Jordan and others, "Muon"
(2024), and Liu and others, "Muon is scalable for LLM training" (2025, arXiv 2502.16982); `torch.optim.Muon` with
adjust_lr_fn="match_rms_adamw" is the same, one matrix after the other.

Shape letters: M matrices of one shape, O their outputs (rows), I their inputs (columns).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kraken.model.architecture import Kraken, is_vector

MOMENTUM = 0.95
"""m above: what Jordan, and torch by default, take at every size of model."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EPSILON = 1e-7

VALUES_PER_BATCH = 2**24
"""Most values of the parameters that are updated together: they fill a GPU, with temporaries of some 0.3 GB."""


class Muon:
    """Hidden matrices of a model, and their momentum.

    Each is orthogonalised by itself: every way's q, k, v, gate, block of the conjunction and so on. So the result does
    not depend on which ways are held here.

    Args:
        compute: type of the Newton-Schulz products; everything else is in the parameters' own.
    """

    def __init__(self, model: Kraken, weight_decay: float, compute: torch.dtype):
        self._model, self._weight_decay, self._compute = model, weight_decay, compute
        self.parameters = {name: p for name, p in model.named_parameters() if is_hidden_matrix(name)}
        """Those that are updated here, by name."""
        self.moments: Mapping[str, Tensor] = {}
        """Parameter name -> B, in the parameter's shape; none before the first step."""
        self._batches = list(self._batched())

    @torch.no_grad()
    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Update every matrix once from its gradient.

        Args:
            skip: a boolean on the device; where it is true, parameters and momentum stay as they are.
        """
        if not self.moments:
            self.moments = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        for names in self._batches:
            self._update(names, rate, skip)

    def _batched(self) -> Iterator[list[str]]:
        """Names of the parameters that are updated together: their matrices have one shape."""
        same_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            same_shape[self._matrices(name, parameter).shape[1:]].append(name)
        for names in same_shape.values():
            count = max(1, VALUES_PER_BATCH // max(self.parameters[name].numel() for name in names))
            yield from (names[start : start + count] for start in range(0, len(names), count))

    def _update(self, names: list[str], rate: float, skip: Tensor | None) -> None:
        parameters: list[Tensor] = [self.parameters[name] for name in names]
        moments = [self.moments[name] for name in names]
        gradients = [_gradient(parameter) for parameter in parameters]
        applied: float | Tensor = rate
        if skip is not None:  # a moment that moves towards itself stays, and a rate of zero does the rest
            gradients = [torch.where(skip, b, g) for b, g in zip(moments, gradients, strict=True)]
            applied = rate * (~skip).to(parameters[0].dtype)
        torch._foreach_lerp_(moments, gradients, 1.0 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, moments, MOMENTUM)
        update_MOI = torch.cat([self._matrices(name, x) for name, x in zip(names, ahead, strict=True)])
        del gradients, ahead
        update_MOI = orthogonalised(update_MOI.to(self._compute))
        update_MOI = update_MOI.to(parameters[0].dtype, memory_format=torch.contiguous_format)
        update_MOI *= -0.2 * math.sqrt(max(update_MOI.shape[1:])) * applied
        torch._foreach_mul_(parameters, 1.0 - applied * self._weight_decay)
        matrices = [self._matrices(name, parameter) for name, parameter in zip(names, parameters, strict=True)]
        torch._foreach_add_(matrices, update_MOI.split([len(m) for m in matrices]))

    def _matrices(self, name: str, tensor: Tensor) -> Tensor:
        return matrices_of(name, tensor, self._model)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def is_hidden_matrix(parameter_name: str) -> bool:
    """Whether Muon takes a parameter: matrices between hidden states; not embeddings, gains and biases."""
    return not is_vector(parameter_name) and not parameter_name.startswith(("wte", "wpe"))


def matrices_of(name: str, tensor: Tensor, model: Kraken) -> Tensor:
    """The single matrices [M, O, I] that a parameter of that name consists of, as a view: ways, q, k, v and so on."""
    if name == "conjunction.weight":  # the ways lie side by side
        return tensor.unflatten(1, (-1, len(tensor))).transpose(0, 1)
    num_parts = 1
    if name.endswith("c_attn.weight"):
        num_parts = 3
    elif name.endswith("c_fc.weight") and model.config.activation == "swiglu":
        num_parts = 2
    return tensor.view(-1, tensor.shape[1] // num_parts, tensor.shape[2])


def orthogonalised(x_MOI: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1, by Newton-Schulz steps in the type that it comes in."""
    is_tall = x_MOI.shape[1] > x_MOI.shape[2]
    x = x_MOI.mT if is_tall else x_MOI  # so that the products below are of the smaller size
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
