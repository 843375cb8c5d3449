"""From logits to the next token and its log-probabilities, for all rows of a step at once. Called by `EngineCore`.

Randomness is counter-based: token number t of a request with seed s uses the one uniform number that (s, t) gives, so
that neither the other requests of the batch nor a preemption changes a token.

Shape letters: B rows, T tokens, V the tokenizer's ids (the padding ids of the vocabulary are cut off before).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kraken.engine.batch import ForwardOutput, SamplingInput
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.kernels.torch.sampling import NOT_FINITE
from kraken.engine.protocol import TokenLogprobs


class Sampler:
    """Samples with the kernels of the device on which the logits are."""

    def __init__(self, kernels: TorchKernels):
        self._kernels = kernels

    def sample(self, output: ForwardOutput, inputs: Sequence[SamplingInput]) -> list[int | None]:
        """The next token of every row; None where the logits are not finite. Waits for the device.

        Args:
            output: rows of logits, and the ids that the forward pass has sampled if it did.
        """
        logits_BV = constrain(output.logits_RV, inputs)
        sampled_B = output.next_ids_R if logits_BV is output.logits_RV else None
        ids = self._kernels.sample(logits_BV, inputs, sampled_B)
        return [None if token_id == NOT_FINITE else token_id for token_id in ids]


def constrain(logits_BV: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Apply logit biases and penalties, and forbid stop ids before `min_tokens`. Copies the logits if it changes any.

    The order is that of vLLM: bias, repetition penalty, frequency and presence penalty.
    """
    if not any(map(_is_constrained, inputs)):
        return logits_BV
    biases = _Entries()
    repetitions = _Entries()
    subtracted = _Entries()
    forbidden = _Entries()
    for index, row in enumerate(inputs):
        params = row.params
        biases.add(index, params.logit_bias)
        if params.repetition_penalty != 1.0:
            repetitions.add(index, ((token_id, params.repetition_penalty) for token_id in row.seen_ids))
        if params.presence_penalty or params.frequency_penalty:
            subtracted.add(
                index,
                (
                    (token_id, params.frequency_penalty * count + params.presence_penalty)
                    for token_id, count in row.counts.items()
                ),
            )
        if row.token_index < params.min_tokens:
            forbidden.add(index, ((token_id, -torch.inf) for token_id in params.stop_ids))
    logits_BV = logits_BV.clone()
    if biases.rows:
        at, bias = biases.to(logits_BV)
        logits_BV[at] += bias
    if repetitions.rows:
        at, penalty = repetitions.to(logits_BV)
        values = logits_BV[at]
        logits_BV[at] = torch.where(values > 0, values / penalty, values * penalty)
    if subtracted.rows:
        at, penalty = subtracted.to(logits_BV)
        logits_BV[at] -= penalty
    if forbidden.rows:
        at, value = forbidden.to(logits_BV)
        logits_BV[at] = value
    return logits_BV


def _is_constrained(row: SamplingInput) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or (params.repetition_penalty != 1.0 and row.seen_ids)
        or ((params.presence_penalty or params.frequency_penalty) and row.counts)
        or row.token_index < params.min_tokens
    )


class _Entries:
    """Single logits of a batch, each at most once, with a value for each."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._ids: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, pairs: Iterable[tuple[int, float]]) -> None:
        """Add (id, value) pairs of one row."""
        for token_id, value in pairs:
            self.rows.append(row)
            self._ids.append(token_id)
            self._values.append(value)

    def to(self, logits_BV: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The index of the logits, and the values in their type, on their device."""
        at = torch.tensor([self.rows, self._ids], device=logits_BV.device)
        return (at[0], at[1]), torch.tensor(self._values, dtype=logits_BV.dtype, device=logits_BV.device)


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
