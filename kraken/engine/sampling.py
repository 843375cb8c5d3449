"""From logits to the next token and its log-probabilities, for a whole batch at once.

Randomness is counter-based: token number t of a request with seed s uses the one uniform number that (s, t) names. What
else is in the batch, or a restart in the middle, changes nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kraken.engine.protocol import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch to sample."""

    params: SamplingParams
    seed: int
    token_index: int
    """How many tokens of this request came before."""


def sample(logits_BV: Tensor, draws: list[Draw]) -> list[int]:
    """The next token of every row.

    Args:
        logits_BV: float32, padding ids already cut off.
    """
    greedy = logits_BV.argmax(dim=-1)
    if all(draw.params.temperature == 0.0 for draw in draws):
        return greedy.tolist()
    device = logits_BV.device
    temperature = torch.tensor([draw.params.temperature or 1.0 for draw in draws], device=device)
    probabilities = torch.softmax(logits_BV / temperature[:, None], dim=-1)
    sorted_BV, ids_BV = probabilities.sort(dim=-1, descending=True, stable=True)
    num_ids = logits_BV.shape[-1]
    top_k = torch.tensor([draw.params.top_k or num_ids for draw in draws], device=device)
    top_p = torch.tensor([draw.params.top_p for draw in draws], device=device)
    # a token stays while the mass before it is below top_p: the smallest set that reaches it
    mass_before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    ranks_V = torch.arange(num_ids, device=device)
    kept_BV = (ranks_V < top_k[:, None]) & ((mass_before_BV < top_p[:, None]) | (ranks_V == 0))
    cumulative_BV = torch.where(kept_BV, sorted_BV, 0.0).double().cumsum(dim=-1)
    uniform_B = torch.tensor(
        [uniform(draw.seed, draw.token_index) for draw in draws], device=device, dtype=torch.float64
    )
    targets_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    # the last kept rank bounds the choice where rounding puts the target at the very end
    chosen_B1 = torch.minimum(
        torch.searchsorted(cumulative_BV, targets_B1, right=True), kept_BV.sum(-1, keepdim=True) - 1
    )
    sampled = ids_BV.gather(-1, chosen_B1).squeeze(-1)
    is_greedy = torch.tensor([draw.params.temperature == 0.0 for draw in draws], device=device)
    return torch.where(is_greedy, greedy, sampled).tolist()


def uniform(seed: int, token_index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=token_index))
    return float(generator.random())


def token_logprobs(logits_TV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of the given tokens and of the `num_top` most likely ones, row by row.

    Args:
        logits_TV: float32, padding ids already cut off.
    """
    normaliser_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    ids_T1 = torch.tensor(token_ids, device=logits_TV.device)[:, None]
    # both subtract the same number from the same logits, so that equal tokens have equal floats
    chosen_T = (logits_TV.gather(-1, ids_T1) - normaliser_T1).squeeze(-1).tolist()
    if num_top == 0:
        return [TokenLogprobs(token_id=i, logprob=value, top=()) for i, value in zip(token_ids, chosen_T, strict=True)]
    top = logits_TV.topk(num_top, dim=-1)
    return [
        TokenLogprobs(token_id=token, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            token_ids, chosen_T, top.indices.tolist(), (top.values - normaliser_T1).tolist(), strict=True
        )
    ]
