"""LayerNorm. It makes its input float32 and leaves its parameters as they are: without torch.compile, PyTorch then
refuses parameters of 2 bytes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    def __init__(
        self,
        *,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        has_weights: bool = True,
        has_bias: bool = True,
    ):
        super().__init__()
        for name, present, value in (("weight", has_weights, torch.ones), ("bias", has_bias, torch.zeros)):
            tensor = value(hidden_size, dtype=dtype, device=device)
            if present:
                setattr(self, name, nn.Parameter(tensor, False))
            else:
                self.register_buffer(name, tensor, persistent=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, residual: Any = ...) -> Tensor:
        assert residual is ...
        width = hidden_states.shape[-1:]
        normed = F.layer_norm(hidden_states.float(), width, self.weight, self.bias, self.variance_epsilon)
        return normed.to(hidden_states.dtype)
