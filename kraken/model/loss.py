"""The loss without the logits: cross-entropy of a tied head in chunks of tokens.

The logits of a batch are the largest tensor of a small model's training: 16 x 1024 tokens and 50,304 ids are 3.3 GB in
float32, and autograd keeps them twice. Here a chunk's logits become its share of the gradient at once and are dropped.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al., 2024).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.model.precision import compute_dtype
from kraken.model.ways import WayGroup

LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}
"""Logits that exist at a time: on a CPU about what its cache holds, on a GPU enough to fill it."""

KERNEL_TYPES = (torch.float32, torch.bfloat16)
"""Types of logits that a kernel turns into their gradient, on CUDA."""

ChunkGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_gradient(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss, and its gradient by the logits, in the logits' type."""
    exact = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    log_probabilities_TV = logits_TV.log_softmax(dim=-1, dtype=exact)
    columns_T1 = targets_T[:, None]
    loss = -log_probabilities_TV.gather(1, columns_T1).sum()
    # softmax minus one at the target
    gradient_TV = log_probabilities_TV.exp_().to(logits_TV.dtype)
    gradient_TV.scatter_add_(1, columns_T1, torch.full_like(columns_T1, -1, dtype=logits_TV.dtype))
    return loss, gradient_TV


def shared_chunk_gradient(
    logits_TV: Tensor, targets_T: Tensor, ways: WayGroup, vocab_size: int, num_ids: int
) -> tuple[Tensor, Tensor]:
    """`chunk_gradient` where V is this process's part of the vocabulary; the loss is that of all parts.

    Args:
        logits_TV: overwritten.
        num_ids: the softmax is over the ids below; a process may hold none of them.
    """
    rows = ways.part(vocab_size)
    if rows.stop > num_ids:  # finite, since a process that holds only padding ids subtracts its largest logit
        logits_TV[:, max(0, num_ids - rows.start) :] = torch.finfo(logits_TV.dtype).min
    functions = row_statistics, softmax_less_target
    if _has_kernel(logits_TV):
        from kraken.model import loss_kernel  # which imports Triton, and only CUDA has that

        functions = loss_kernel.row_statistics, loss_kernel.softmax_less_target
    statistics_of, gradient_of = functions
    columns_T = targets_T - rows.start  # outside of 0..V where another process holds the target
    largest, totals, target_logits = ways.all_gather(statistics_of(logits_TV, columns_T)).unbind(dim=-1)
    largest_T = largest.amax(dim=0)
    log_total_T = largest_T + (totals * (largest - largest_T).exp()).sum(dim=0).log()
    loss = (log_total_T - target_logits.sum(dim=0)).sum()
    return loss, gradient_of(logits_TV, columns_T, log_total_T)


def row_statistics(logits_TV: Tensor, columns_T: Tensor) -> Tensor:
    """[T, 3]: the largest logit, the sum of the exponentials less it, and the target's logit; at least float32.

    Args:
        columns_T: the targets; one outside of 0..V counts 0.
    """
    exact = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    is_here_T, columns_T1 = _here(columns_T, logits_TV.shape[1])
    largest_T1 = exact.amax(dim=-1, keepdim=True)
    target_T1 = exact.gather(1, columns_T1) * is_here_T[:, None]
    return torch.cat((largest_T1, (exact - largest_T1).exp().sum(dim=-1, keepdim=True), target_T1), dim=-1)


def softmax_less_target(logits_TV: Tensor, columns_T: Tensor, log_total_T: Tensor) -> Tensor:
    """The gradient by the logits, in their type, of log_total_T minus the target's logit."""
    is_here_T, columns_T1 = _here(columns_T, logits_TV.shape[1])
    gradient_TV = (logits_TV.to(log_total_T.dtype) - log_total_T[:, None]).exp_().to(logits_TV.dtype)
    return gradient_TV.scatter_add_(1, columns_T1, -is_here_T[:, None].to(logits_TV.dtype))


def _here(columns_T: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which targets are among the columns, and a column for each of them."""
    return (columns_T >= 0) & (columns_T < num_columns), columns_T.clamp(0, num_columns - 1)[:, None]


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in KERNEL_TYPES


def chunked_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    gradient: ChunkGradient = chunk_gradient,
    ways: WayGroup = WayGroup(),  # noqa: B008 - frozen
    vocab_size: int = 0,
    num_ids: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy in nats of softmax(hidden @ weight^T) against the targets; at least float32.

    Products are in autocast's type where it is on, softmax and sums in float32, or float64 where the inputs are.

    Args:
        gradient: `chunk_gradient`, or the same compiled; used where one process holds the whole vocabulary, and there
            is no kernel.
        ways: the processes that hold a part of `vocab_size` rows each; hidden states and loss are equal on all.
        num_ids: the softmax is over the rows of the ids below, which the targets must be; None takes every row.
    """
    if hidden_TD.is_cuda and compute_dtype(hidden_TD) in KERNEL_TYPES:
        from kraken.model import loss_kernel  # which imports Triton, and only CUDA has that

        gradient = loss_kernel.chunk_gradient
    if ways.size > 1:
        gradient = partial(shared_chunk_gradient, ways=ways, vocab_size=vocab_size, num_ids=num_ids or vocab_size)
    else:
        weight_VD = weight_VD[:num_ids]
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, gradient, ways, vocab_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        gradient: ChunkGradient,
        ways: WayGroup,
        vocab_size: int,
    ) -> Tensor:
        dtype = compute_dtype(hidden_TD)
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = hidden.new_zeros((), dtype=sum_dtype)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=sum_dtype) if needs_gradient else None
        rows = weight.shape[0] if ways.size == 1 else -(-vocab_size // ways.size)  # the same on every process
        num_chunks = -(-hidden.shape[0] * rows // LOGITS_PER_CHUNK[hidden.device.type])
        tokens_per_chunk = -(-hidden.shape[0] // num_chunks)  # chunks of one size, so that one compilation serves all
        for start in range(0, hidden.shape[0], tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            logits_TV = hidden[chunk] @ weight.T
            if ways.size == 1 and (hidden_gradient is None or weight_gradient is None):
                loss += F.cross_entropy(logits_TV.to(sum_dtype), targets_T[chunk], reduction="sum")
                continue
            chunk_loss, logits_gradient_TV = gradient(logits_TV, targets_T[chunk])
            loss += chunk_loss
            if hidden_gradient is not None and weight_gradient is not None:
                torch.mm(logits_gradient_TV, weight, out=hidden_gradient[chunk])
                _add_product(weight_gradient, logits_gradient_TV.T, hidden[chunk])
        if hidden_gradient is not None:
            ways.all_reduce(hidden_gradient)
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (scale,) = gradients
        by_hidden, by_weight = (hidden_gradient * scale).to(ctx.dtypes[0]), (weight_gradient * scale).to(ctx.dtypes[1])
        return by_hidden, by_weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, whose type may be wider than theirs."""
    if total.is_cuda and a.dtype != total.dtype:  # the product's own sums are in float32, and added as they are
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
