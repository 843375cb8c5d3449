"""What /v1/completions means: from a checked request to engine requests, and from engine outputs back to choices.

One call asks for n choices of each of its prompts. All of them run in the engine at the same time and put their outputs
into one inbox, which the call reads: when one fails or the client leaves, every one of them is aborted.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

from pydantic import BaseModel

from kraken.engine.detokenizer import CompletionText, Detokenizer
from kraken.engine.inbox import Inbox, is_end_of_task
from kraken.engine.prompt import encode_for_completion, encode_prompt
from kraken.engine.protocol import (
    Admission,
    Engine,
    EngineOverloaded,
    FinishReason,
    Item,
    PromptOutput,
    Request,
    RequestError,
    TokenLogprobs,
    check_request,
)
from kraken.tokenizer import Tokenizer
from serve.chat_template import ChatTemplate
from serve.observer import CallObserver
from serve.protocol import (
    ApiError,
    Choice,
    Completion,
    CompletionRequest,
    Logprobs,
    Prompt,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)

logger = logging.getLogger("ray.serve")

STREAM_END = "data: [DONE]\n\n"
STOP_CHECK_INTERVAL_S = 0.05
"""How often a call that is not streamed looks for its stop strings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a replica serves. The engine and the tokenizer belong together: same fingerprint."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    exchange_fingerprint: str | None
    max_choices: int
    """Most choices of one call; they arrive together, so more than the engine queues could never be accepted."""
    created: int
    """Unix time at which it was loaded."""
    chat_template: ChatTemplate | None = None
    """Turns a conversation into a prompt; None if the model's folder has no template, as with base models."""
    stream_interval_s: float = 0.0
    """Tokens of a stream that come within so much time of a write share the next one."""

    def require_name(self, name: str) -> None:
        if name != self.name:
            message = f"The model {name!r} does not exist; this is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


@dataclass(frozen=True, slots=True)
class Part:
    """The next part of one choice."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    num_tokens: int
    """Tokens generated for this choice so far."""
    prompt_logprobs: Logprobs | None = None
    """Of the prompt, where they are asked for by themselves; with a choice's first part."""

    def choice(self) -> Choice:
        return Choice(
            index=self.index,
            text=self.text,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            prompt_logprobs=self.prompt_logprobs,
        )

    @classmethod
    def join(cls, parts: "Sequence[Part]") -> "Part":
        """Successive parts of a choice as one."""
        if len(parts) == 1:
            return parts[0]
        logprobs = [part.logprobs for part in parts if part.logprobs]
        return replace(
            parts[-1],
            text="".join(part.text for part in parts),
            logprobs=Logprobs.join(logprobs) if logprobs else None,
            prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs), None),
        )


