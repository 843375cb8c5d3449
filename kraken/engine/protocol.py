"""The interface between engines and their users: evaluation, serving, command lines.

Token ids in, token ids out. `generate` is an async iterator on the caller's event loop; leaving it early (`aclose`,
cancellation) aborts the request and frees its memory.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]


class EngineError(RuntimeError):
    """The engine failed; the request may be valid."""


class EngineOverloaded(EngineError):
    """The engine's queue is full; try again later."""


class RequestError(ValueError):
    """The request can never be served. The message names the field, the value and the way out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is sampled. The defaults are those of the OpenAI completions endpoint."""

    max_tokens: int = 16
    """Most tokens to generate; 0 scores the prompt only."""
    min_tokens: int = 0
    """Tokens to generate before a stop id may be sampled or a stop string takes effect."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 from all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one; 0 from all."""
    repetition_penalty: float = 1.0
    """Positive logits of ids that occurred in prompt or completion are divided by this, negative ones multiplied
    (Keskar et al., CTRL, 2019); 1 changes nothing."""
    seed: int | None = None
    """Equal seeds give equal tokens, independent of the other requests of a batch; None takes a random seed."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the completion. The id is reported as the last token."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens={self.max_tokens} is negative; 0 scores the prompt only")
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(f"temperature={self.temperature} is outside 0..100; 0 is greedy, 1 samples as trained")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p={self.top_p} is outside (0, 1]; 1 samples from every token")
        if self.top_k < 0:
            raise RequestError(f"top_k={self.top_k} is negative; 0 samples from every token")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p={self.min_p} is outside 0..1; 0 samples from every token")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise RequestError(
                f"repetition_penalty={self.repetition_penalty} is outside (0, 100]; 1 switches it off, 1.1 is mild"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is outside 0..max_tokens={self.max_tokens}; lower it or raise max_tokens"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed={self.seed} does not fit 64 bits; choose a smaller one")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete."""

    id: str
    """Unique among the requests in flight."""
    prompt_ids: tuple[int, ...]
    """At least one id. Prompt and `max_tokens` together must fit the context. A prompt that is only scored
    (`max_tokens=0`) may be one token longer, since its last token is never fed to the model."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_logprobs: int | None = None
    """Report each generated token's log-probability and this many most likely ones; None reports neither."""
    prompt_logprobs: bool = False
    """Report the same for the prompt's tokens, ahead of the first generated one."""
    return_logits: bool = False
    """Also return raw float32 logits, of the prompt's positions and of every step; for parity checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of the model's own distribution (temperature 1, no truncation, padding ids masked)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(id, log-probability), most likely first; may not contain `token_id`. Floats are bit-equal to `logprob`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOutput:
    """Scores of the prompt. Comes once, before any token, and only if the request asks for it."""

    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One entry per prompt token; None for the first, which has no distribution."""
    logits_TV: np.ndarray | None = None
    """float32 [prompt tokens fed to the model, ids of the tokenizer]; present if `return_logits` is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """One generated token."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    logits_V: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    """Set on the last token: `stop` for a stop id, `length` for `max_tokens` or the end of the context."""


Output = PromptOutput | TokenOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """An engine's kind and the properties of its model."""

    name: str
    """Kind of engine: `torch`, `echo`, ..."""
    context_length: int
    num_ids: int
    """Ids of the tokenizer. Every smaller id is valid; the padding ids of the vocabulary are never generated."""
    eot_id: int
    """The end-of-text id."""
    tokenizer_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot, cheap enough for a health check."""

    num_running: int
    num_queued: int
    num_finished: int
    num_aborted: int
    prompt_tokens: int
    completion_tokens: int
    healthy: bool
    num_preempted: int = 0
    """Number of times that a request lost its cache blocks and had to be recomputed."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were found in the cache."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks of the KV cache that no request holds."""


class Engine(Protocol):
    """See the module's docstring. Implementations: `TorchEngine`, `EchoEngine`."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield the prompt's output (when asked for), then one output per token.

        Raises:
            RequestError: before the first output, for a request that cannot be served.
            EngineOverloaded: before the first output, when the queue is full.
            EngineError: at any time, when the engine fails.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request and free its memory. No-op for an unknown or finished id."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """End every request and release the device. Safe to call twice."""
        ...


def check_request(request: Request, info: EngineInfo) -> None:
    """Check that an engine with this model can serve a request.

    Raises:
        RequestError: names the field, the value and the way out.
    """
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise RequestError("prompt is empty; give at least one token")
    for extreme in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= extreme < info.num_ids:
            raise RequestError(f"prompt holds token id {extreme}; this model's ids are 0..{info.num_ids - 1}")
    limit = info.context_length + (max_tokens == 0)
    if num_prompt + max_tokens > limit:
        raise RequestError(
            f"prompt of {num_prompt} tokens and max_tokens={max_tokens} exceed the context of {info.context_length}; "
            "shorten the prompt or lower max_tokens"
        )
    num_logprobs, stop_ids = request.num_logprobs, request.sampling.stop_ids
    if num_logprobs is not None and not 0 <= num_logprobs <= info.num_ids:
        raise RequestError(f"num_logprobs={num_logprobs} is outside 0..{info.num_ids}")
    bad = next((i for i in stop_ids if not 0 <= i < info.num_ids), None)
    if bad is not None:
        raise RequestError(f"stop_ids holds token id {bad}; this model's ids are 0..{info.num_ids - 1}")
    if request.sampling.min_tokens and len(set(stop_ids)) == info.num_ids:
        raise RequestError(
            f"stop_ids holds every id, which leaves none for min_tokens={request.sampling.min_tokens}; name fewer"
        )
