"""The loss without the logits: cross-entropy of a tied head in chunks of tokens.

The logits of a batch are the largest tensor of a small model's training: 16 x 1024 tokens and 50,304 ids are 3.3 GB in
float32, and autograd keeps them twice. Here a chunk's logits become its share of the gradient at once and are dropped.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al., 2024).
"""

from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**26
"""Logits that exist at a time; 256 MB in float32."""


def chunked_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats of softmax(hidden @ weight^T) against the targets; at least float32.

    Products are in autocast's type where it is on, softmax and sums in float32, or float64 where the inputs are.
    """
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T)


def chunk_gradient(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss, and its gradient by the logits, in the logits' type."""
    exact = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    log_sums_T1 = exact.logsumexp(dim=-1, keepdim=True)
    loss = (log_sums_T1 - exact.gather(1, targets_T[:, None])).sum()
    gradient = (exact - log_sums_T1).exp()
    is_target_TV = torch.arange(exact.shape[1], device=exact.device) == targets_T[:, None]
    return loss, (gradient - is_target_TV.to(gradient.dtype)).to(logits_TV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        device = hidden_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = hidden.new_zeros((), dtype=sum_dtype)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=sum_dtype) if needs_gradient else None
        tokens_per_chunk = max(1, LOGITS_PER_CHUNK // len(weight))
        for start in range(0, len(hidden), tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            chunk_loss, logits_gradient = chunk_gradient(hidden[chunk] @ weight.T, targets_T[chunk])
            loss += chunk_loss
            if hidden_gradient is not None and weight_gradient is not None:
                torch.mm(logits_gradient, weight, out=hidden_gradient[chunk])
                weight_gradient += logits_gradient.T @ hidden[chunk]
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (scale,) = gradients
        return (hidden_gradient * scale).to(ctx.dtypes[0]), (weight_gradient * scale).to(ctx.dtypes[1]), None