class CompletionCall:
    """One call of /v1/completions. Pull `parts`, then either collect them or send them as frames."""

    id_prefix = "cmpl"

    def __init__(
        self,
        body: CompletionRequest,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        observer: CallObserver,
    ):
        self._body = body
        self._observer = observer
        self._model = model
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = [
            _Choice(index, self._engine_request(prompt_ids, index, k), body, model.tokenizer)
            for prompt_index, prompt_ids in enumerate(prompts)
            for k, index in enumerate(range(prompt_index * body.n, (prompt_index + 1) * body.n))
        ]

    @classmethod
    async def prepare(cls, body: CompletionRequest, model: ServedModel, observer: CallObserver | None = None) -> Self:
        """Check a request against the model.

        Args:
            observer: is told what happens; None tells nobody.

        Raises:
            ApiError, RequestError: the request can never be served.
        """
        observer = observer or CallObserver()
        model.require_name(body.model)
        observer.record.model = model.name
        prompts = _prompts_of(body.prompt)
        num_choices = len(prompts) * body.n
        if num_choices > model.max_choices:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={body.n} ask for {num_choices} choices, but one call may ask for "
                f"{model.max_choices}; split the call",
                param="prompt" if body.n == 1 else "n",
                code="invalid_value",
            )

        # Off the event loop: other streams go on while a long prompt is encoded.
        return cls(body, model, await asyncio.to_thread(_encode, body, prompts, model), observer)

    async def parts(self) -> AsyncGenerator[list[Part], None]:
        """The parts of all choices, those together that are ready together, at most one part of each choice; closing it
        aborts what still runs.

        Raises:
            RequestError, EngineOverloaded, EngineError: a choice failed, which ends the others.
        """
        engine, interval_s = self._model.engine, self._model.stream_interval_s
        loop, not_before = asyncio.get_running_loop(), 0.0
        if not self._body.stream:
            interval_s = STOP_CHECK_INTERVAL_S if self._body.stop else math.inf
            not_before = loop.time() + interval_s
        inbox, running = Inbox(), dict(enumerate(self._choices))
        failure: BaseException | None = None

        def receive(index: int, item: Item) -> None:
            self._observer.came(index, item)
            inbox.put(index, item)

        try:
            for choice in self._choices:
                choice.cancel = engine.submit(choice.request, partial(receive, choice.index))
            while running:
                ready: dict[int, list[Part]] = {}
                for index, item in await inbox.take(not_before):
                    if index not in running:  # ended by a stop string
                        continue
                    try:
                        part = self._take_in(running[index], item)
                    except BaseException as error:
                        failure = error
                        break
                    if part is not None:
                        ready.setdefault(index, []).append(part)
                        if part.finish_reason:
                            running.pop(index).cancel()
                            self._observer.choice_ended(part.finish_reason)
                if ready:
                    yield [Part.join(parts) for parts in ready.values()]
                if failure is not None:
                    raise failure
                not_before = loop.time() + interval_s
        except BaseException as error:
            failure = error
            raise
        finally:
            for choice in running.values():
                choice.cancel()
                self._observer.choice_ended("abort" if failure is None or is_end_of_task(failure) else "error")

    def _take_in(self, choice: "_Choice", item: Item) -> Part | None:
        is_first, num_before = not choice.has_begun, choice.text.num_tokens
        part = choice.take_in(item)
        if is_first:
            num_prompt_tokens = 0 if choice.index % self._body.n else len(choice.request.prompt_ids)
            self._observer.admitted(choice.admission, num_prompt_tokens)
        self._observer.tokens(choice.text.num_tokens - num_before)
        return part

    async def collect(self, parts: AsyncGenerator[list[Part], None]) -> BaseModel:
        """The whole response, once everything is generated."""
        found: list[list[Part]] = [[] for _ in self._choices]
        async with aclosing(parts):
            async for ready in parts:
                for part in ready:
                    found[part.index].append(part)
        whole = [Part.join(own) for own in found]
        return self.response(whole, self._usage(part.num_tokens for part in whole))

    async def frames(self, first: list[Part], parts: AsyncGenerator[list[Part], None]) -> AsyncGenerator[str, None]:
        """Server-sent events: a frame per part, the usage if asked for, the end mark; or, after a failure, an error.
        Frames that are ready together are one string."""
        num_tokens = dict.fromkeys(range(len(self._choices)), 0)
        options = self._body.stream_options or StreamOptions()
        has_usage_field = options.include_usage or options.continuous_usage_stats
        try:
            ready: list[Part] | None = first
            while ready is not None:
                frames = []
                for part in ready:
                    num_tokens[part.index] = part.num_tokens
                    usage = self._usage_of(part) if options.continuous_usage_stats else None
                    frames.append(self._frame([part], usage, has_usage_field))
                yield "".join(frames)
                ready = await anext(parts, None)
            if options.include_usage:
                yield self._frame([], self._usage(num_tokens.values()), has_usage_field)
            yield STREAM_END
        except BaseException as error:  # the status line is long gone, so this frame is all that can still tell
            if is_end_of_task(error):
                raise
            log_failure(error, self._observer.record.id)
            told = ApiError.of(error)
            self._observer.record.fail(told.body["error"])
            yield event(told.json())

    def _engine_request(self, prompt_ids: tuple[int, ...], index: int, k: int) -> Request:
        body, info = self._body, self._model.engine.info
        max_tokens = self.limit(body, info.context_length - len(prompt_ids))
        echoes_logprobs = body.echo and body.logprobs is not None
        asked = [count for count in (body.logprobs, body.prompt_logprobs) if count is not None]
        request = Request(
            id=f"{self._observer.record.id}/{self._id}-{index}",
            prompt_ids=prompt_ids,
            sampling=body.sampling_params(max_tokens, info.eot_id, choice=k),
            num_logprobs=max(asked, default=None),
            prompt_logprobs=echoes_logprobs or body.prompt_logprobs is not None,
        )
        check_request(request, info)
        return request

    def _usage_of(self, part: Part) -> Usage:
        """Token counts of the choice that a frame belongs to, so far."""
        return _usage([self._choices[part.index]], part.num_tokens)

    def _usage(self, num_tokens: Iterable[int]) -> Usage:
        """Token counts of the call. A prompt counts once, however many choices it has."""
        return _usage(self._choices[:: self._body.n], sum(num_tokens))

    @classmethod
    def limit(cls, body: CompletionRequest, room: int) -> int:
        """Most tokens of a choice.

        Args:
            room: tokens that the prompt leaves of the context.
        """
        return body.limit(room)

    @property
    def head(self) -> dict[str, Any]:
        """What every response and every frame of the call has."""
        return {
            "id": self._id,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.exchange_fingerprint,
        }

    def response(self, parts: Sequence[Part], usage: Usage) -> BaseModel:
        """The whole response, from one part for each choice."""
        return Completion(**self.head, choices=[part.choice() for part in parts], usage=usage)

    def chunk(self, parts: Sequence[Part], usage: Usage | None) -> BaseModel:
        """What one frame of a stream holds."""
        return Completion(**self.head, choices=[part.choice() for part in parts], usage=usage)

    def _frame(self, parts: Sequence[Part], usage: Usage | None, has_usage_field: bool) -> str:
        content = self.chunk(parts, usage)
        return event(content.model_dump_json(exclude=None if has_usage_field else {"usage"}))


