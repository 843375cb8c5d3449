"""From logits to the next token and its log-probabilities, for a whole batch at once.

Randomness is counter-based: token number t of a request with seed s uses the one uniform number that (s, t) names, and
the distribution is walked in the order of the ids. What else is in the batch, or a restart in the middle, changes
nothing. Shape letters: B rows of a batch, R those among them that are drawn together, V the tokenizer's ids (padding
ids are cut off before), G groups of neighbouring ids, C candidates.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.protocol import SamplingParams, TokenLogprobs

IDS_PER_GROUP = 256
"""The distribution is summed in groups of this many ids, so that a draw walks one group and not the vocabulary."""
IDS_PER_MAXIMUM = 64
"""The largest logits are looked for in the groups of this many ids whose own largest are the largest."""
NUM_CANDIDATES = 512
"""Most likely ids among which truncation looks first; a distribution flatter than that is sorted whole."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch to sample."""

    params: SamplingParams
    seed: int
    token_index: int
    """How many tokens of this request came before."""
    seen_ids: Collection[int] = ()
    """Distinct ids of the prompt and the completion so far; read where there is a repetition penalty."""


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """The next token of every row; None where the logits are no numbers.

    Args:
        logits_BV: float32.
    """
    logits_BV = _constrain(logits_BV, draws)
    maxima_BG = _group_maxima(logits_BV)
    best_B, group_B = maxima_BG.max(dim=-1)
    random = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    chosen_B = torch.empty_like(group_B)
    if len(random) < len(draws):
        values_BC, ids_BC = _ids_of_groups(logits_BV, list(range(len(draws))), group_B[:, None])
        chosen_B = ids_BC.gather(-1, values_BC.argmax(dim=-1, keepdim=True)).squeeze(-1)
    if random:
        chosen_B[random] = _draw(logits_BV, maxima_BG, random, [draws[row] for row in random])
    is_sound = best_B.isfinite().tolist()
    return [token if sound else None for token, sound in zip(chosen_B.tolist(), is_sound, strict=True)]


