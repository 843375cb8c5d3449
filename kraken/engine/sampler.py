"""From logits to the next token and its log-probabilities, for a whole batch at once.

Randomness is counter-based: token number t of a request with seed s uses the one uniform number that (s, t) names, and
the distribution is walked in the order of the ids. What else is in the batch, or a restart in the middle, changes
nothing. Shape letters: B rows of a batch, V the tokenizer's ids (padding ids are cut off before), C candidates.
"""

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.batch import Chance
from kraken.engine.kernels.choose import has_kernels
from kraken.engine.kernels.cpu.kernels import NOT_FINITE, CpuKernels, cpu_kernels
from kraken.engine.protocol import SamplingParams, TokenLogprobs

IDS_PER_GROUP = 256
"""The distribution is summed in groups of this many ids, so that a draw walks one group and not the vocabulary."""
SEED_AND_INDEX = struct.Struct("<qQ")
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


def sample(logits_BV: Tensor, draws: Sequence[Draw], next_B: Tensor | None = None) -> list[int | None]:
    """The next token of every row; None where the logits are no numbers.

    Args:
        logits_BV: float32.
        next_B: what the pass has drawn by the rows' `chance_of`, where it has; see `ForwardOutput`.
    """
    given_BV, logits_BV = logits_BV, _constrain(logits_BV, draws)
    if logits_BV is not given_BV:
        next_B = None
    kernels = cpu_kernels(logits_BV.device, logits_BV.dtype)
    rows: list[int] = []
    if kernels is not None:
        chosen_B = _sample_on_cpu(kernels, logits_BV, draws)
    elif has_kernels(logits_BV):
        chosen_B = _sample_on_cuda(logits_BV, draws) if next_B is None else next_B
        rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0 and _truncates(draw.params)]
    else:
        best_B, chosen_B = logits_BV.max(dim=-1)  # the first of equally likely ones
        chosen_B = chosen_B.where(best_B.abs() < torch.inf, NOT_FINITE)  # also where it is not a number
        rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    drawn: list[int] = []
    if rows:
        few_BV = logits_BV if len(rows) == len(draws) else logits_BV[rows]
        drawn = _sample_rows(few_BV, [draws[row] for row in rows]).tolist()  # which waits for the device
    elif next_B is not None:
        torch.cuda.current_stream(logits_BV.device).synchronize()
    chosen = chosen_B.tolist()
    for row, token in zip(rows, drawn, strict=True):
        chosen[row] = token if chosen[row] != NOT_FINITE else NOT_FINITE
    return [None if token == NOT_FINITE else token for token in chosen]


def chance_of(draw: Draw) -> Chance:
    """By which a row is drawn that nothing truncates; of others the most likely id is found."""
    temperature = 0.0 if _truncates(draw.params) else draw.params.temperature
    return temperature, uniform(draw.seed, draw.token_index) if temperature > 0.0 else 0.0


def _sample_on_cuda(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [B] on CUDA, each by `chance_of`; `NOT_FINITE` where the logits are no numbers."""
    from kraken.engine.kernels.cuda import sampling as sampling_kernel  # which imports Triton, and only CUDA has that

    chances_B2 = torch.tensor([chance_of(draw) for draw in draws], dtype=torch.float64, device=logits_BV.device)
    return sampling_kernel.sample_ids(logits_BV, chances_B2)


def _sample_on_cpu(kernels: CpuKernels, logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [B] on a CPU; `NOT_FINITE` where the logits are no numbers."""
    params = [draw.params for draw in draws]
    uniforms = [uniform(draw.seed, draw.token_index) if draw.params.temperature > 0.0 else 0.0 for draw in draws]
    return kernels.sample(
        logits_BV if logits_BV.stride(-1) == 1 else logits_BV.contiguous(),
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor(uniforms, dtype=torch.float64),
    )


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


def _sample_rows(logits_BV: Tensor, draws: list[Draw]) -> Tensor:
    """A random token of every row, int64 [B]."""
    device = logits_BV.device
    temperature_B1 = torch.tensor([[draw.params.temperature] for draw in draws], device=device)
    uniform_B1 = torch.tensor(
        [[uniform(draw.seed, draw.token_index)] for draw in draws], device=device, dtype=torch.float64
    )
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1  # the largest is finite so
    cut = [row for row, draw in enumerate(draws) if _truncates(draw.params)]
    if not cut:
        return _sample_untruncated(scaled_BV, uniform_B1)
    params = [draws[row].params for row in cut]
    if len(cut) == len(draws):
        return _sample_truncated(scaled_BV, uniform_B1, params)
    chosen_B = torch.empty(len(draws), dtype=torch.int64, device=device)
    whole = [row for row in range(len(draws)) if row not in cut]
    chosen_B[whole] = _sample_untruncated(scaled_BV[whole], uniform_B1[whole])
    chosen_B[cut] = _sample_truncated(scaled_BV[cut], uniform_B1[cut], params)
    return chosen_B


def _sample_untruncated(scaled_BV: Tensor, uniform_B1: Tensor) -> Tensor:
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


def _sample_truncated(scaled_BV: Tensor, uniform_B1: Tensor, params: list[SamplingParams]) -> Tensor:
    """Draw from what truncation leaves, of the most likely ids alone where those decide."""
    # one more than can stay, to see whether the first that goes is as likely as the last that stays
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


def _num_kept(sorted_BC: Tensor, normaliser_B1: Tensor, params: list[SamplingParams]) -> Tensor:
    """How many of the most likely ids stay in each row, as far as these show; at least one.

    Args:
        sorted_BC: the largest logits, or all, descending.
        normaliser_B1: the logarithm of the sum over all.
    """
    device = sorted_BC.device
    probabilities_BC = (sorted_BC - normaliser_B1).exp().double()
    mass_before_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC
    # 1 keeps everything, though a sum may round to 1 before the last
    top_p_B1 = torch.tensor([[p.top_p if p.top_p < 1.0 else 2.0] for p in params], device=device)
    least_B1 = torch.tensor([[p.min_p] for p in params], device=device) * probabilities_BC[:, :1]
    # a token stays while the mass before it is below top_p: the smallest set that reaches it
    kept_BC = (mass_before_BC < top_p_B1) & (probabilities_BC >= least_B1)
    top_k_B = torch.tensor([p.top_k or sorted_BC.shape[-1] for p in params], device=device)
    return torch.minimum(kept_BC.sum(dim=-1), top_k_B).clamp(min=1)


def uniform(seed: int, token_index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(SEED_AND_INDEX.pack(seed, token_index), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53  # as many bits as a float holds


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
