"""Sampling with torch's operators: on every device, and on CUDA for truncated distributions.

The ids of a distribution are walked in ascending order until its cumulative weight passes the uniform number of the
row. Shape letters: B rows, V ids, G groups of ids, C candidates.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.batch import SamplingInput
from kraken.engine.protocol import SamplingParams

IDS_PER_GROUP = 256
"""The distribution is summed in groups of so many ids, so that sampling walks one group and not the vocabulary."""
NUM_CANDIDATES = 512
"""Truncation looks at so many most likely ids first; a flatter distribution is sorted whole."""
NOT_FINITE = -1
"""Sampled instead of an id where a row of logits holds NaN, or its largest logit is infinite."""


def most_likely(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the id with the largest logit, of equal ones the lowest; `NOT_FINITE` where there is none."""
    largest_B, ids_B = logits_BV.max(dim=-1)
    return ids_B.where(largest_B.abs() < torch.inf, NOT_FINITE)  # also where it is NaN


def sample_rows(logits_BV: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """int64 [B]: a random id of every row; all temperatures are above 0."""
    device = logits_BV.device
    temperature_B1 = torch.tensor([[row.params.temperature] for row in inputs], device=device)
    uniform_B1 = torch.tensor([[row.uniform] for row in inputs], device=device, dtype=torch.float64)
    # subtracted first, so that the largest stays finite at any temperature
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1
    truncated = [index for index, row in enumerate(inputs) if row.is_truncated]
    if not truncated:
        return _sample_untruncated(scaled_BV, uniform_B1)
    params = [inputs[index].params for index in truncated]
    if len(truncated) == len(inputs):
        return _sample_truncated(scaled_BV, uniform_B1, params)
    ids_B = torch.empty(len(inputs), dtype=torch.int64, device=device)
    whole = [index for index in range(len(inputs)) if index not in truncated]
    ids_B[whole] = _sample_untruncated(scaled_BV[whole], uniform_B1[whole])
    ids_B[truncated] = _sample_truncated(scaled_BV[truncated], uniform_B1[truncated], params)
    return ids_B


def _sample_untruncated(scaled_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Find the group of ids in which the cumulative distribution passes the uniform number, then the id in the
    group."""
    weights_BV = (scaled_BV - scaled_BV.amax(dim=-1, keepdim=True)).exp_()
    num_padded = -(-weights_BV.shape[-1] // IDS_PER_GROUP) * IDS_PER_GROUP
    weights_BGC = F.pad(weights_BV, (0, num_padded - weights_BV.shape[-1])).unflatten(-1, (-1, IDS_PER_GROUP))
    totals_BG = weights_BGC.sum(dim=-1, dtype=torch.float64)
    mass_BG = totals_BG.cumsum(dim=-1)
    target_B1 = uniform_B1 * mass_BG[:, -1:]
    group_B1 = _first_above(mass_BG, target_B1, totals_BG)
    rest_B1 = target_B1 - (mass_BG - totals_BG).gather(-1, group_B1)
    weights_BC = weights_BGC.gather(1, group_B1[..., None].expand(-1, -1, IDS_PER_GROUP))[:, 0].double()
    return (group_B1 * IDS_PER_GROUP + _first_above(weights_BC.cumsum(dim=-1), rest_B1, weights_BC)).squeeze(-1)


def _sample_truncated(scaled_BV: Tensor, uniform_B1: Tensor, params: list[SamplingParams]) -> Tensor:
    """Sample from the ids that truncation keeps. Most rows are decided by their most likely ids; the others are
    sorted."""
    # one more than is kept, to see whether the first dropped id is as likely as the last one kept
    most = max(p.top_k if p.top_k else NUM_CANDIDATES for p in params) + 1
    top = scaled_BV.topk(min(most, scaled_BV.shape[-1]), dim=-1)
    num_kept_B1 = _num_kept(top.values, scaled_BV.logsumexp(dim=-1, keepdim=True), params)[:, None]
    ranks_C = torch.arange(top.values.shape[-1], device=scaled_BV.device)
    weights_BC = torch.where(ranks_C < num_kept_B1, (top.values - top.values[:, :1]).exp(), 0.0).double()
    ids_BC, order_BC = top.indices.sort(dim=-1)
    weights_BC = weights_BC.gather(-1, order_BC)
    mass_BC = weights_BC.cumsum(dim=-1)
    chosen_B = ids_BC.gather(-1, _first_above(mass_BC, uniform_B1 * mass_BC[:, -1:], weights_BC)).squeeze(-1)
    next_B1 = top.values.gather(-1, num_kept_B1.clamp(max=len(ranks_C) - 1))
    undecided_B = (num_kept_B1 == len(ranks_C)) | (next_B1 == top.values.gather(-1, num_kept_B1 - 1))
    hard = undecided_B.squeeze(-1).nonzero().squeeze(-1).tolist()
    if hard:
        kept_BV = _truncate(scaled_BV[hard], [params[row] for row in hard])
        chosen_B[hard] = _sample_untruncated(kept_BV, uniform_B1[hard])
    return chosen_B


def _first_above(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The first index at which the cumulative weight exceeds the target [B, 1]. Rounding may leave none; then the last
    index with a positive weight."""
    last = ((weights > 0) * torch.arange(weights.shape[-1], device=weights.device)).amax(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


def _truncate(scaled_BV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Set the logits that top-k, top-p and min-p drop to -inf, each counted on the whole distribution."""
    sorted_BV = scaled_BV.sort(dim=-1, descending=True).values
    num_kept_B = _num_kept(sorted_BV, scaled_BV.logsumexp(dim=-1, keepdim=True), params)
    threshold_B1 = sorted_BV.gather(-1, num_kept_B[:, None] - 1)
    kept_BV = scaled_BV >= threshold_B1
    num_surplus = (kept_BV.sum(dim=-1) - num_kept_B).tolist()
    for row, surplus in enumerate(num_surplus):  # of equal logits at the threshold the lowest ids are kept
        if surplus > 0:
            ties = (scaled_BV[row] == threshold_B1[row]).nonzero().squeeze(-1)
            kept_BV[row, ties[len(ties) - surplus :]] = False
    return scaled_BV.masked_fill(~kept_BV, -torch.inf)


def _num_kept(sorted_BC: Tensor, normaliser_B1: Tensor, params: list[SamplingParams]) -> Tensor:
    """How many of the candidates each row keeps; at least one.

    Args:
        sorted_BC: the largest logits, or all of them, in descending order.
        normaliser_B1: logsumexp over all logits.
    """
    device = sorted_BC.device
    probabilities_BC = (sorted_BC - normaliser_B1).exp().double()
    mass_before_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC
    # top_p=1 keeps everything; compared as it is, a cumulative sum that rounds to 1 would drop the rest
    top_p_B1 = torch.tensor([[p.top_p if p.top_p < 1.0 else 2.0] for p in params], device=device)
    least_B1 = torch.tensor([[p.min_p] for p in params], device=device) * probabilities_BC[:, :1]
    # an id is kept while the mass before it is below top_p, which gives the smallest set that reaches it
    kept_BC = (mass_before_BC < top_p_B1) & (probabilities_BC >= least_B1)
    top_k_B = torch.tensor([p.top_k or sorted_BC.shape[-1] for p in params], device=device)
    return torch.minimum(kept_BC.sum(dim=-1), top_k_B).clamp(min=1)