def _constrain(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits after the repetition penalty and without the ids that may not come yet; a copy where they change."""
    penalised = [row for row, draw in enumerate(draws) if draw.params.repetition_penalty != 1.0 and draw.seen_ids]
    barred = [row for row, draw in enumerate(draws) if draw.token_index < draw.params.min_tokens]
    if not penalised and not barred:
        return logits_BV
    logits_BV = logits_BV.clone()
    for row in penalised:
        ids = torch.tensor(list(draws[row].seen_ids), device=logits_BV.device)
        penalty, values = draws[row].params.repetition_penalty, logits_BV[row, ids]
        logits_BV[row, ids] = torch.where(values > 0, values / penalty, values * penalty)
    for row in barred:
        logits_BV[row, list(draws[row].params.stop_ids)] = -torch.inf
    return logits_BV


def _group_maxima(logits_BV: Tensor) -> Tensor:
    """The largest logit of every `IDS_PER_MAXIMUM` neighbouring ids, [B, G]; the last group may have fewer."""
    num_whole = logits_BV.shape[-1] // IDS_PER_MAXIMUM
    whole_BV, rest_BV = logits_BV.tensor_split([num_whole * IDS_PER_MAXIMUM], dim=-1)
    maxima_BG = whole_BV.unflatten(-1, (num_whole, IDS_PER_MAXIMUM)).amax(dim=-1)
    return torch.cat([maxima_BG, rest_BV.amax(dim=-1, keepdim=True)], dim=-1) if rest_BV.shape[-1] else maxima_BG


def _ids_of_groups(logits_BV: Tensor, rows: list[int], groups_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Every id of some groups, [R, C]: the logits, -inf past the last id, and the ids."""
    device, num_ids = logits_BV.device, logits_BV.shape[-1]
    ids_RC = (groups_RG[..., None] * IDS_PER_MAXIMUM + torch.arange(IDS_PER_MAXIMUM, device=device)).flatten(1)
    is_past_RC = ids_RC >= num_ids
    ids_RC = ids_RC.clamp_(max=num_ids - 1)
    values_RC = logits_BV[torch.tensor(rows, device=device)[:, None], ids_RC]
    return values_RC.masked_fill_(is_past_RC, -torch.inf), ids_RC


def _most_likely(logits_BV: Tensor, maxima_BG: Tensor, rows: list[int], most: int) -> tuple[Tensor, Tensor]:
    """The `most` largest logits of some rows, descending, and their ids, both [R, C].

    A group is left out when as many others have a maximum at least as large: then so many logits are at least as large
    as any of its own. Which of equal logits at the end are given is left open.
    """
    num_groups = maxima_BG.shape[-1]
    if 2 * most >= num_groups:
        top = logits_BV[rows].topk(most, dim=-1)
        return top.values, top.indices
    groups_RG = maxima_BG[rows].topk(most, dim=-1, sorted=False).indices
    values_RC, ids_RC = _ids_of_groups(logits_BV, rows, groups_RG)
    top = values_RC.topk(most, dim=-1)
    return top.values, ids_RC.gather(-1, top.indices)


def _draw(logits_BV: Tensor, maxima_BG: Tensor, rows: list[int], draws: list[Draw]) -> Tensor:
    """A random token of some rows, int64 [R]."""
    device = logits_BV.device
    temperature_R1 = torch.tensor([[draw.params.temperature] for draw in draws], device=device)
    uniform_R1 = torch.tensor(
        [[uniform(draw.seed, draw.token_index)] for draw in draws], device=device, dtype=torch.float64
    )
    chosen_R = torch.empty(len(draws), dtype=torch.int64, device=device)
    whole = [i for i, draw in enumerate(draws) if not _truncates(draw.params)]
    if whole:
        scaled_RV = logits_BV[[rows[i] for i in whole]] / temperature_R1[whole]
        chosen_R[whole] = _draw_from_all(scaled_RV, uniform_R1[whole])
    cut = [i for i, draw in enumerate(draws) if _truncates(draw.params)]
    if cut:
        chosen_R[cut] = _draw_from_few(
            logits_BV,
            maxima_BG,
            [rows[i] for i in cut],
            temperature_R1[cut],
            uniform_R1[cut],
            [draws[i].params for i in cut],
        )
    return chosen_R


def _draw_from_all(scaled_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Walk the groups, then the ids of one group."""
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


def _draw_from_few(
    logits_BV: Tensor,
    maxima_BG: Tensor,
    rows: list[int],
    temperature_R1: Tensor,
    uniform_R1: Tensor,
    params: list[SamplingParams],
) -> Tensor:
    """Draw from what truncation leaves, of the most likely ids alone where those decide."""
    # one more than can stay, to see whether the first that goes is as likely as the last that stays
    most = max(p.top_k if p.top_k else NUM_CANDIDATES for p in params) + 1
    values_RC, ids_RC = _most_likely(logits_BV, maxima_BG, rows, min(most, logits_BV.shape[-1]))
    values_RC = values_RC / temperature_R1
    needs_mass = any(p.top_p < 1.0 or p.min_p > 0.0 for p in params)
    normaliser_R1 = (logits_BV[rows] / temperature_R1).logsumexp(dim=-1, keepdim=True) if needs_mass else None
    num_kept_R1 = _num_kept(values_RC, normaliser_R1, params)[:, None]
    ranks_C = torch.arange(values_RC.shape[-1], device=logits_BV.device)
    weights_RC = torch.where(ranks_C < num_kept_R1, (values_RC - values_RC[:, :1]).exp(), 0.0).double()
    sorted_ids_RC, order_RC = ids_RC.sort(dim=-1)
    weights_RC = weights_RC.gather(-1, order_RC)
    mass_RC = weights_RC.cumsum(dim=-1)
    chosen_R1 = sorted_ids_RC.gather(-1, _first_above(mass_RC, uniform_R1 * mass_RC[:, -1:], weights_RC))
    next_R1 = values_RC.gather(-1, num_kept_R1.clamp(max=len(ranks_C) - 1))
    undecided_R1 = (num_kept_R1 == len(ranks_C)) | (next_R1 == values_RC.gather(-1, num_kept_R1 - 1))
    hard = undecided_R1.squeeze(-1).nonzero().squeeze(-1).tolist()
    if hard:
        scaled_RV = logits_BV[[rows[i] for i in hard]] / temperature_R1[hard]
        kept_RV = _truncate(scaled_RV, [params[i] for i in hard])
        chosen_R1[hard] = _draw_from_all(kept_RV, uniform_R1[hard])[:, None]
    return chosen_R1.squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Where the cumulative weight exceeds the target [B, 1]; the last with any weight where rounding hides that."""
    last = ((weights > 0) * torch.arange(weights.shape[-1], device=weights.device)).amax(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _truncate(scaled_BV: Tensor, params: list[SamplingParams]) -> Tensor:
    """The logits without the ids that top-k, top-p and min-p leave out, each counted on the whole distribution."""
    sorted_BV = scaled_BV.sort(dim=-1, descending=True).values
    num_kept_B = _num_kept(sorted_BV, scaled_BV.logsumexp(dim=-1, keepdim=True), params)
    threshold_B1 = sorted_BV.gather(-1, num_kept_B[:, None] - 1)
    kept_BV = scaled_BV >= threshold_B1
    num_surplus = (kept_BV.sum(dim=-1) - num_kept_B).tolist()
    for row, surplus in enumerate(num_surplus):  # equal logits at the threshold: the lowest ids stay
        if surplus > 0:
            ties = (scaled_BV[row] == threshold_B1[row]).nonzero().squeeze(-1)
            kept_BV[row, ties[len(ties) - surplus :]] = False
    return scaled_BV.masked_fill(~kept_BV, -torch.inf)


def _num_kept(sorted_BC: Tensor, normaliser_B1: Tensor | None, params: list[SamplingParams]) -> Tensor:
    """How many of the most likely ids stay in each row, as far as these show; at least one.

    Args:
        sorted_BC: the largest logits, or all, descending.
        normaliser_B1: the logarithm of the sum over all; None where only top-k truncates.
    """
    device = sorted_BC.device
    top_k_B = torch.tensor([p.top_k or sorted_BC.shape[-1] for p in params], device=device)
    if normaliser_B1 is None:
        return top_k_B.clamp(max=sorted_BC.shape[-1])
    probabilities_BC = (sorted_BC - normaliser_B1).exp().double()
    mass_before_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC
    # 1 keeps everything, though a sum may round to 1 before the last
    top_p_B1 = torch.tensor([[p.top_p if p.top_p < 1.0 else 2.0] for p in params], device=device)
    least_B1 = torch.tensor([[p.min_p] for p in params], device=device) * probabilities_BC[:, :1]
    # a token stays while the mass before it is below top_p: the smallest set that reaches it
    kept_BC = (mass_before_BC < top_p_B1) & (probabilities_BC >= least_B1)
    return torch.minimum(kept_BC.sum(dim=-1), top_k_B).clamp(min=1)


def uniform(seed: int, token_index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=token_index))
    return float(generator.random())


def token_logprobs(logits_TV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of the given tokens and of the `num_top` most likely ones, row by row.

    Args:
        logits_TV: float32.
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