class _Choice:
    """One choice of a call: from the engine's outputs to parts.

    An echoed prompt goes out with the first part, when the engine has accepted the request.
    """

    def __init__(self, index: int, request: Request, body: CompletionRequest, tokenizer: Tokenizer):
        self.index = index
        self.request = request
        skipped_ids = frozenset({tokenizer.eot_id} if body.skip_special_tokens else ())
        self.text = CompletionText(tokenizer, request, body.stop, skipped_ids)
        self.admission: Admission | None = None
        """Known from the first output on, if the engine measures it."""
        self.cancel: Callable[[], None] = lambda: None
        self.has_begun = False
        """Whether the engine has yielded something."""
        self._body = body
        self._tokenizer = tokenizer
        self._starts = tuple[int, ...]()
        self._unsent = ""
        if body.echo or body.prompt_logprobs is not None:
            prompt, self._starts = _decode_prompt(tokenizer, request.prompt_ids)
            self._unsent = prompt if body.echo else ""
        self._offset = len(self._unsent)

    def take_in(self, item: Item) -> Part | None:
        """The part that an output makes final, if any.

        Raises:
            BaseException: the item is an exception, or the end of a request that is not complete.
        """
        if isinstance(item, BaseException):
            raise item
        self.has_begun = True
        body, unsent = self._body, self._unsent
        if item is not None and item.admission is not None:
            self.admission = item.admission
        if isinstance(item, PromptOutput):
            prompt = list(zip(self.request.prompt_ids, self._starts, item.logprobs, strict=True))
            echoed = self._logprobs(prompt, body.logprobs if body.echo else None)
            part = Part(self.index, unsent, echoed, None, 0, self._logprobs(prompt, body.prompt_logprobs))
        else:
            output = self.text.end() if item is None else self.text.push(item)
            if output is None:
                return None
            slots = [(token.token_id, self._offset + token.start, token.logprobs) for token in output.tokens]
            logprobs = self._logprobs(slots, body.logprobs)
            part = Part(self.index, unsent + output.text, logprobs, output.finish_reason, output.num_tokens)
        self._unsent = ""
        return part

    def _logprobs(self, slots: Iterable[tuple[int, int, TokenLogprobs | None]], num_top: int | None) -> Logprobs | None:
        """OpenAI's parallel lists from (token id, text offset, log-probabilities); None where nobody asked."""
        if num_top is None:
            return None
        result = Logprobs()
        for token_id, text_offset, logprobs in slots:
            result.tokens.append(token_label(self._tokenizer, token_id))
            result.text_offset.append(text_offset)
            result.token_logprobs.append(logprobs.logprob if logprobs else None)
            result.top_logprobs.append(self._top_logprobs(logprobs, num_top) if logprobs else None)
        return result

    def _top_logprobs(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The most likely tokens and, where it is not among them, the actual one."""
        pairs = (*logprobs.top[:num_top], (logprobs.token_id, logprobs.logprob))
        return {token_label(self._tokenizer, token_id): logprob for token_id, logprob in pairs}


def event(content: str) -> str:
    """A server-sent event. JSON leaves U+2028 and U+2029 as they are, and some clients take them for ends of lines."""
    return f"data: {content}\n\n".replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as the key of a JSON object: its text, or OpenAI's spelling of bytes that are no whole characters.

    Decoding such bytes would make different tokens look alike, and one would hide the other.
    """
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def log_failure(error: BaseException, request_id: str) -> None:
    """Record what is the server's fault; what the client did wrong, the client is told."""
    if not isinstance(error, ApiError | RequestError | EngineOverloaded):
        logger.error("Request %s failed.", request_id, exc_info=error)


def _encode(body: CompletionRequest, prompts: list[str | list[int]], model: ServedModel) -> list[tuple[int, ...]]:
    """Ids of every prompt, cut to `truncate_prompt_tokens`.

    Raises:
        RequestError: a prompt cannot be encoded, or is longer than the context.
        ApiError: `truncate_prompt_tokens` is larger than the context.
    """
    tokenizer, length, num_last = model.tokenizer, model.engine.info.context_length, body.truncate_prompt_tokens
    if num_last is None:
        return [
            tuple(encode_for_completion(tokenizer, p, body.limit(), length) if isinstance(p, str) else p)
            for p in prompts
        ]
    if num_last > length:
        message = f"truncate_prompt_tokens={num_last} is larger than the context of {length} tokens; lower it"
        raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
    num_last = max(1, length - body.limit()) if num_last == -1 else num_last
    return [
        tuple(((encode_prompt(tokenizer, p) or [tokenizer.eot_id]) if isinstance(p, str) else p)[-num_last:])
        for p in prompts
    ]


def _usage(prompts: "Sequence[_Choice]", completion_tokens: int) -> Usage:
    """
    Args:
        prompts: one choice of each prompt.
    """
    prompt_tokens = sum(len(choice.request.prompt_ids) for choice in prompts)
    admissions = [choice.admission for choice in prompts if choice.admission]
    known = [admission.num_cached_tokens for admission in admissions if admission.num_cached_tokens is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(known)) if known else None,
    )


def _prompts_of(prompt: Prompt) -> list[str | list[int]]:
    """The four spellings of `prompt` as a list of texts or of lists of token ids."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return cast(list[str | list[int]], [prompt] if is_one else prompt)


def _decode_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Text of a prompt and where each of its tokens begins."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
    return "".join(piece.text for piece in pieces), tuple(start for piece in pieces for start in piece.starts)
