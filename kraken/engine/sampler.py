"""From logits to the next token and its log-probabilities, for all rows of a step at once. Called by `EngineCore`.

Randomness is counter-based: token number t of a request with seed s uses the one uniform number that (s, t) gives, so
that neither the other requests of the batch nor a preemption changes a token.

Shape letters: B rows, T tokens, V the tokenizer's ids (the padding ids of the vocabulary are cut off before).
"""

from collections.abc import Sequence

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
    """Apply the repetition penalty, and forbid stop ids before `min_tokens`. Copies the logits if it changes any."""
    penalised = [index for index, row in enumerate(inputs) if row.params.repetition_penalty != 1.0 and row.seen_ids]
    forbidding = [index for index, row in enumerate(inputs) if row.token_index < row.params.min_tokens]
    if not penalised and not forbidding:
        return logits_BV
    logits_BV = logits_BV.clone()
    for index in penalised:
        ids = torch.tensor(list(inputs[index].seen_ids), device=logits_BV.device)
        penalty, values = inputs[index].params.repetition_penalty, logits_BV[index, ids]
        logits_BV[index, ids] = torch.where(values > 0, values / penalty, values * penalty)
    for index in forbidding:
        logits_BV[index, list(inputs[index].params.stop_ids)] = -torch.inf
    return logits_BV


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
