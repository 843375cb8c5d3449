"""The interface between engines and their users: evaluation, serving, command lines.

Token ids in, token ids out. `generate` is an async iterator on the caller's event loop; leaving it early (`aclose`,
cancellation) aborts the request and frees its memory.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]


class EngineError(RuntimeError):
    """The engine failed; the request may be valid."""


class EngineOverloaded(EngineError):
    """The engine's queue is full; try again later."""


class RequestError(ValueError):
    """A request that can never be served; the message names the field, the value and the way out.

    Args:
        field: the field of `SamplingParams` or `Request` at fault, `prompt` or `stop`; None where no single one is.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class ContextLengthExceeded(RequestError):
    """Prompt and completion together are longer than the model's context.

    Args:
        num_prompt_tokens: tokens of the prompt; a lower bound where `is_lower_bound`.
        is_lower_bound: the prompt is so long that it was refused before it was encoded.
    """

    def __init__(self, num_prompt_tokens: int, max_tokens: int, context_length: int, is_lower_bound: bool = False):
        self.num_prompt_tokens, self.max_tokens, self.context_length = num_prompt_tokens, max_tokens, context_length
        self.is_lower_bound = is_lower_bound
        super().__init__(
            f"prompt of {'at least ' if is_lower_bound else ''}{num_prompt_tokens} tokens and max_tokens={max_tokens} "
            f"exceed the context of {context_length}; shorten the prompt or lower max_tokens",
            field="prompt",
        )


SMALLEST_FLOAT32 = 2.0**-126
"""The smallest float32 that hardware computes with everywhere. Engines hold sampling parameters in float32, where a
smaller one may become 0 and give 0/0."""
MIN_REPETITION_PENALTY = 0.01
"""A logit divided by a much smaller penalty could leave the range of float32."""
MAX_PENALTY = 2.0
"""OpenAI's range of `presence_penalty` and `frequency_penalty`."""
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_IDS = 1024
MORE_THAN_ALL_IDS = 2**30
"""No vocabulary has so many ids."""
MAX_STOP_STRINGS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is sampled. The defaults are those of the OpenAI completions endpoint."""

    max_tokens: int = 16
    """Most tokens to generate; 0 scores the prompt only."""
    min_tokens: int = 0
    """Tokens to generate before a stop id may be sampled or a stop string takes effect."""
    temperature: float = 1.0
    """0 takes the most likely token, and so does what float32 cannot hold (below 2 ** -126)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this. The set holds the most likely token in any
    case, and with 0 only that one. So it does with every value up to 1 / `MORE_THAN_ALL_IDS`, since the most likely
    token of every vocabulary is at least that likely; both are stored as `top_k=1`."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 or -1, or more than any vocabulary has, from all (stored as 0)."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one; 0 from all."""
    repetition_penalty: float = 1.0
    """Positive logits of ids that occurred in prompt or completion are divided by this, negative ones multiplied
    (Keskar et al., CTRL, 2019); 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of ids that the completion has generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from an id's logit as often as the completion has generated the id before."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit); each id once. The bias is added first, then the repetition penalty is applied,
    then the presence and frequency penalties. No reported log-probability contains any of them."""
    seed: int | None = None
    """Equal seeds give equal tokens, independent of the other requests of a batch; None takes a random seed."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the completion. The id is reported as the last token."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens={self.max_tokens} is negative; 0 scores the prompt only", "max_tokens")
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(
                f"temperature={self.temperature} is outside 0..100; 0 is greedy, 1 samples as trained", "temperature"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise RequestError(
                f"top_p={self.top_p} is outside 0..1; 1 samples from every token, 0 takes the most likely one", "top_p"
            )
        if self.top_k < -1:
            raise RequestError(f"top_k={self.top_k} is below -1; 0 and -1 sample from every token", "top_k")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p={self.min_p} is outside 0..1; 0 samples from every token", "min_p")
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= 100.0:
            raise RequestError(
                f"repetition_penalty={self.repetition_penalty} is outside {MIN_REPETITION_PENALTY}..100; "
                "1 switches it off, 1.1 is mild",
                "repetition_penalty",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise RequestError(
                    f"{name}={getattr(self, name)} is outside -{MAX_PENALTY:g}..{MAX_PENALTY:g}; 0 switches it off",
                    name,
                )
        self._check_logit_bias()
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is outside 0..max_tokens={self.max_tokens}; lower it or raise "
                "max_tokens",
                "min_tokens",
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed={self.seed} does not fit 64 bits; choose a smaller one", "seed")
        self._replace_what_engines_cannot_compute()

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASED_IDS:
            raise RequestError(
                f"logit_bias holds {len(self.logit_bias)} ids, at most {MAX_BIASED_IDS} are possible; name fewer",
                "logit_bias",
            )
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias holds an id twice; name each id once", "logit_bias")
        for token_id, bias in self.logit_bias:
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                raise RequestError(
                    f"logit_bias holds {bias} for id {token_id}, which is outside "
                    f"-{MAX_LOGIT_BIAS:g}..{MAX_LOGIT_BIAS:g}; -100 all but forbids an id",
                    "logit_bias",
                )

    def _replace_what_engines_cannot_compute(self) -> None:
        """Write values that float32 or int64 would distort as values that mean the same and that every engine holds.

        Otherwise a tiny `top_p` or `temperature` becomes 0 in float32 and the engine divides 0 by 0.
        """
        replaced: dict[str, float] = {}
        if self.temperature < SMALLEST_FLOAT32:
            replaced["temperature"] = 0.0
        if self.top_k == -1 or self.top_k >= MORE_THAN_ALL_IDS:
            replaced["top_k"] = 0
        if self.top_p <= 1.0 / MORE_THAN_ALL_IDS:  # the most likely of n ids has a probability of at least 1/n
            replaced |= {"top_p": 1.0, "top_k": 1}
        if self.min_p < SMALLEST_FLOAT32:  # weights that small are 0 in float32, and are never sampled anyway
            replaced["min_p"] = 0.0
        for name, value in replaced.items():
            object.__setattr__(self, name, value)


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
class Admission:
    """How a request left the queue. Comes with its first output, from engines that measure it."""

    queue_s: float
    """From the arrival at the engine until the first step that computes the request."""
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values were found in the cache; None if the engine does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOutput:
    """Scores of the prompt. Comes once, before any token, and only if the request asks for it."""

    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One entry per prompt token; None for the first, which has no distribution."""
    logits_TV: np.ndarray | None = None
    """float32 [prompt tokens fed to the model, ids of the tokenizer]; present if `return_logits` is set."""
    admission: Admission | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """One generated token."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    logits_V: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    """Set on the last token: `stop` for a stop id, `length` for `max_tokens` or the end of the context."""
    admission: Admission | None = field(default=None, compare=False)
    """Set on the first token, unless a `PromptOutput` with it came before."""


Output = PromptOutput | TokenOutput
Item = Output | BaseException | None
"""What `Engine.submit` passes on: an output; or the end of a request, None for a regular one, otherwise the exception
that ended the request."""


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
    failure: str = ""
    """Why the engine is not healthy, if it knows."""
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

    def submit(self, request: Request, receive: Callable[[Item], None]) -> Callable[[], None]:
        """Begin a request whose outputs are passed on instead of iterated over; `kraken.engine.inbox.Inbox` collects
        them for a reader.

        Args:
            receive: called on the event loop with every output of the request, and then once with its end. It must not
                raise.
        Returns:
            A function that aborts the request; no-op once the request has ended.
        Raises:
            RequestError: the request cannot be served. `check_request` runs before this returns; an engine may find
                other reasons later, and then passes the error to `receive` as the end of the request.
            EngineOverloaded, EngineError: as `generate`; they may also come as the end of the request.
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
        raise RequestError("prompt is empty; give at least one token", "prompt")
    for extreme in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= extreme < info.num_ids:
            raise RequestError(f"prompt holds token id {extreme}; this model's ids are 0..{info.num_ids - 1}", "prompt")
    limit = info.context_length + (max_tokens == 0)
    if num_prompt + max_tokens > limit:
        raise ContextLengthExceeded(num_prompt, max_tokens, info.context_length)
    num_logprobs, stop_ids = request.num_logprobs, request.sampling.stop_ids
    if num_logprobs is not None and not 0 <= num_logprobs <= info.num_ids:
        raise RequestError(f"num_logprobs={num_logprobs} is outside 0..{info.num_ids}", "num_logprobs")
    named = (("stop_ids", stop_ids), ("logit_bias", [token_id for token_id, _ in request.sampling.logit_bias]))
    for field_name, ids in named:
        bad = next((i for i in ids if not 0 <= i < info.num_ids), None)
        if bad is not None:
            raise RequestError(
                f"{field_name} holds token id {bad}; this model's ids are 0..{info.num_ids - 1}", field_name
            )
    if request.sampling.min_tokens and len(set(stop_ids)) == info.num_ids:
        raise RequestError(
            f"stop_ids holds every id, which leaves none for min_tokens={request.sampling.min_tokens}; name fewer",
            "stop_ids",
        )


def check_stop_strings(stop: Sequence[str]) -> None:
    """Refuse stop strings that a detokenizer could not watch for.

    Raises:
        RequestError: too many, or one is empty, which would end every completion before its first character.
    """
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop holds {len(stop)} strings, at most {MAX_STOP_STRINGS} are possible; name fewer", "stop"
        )
    if "" in stop:
        raise RequestError("stop holds an empty string, which nothing could come before; leave it out", "stop")
