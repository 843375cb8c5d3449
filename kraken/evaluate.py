"""Evaluation of a converted model, against any Engine: perplexity over a split, and parity with the trainer's model."""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kraken.data.loader import sequential_windows
from kraken.data.shards import TokenShards
from kraken.engine.protocol import Engine, Output, PromptOutput, Request, SamplingParams, TokenOutput
from kraken.manifest import ArtefactError, Metric
from kraken.model import Kraken
from kraken.tokenizer import Tokenizer, require_same_tokenizer

REQUESTS_IN_FLIGHT = 8
"""Windows handed to the engine at once; it decides what shares a step."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


class TokenSource(Protocol):
    """Tokens of a text; `TokenShards` are one."""

    num_tokens: int

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64."""


async def perplexity(
    engine: Engine, shards: TokenSource, tokenizer: Tokenizer, max_windows: int | None, on_progress: Progress
) -> dict[str, Metric]:
    """Score a split through the engine: every token but the first exactly once, in windows of the full context.

    Returns:
        Loss in nats per token, its perplexity, and bits per byte of the scored text, all weighted by tokens.
    Raises:
        ArtefactError: the shards were made with another tokenizer than the engine's.
    """
    require_same_tokenizer(tokenizer.fingerprint, engine.info.tokenizer_fingerprint, "the data", "the engine")
    spans = sequential_windows(shards.num_tokens, engine.info.context_length)[:max_windows]
    bytes_per_id = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.num_ids)])
    bytes_per_id[tokenizer.eot_id] = 0  # it ends a document but is no part of its text
    slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
    done = itertools.count(1)

    async def score(index: int, span: tuple[int, int]) -> tuple[float, int, int]:
        async with slots:
            ids = shards.read(*span)
            request = Request(
                id=f"perplexity-{index}",
                prompt_ids=tuple(ids.tolist()),
                sampling=SamplingParams(max_tokens=0),
                prompt_logprobs=True,
            )
            outputs = await collect(engine, request)
            logprobs = [entry.logprob for o in outputs if isinstance(o, PromptOutput) for entry in o.logprobs if entry]
            on_progress(next(done), len(spans))
            return -math.fsum(logprobs), len(logprobs), int(bytes_per_id[ids[1:]].sum())

    scores = await asyncio.gather(*(score(index, span) for index, span in enumerate(spans)))
    nats, num_tokens, num_bytes = (sum(column) for column in zip(*scores, strict=True))
    loss = nats / num_tokens
    return {
        "validation_loss": Metric(loss, "nats/token"),
        "validation_perplexity": Metric(math.exp(loss), "1"),
        "bits_per_byte": Metric(nats / math.log(2) / num_bytes, "bits/byte"),
        "scored_tokens": Metric(int(num_tokens), "tokens"),
        "scored_bytes": Metric(int(num_bytes), "bytes"),
    }


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an engine is from the trainer's model."""

    max_abs_diff: float
    """Largest absolute difference of log-probabilities over the tokenizer's ids, in nats: of every id at every position
    of prompts and generated tokens, of what the engine reports for the tokens themselves, and of the mean over a prompt
    that the trainer's validation gives."""
    num_tokens: int
    """Greedy tokens compared."""
    num_different: int
    """Greedy tokens that differ where the trainer's two best logits are further apart than the tolerance."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs_diff <= self.tolerance and self.num_different == 0


def parity_prompts(shards: TokenShards, context_length: int, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts spread over a split, each as long as leaves room for `num_tokens` in the context.

    Raises:
        ArtefactError: the split or the context is too short.
    """
    length = context_length - num_tokens
    if length < 1 or shards.num_tokens < length:
        raise ArtefactError(
            f"evaluate.parity_tokens={num_tokens} leaves no prompt in model.context_length={context_length} and a "
            f"{shards.split} split of {shards.num_tokens} tokens; lower evaluate.parity_tokens"
        )
    starts = np.linspace(0, shards.num_tokens - length, num_prompts, dtype=int)
    return [shards.read(int(start), length).tolist() for start in starts]


async def parity(
    engine: Engine, model: Kraken, prompts: Sequence[Sequence[int]], num_tokens: int, tolerance: float
) -> Parity:
    """Compare an engine with the model whose training wrote the checkpoint, by log-probabilities over the ids of the
    tokenizer.

    The engine decodes greedily with its cache; the model runs the whole sequence at once, with none. Raw logits alone
    would not do: they are equal also where one side normalises over more ids than the other.
    """
    num_ids = engine.info.num_ids
    max_abs_diff, num_different, num_compared = 0.0, 0, 0
    for index, prompt in enumerate(prompts):
        request = Request(
            id=f"parity-{index}",
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            num_logprobs=0,
            prompt_logprobs=True,
            return_logits=True,
        )
        outputs = await collect(engine, request)
        tokens = [o for o in outputs if isinstance(o, TokenOutput)]
        generated = [o.token_id for o in tokens]
        prompt_logits = [o.logits_TV for o in outputs if isinstance(o, PromptOutput)]
        # the prompt's last position already predicts the first token, so decoding contributes one row less
        found_TV = np.concatenate([*prompt_logits, *(o.logits_V[None] for o in tokens[1:] if o.logits_V is not None)])
        entries = [e for o in outputs if isinstance(o, PromptOutput) for e in o.logprobs if e is not None]
        reported_T = np.array([e.logprob for e in (*entries, *(o.logprobs for o in tokens)) if e is not None])
        following = [*prompt[1:], *generated]
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *generated[:-1]]])
            expected_TV = model(ids)[0, :, :num_ids].float().numpy()
            validation_loss = float(model.loss(ids, torch.tensor([following]), num_ids)) / len(following)
        expected_logprobs_TV = log_softmax(expected_TV)
        differences = (
            np.abs(log_softmax(found_TV) - expected_logprobs_TV).max(),
            np.abs(reported_T - expected_logprobs_TV[np.arange(len(following)), following]).max(),
            abs(reported_T.mean() + validation_loss),
        )
        max_abs_diff = max(max_abs_diff, *map(float, differences))
        predicting_TV = expected_TV[len(prompt) - 1 :]
        best_two = np.sort(predicting_TV, axis=-1)[:, -2:]
        decided = best_two[:, 1] - best_two[:, 0] > tolerance
        num_different += int((decided & (predicting_TV.argmax(axis=-1) != generated)).sum())
        num_compared += len(generated)
    return Parity(max_abs_diff, num_compared, num_different, tolerance)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64."""
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=-1, keepdims=True))


async def collect(engine: Engine, request: Request) -> list[Output]:
    """Every output of one request."""
    return [output async for output in engine.generate(request)]
