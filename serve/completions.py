"""What /v1/completions means: from a checked request to engine requests, and from engine outputs back to choices.

One call asks for n choices of each of its prompts. All of them run in the engine at the same time, under one roof: when
one fails or the client leaves, every one of them is aborted.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from kraken.engine.detokenizer import Detokenizer, generate_text
from kraken.engine.prompt import encode_for_completion
from kraken.engine.protocol import (
    Engine,
    EngineOverloaded,
    FinishReason,
    PromptOutput,
    Request,
    RequestError,
    TokenLogprobs,
    check_request,
)
from kraken.tokenizer import Tokenizer
from serve.protocol import ApiError, Choice, Completion, CompletionRequest, Logprobs, Prompt, StreamOptions, Usage

logger = logging.getLogger("ray.serve")

STREAM_END = "data: [DONE]\n\n"


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


class CompletionCall:
    """One call of /v1/completions. Pull `parts`, then either collect them or send them as frames."""

    def __init__(self, body: CompletionRequest, model: ServedModel, prompts: Sequence[tuple[int, ...]]):
        self._body = body
        self._model = model
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompt_tokens = sum(map(len, prompts))
        self._requests = [
            self._engine_request(prompt_ids, index=prompt_index * body.n + k, k=k)
            for prompt_index, prompt_ids in enumerate(prompts)
            for k in range(body.n)
        ]

    @classmethod
    async def prepare(cls, body: CompletionRequest, model: ServedModel) -> "CompletionCall":
        """Check a request against the model.

        Raises:
            ApiError, RequestError: the request can never be served.
        """
        model.require_name(body.model)
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

        def encode() -> list[tuple[int, ...]]:
            length = model.engine.info.context_length
            return [
                tuple(
                    encode_for_completion(model.tokenizer, prompt, body.max_tokens, length)
                    if isinstance(prompt, str)
                    else prompt
                )
                for prompt in prompts
            ]

        # Off the event loop: other streams go on while a long prompt is encoded.
        return cls(body, model, await asyncio.to_thread(encode))

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The parts of all choices as they come; closing it aborts what still runs."""
        choices = [self._choice_parts(index, request) for index, request in enumerate(self._requests)]
        async with aclosing(merge(choices)) as parts:
            async for part in parts:
                yield part

    async def collect(self, parts: AsyncGenerator[Part, None]) -> Completion:
        """The whole response, once everything is generated."""
        with_logprobs = self._body.logprobs is not None
        texts: list[list[str]] = [[] for _ in self._requests]
        logprobs = [Logprobs() if with_logprobs else None for _ in self._requests]
        prompt_logprobs: dict[int, Logprobs] = {}
        last: dict[int, Part] = {}
        async with aclosing(parts):
            async for part in parts:
                texts[part.index].append(part.text)
                if part.logprobs and (total := logprobs[part.index]):
                    total.extend(part.logprobs)
                if part.prompt_logprobs:
                    prompt_logprobs[part.index] = part.prompt_logprobs
                last[part.index] = part
        choices = [
            Choice(
                index=i,
                text="".join(text),
                logprobs=logprobs[i],
                finish_reason=last[i].finish_reason,
                prompt_logprobs=prompt_logprobs.get(i),
            )
            for i, text in enumerate(texts)
        ]
        return self._completion(choices, self._usage(part.num_tokens for part in last.values()))

    async def frames(self, first: Part, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[str, None]:
        """Server-sent events: a frame per part, the usage if asked for, the end mark; or, after a failure, an error."""
        num_tokens = dict.fromkeys(range(len(self._requests)), 0)
        options = self._body.stream_options or StreamOptions()
        has_usage_field = options.include_usage or options.continuous_usage_stats
        try:
            part: Part | None = first
            while part is not None:
                num_tokens[part.index] = part.num_tokens
                usage = self._usage_of(part) if options.continuous_usage_stats else None
                yield self._frame([part.choice()], usage, has_usage_field)
                part = await anext(parts, None)
            if options.include_usage:
                yield self._frame([], self._usage(num_tokens.values()), has_usage_field)
            yield STREAM_END
        except BaseException as error:  # the status line is long gone, so this frame is all that can still tell
            if is_end_of_task(error):
                raise
            log_failure(error)
            yield f"data: {ApiError.of(error).json()}\n\n"

    def _engine_request(self, prompt_ids: tuple[int, ...], index: int, k: int) -> Request:
        body, info = self._body, self._model.engine.info
        echoes_logprobs = body.echo and body.logprobs is not None
        asked = [count for count in (body.logprobs, body.prompt_logprobs) if count is not None]
        request = Request(
            id=f"{self._id}-{index}",
            prompt_ids=prompt_ids,
            sampling=body.sampling_params(info.eot_id, choice=k),
            num_logprobs=max(asked, default=None),
            prompt_logprobs=echoes_logprobs or body.prompt_logprobs is not None,
        )
        check_request(request, info)
        return request

    async def _choice_parts(self, index: int, request: Request) -> AsyncGenerator[Part, None]:
        """One choice. An echoed prompt goes out with the first output, when the engine has accepted the request."""
        engine, tokenizer = self._model.engine, self._model.tokenizer
        body = self._body
        prompt, starts = "", tuple[int, ...]()
        if body.echo or body.prompt_logprobs is not None:
            prompt, starts = _decode_prompt(tokenizer, request.prompt_ids)
        unsent = prompt if body.echo else ""
        offset = len(unsent)
        async with aclosing(generate_text(engine, tokenizer, request, self._body.stop)) as outputs:
            async for output in outputs:
                if isinstance(output, PromptOutput):
                    prompt_slots = list(zip(request.prompt_ids, starts, output.logprobs, strict=True))
                    echoed = self._logprobs(prompt_slots, body.logprobs if body.echo else None)
                    yield Part(index, unsent, echoed, None, 0, self._logprobs(prompt_slots, body.prompt_logprobs))
                else:
                    slots = [(token.token_id, offset + token.start, token.logprobs) for token in output.tokens]
                    logprobs = self._logprobs(slots, body.logprobs)
                    yield Part(index, unsent + output.text, logprobs, output.finish_reason, output.num_tokens)
                unsent = ""

    def _logprobs(self, slots: Iterable[tuple[int, int, TokenLogprobs | None]], num_top: int | None) -> Logprobs | None:
        """OpenAI's parallel lists from (token id, text offset, log-probabilities); None where nobody asked."""
        if num_top is None:
            return None
        result = Logprobs()
        for token_id, text_offset, logprobs in slots:
            result.tokens.append(token_label(self._model.tokenizer, token_id))
            result.text_offset.append(text_offset)
            result.token_logprobs.append(logprobs.logprob if logprobs else None)
            result.top_logprobs.append(self._top_logprobs(logprobs, num_top) if logprobs else None)
        return result

    def _top_logprobs(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The most likely tokens and, where it is not among them, the actual one."""
        pairs = (*logprobs.top[:num_top], (logprobs.token_id, logprobs.logprob))
        return {token_label(self._model.tokenizer, token_id): logprob for token_id, logprob in pairs}

    def _usage_of(self, part: Part) -> Usage:
        """Token counts of the choice that a frame belongs to, so far."""
        num_prompt_tokens = len(self._requests[part.index].prompt_ids)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=part.num_tokens,
            total_tokens=num_prompt_tokens + part.num_tokens,
        )

    def _usage(self, num_tokens: Iterable[int]) -> Usage:
        completion_tokens = sum(num_tokens)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
        )

    def _completion(self, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=choices,
            usage=usage,
            system_fingerprint=self._model.exchange_fingerprint,
        )

    def _frame(self, choices: list[Choice], usage: Usage | None, has_usage_field: bool) -> str:
        completion = self._completion(choices, usage)
        return f"data: {completion.model_dump_json(exclude=None if has_usage_field else {'usage'})}\n\n"


async def merge(sources: Sequence[AsyncGenerator[Part, None]]) -> AsyncGenerator[Part, None]:
    """Run every source at once and yield what comes, as it comes. The first failure ends them all, as does closing."""
    arrived: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()  # None: one source has ended

    async def pump(source: AsyncGenerator[Part, None]) -> None:
        try:
            async with aclosing(source):
                async for part in source:
                    arrived.put_nowait(part)
            arrived.put_nowait(None)
        except BaseException as error:
            if is_end_of_task(error):
                raise
            arrived.put_nowait(error)  # else the loop below would wait for this source for ever

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as the key of a JSON object: its text, or OpenAI's spelling of bytes that are no whole characters.

    Decoding such bytes would make different tokens look alike, and one would hide the other.
    """
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def is_end_of_task(error: BaseException) -> bool:
    """Whether an exception ends this task or process by intention, as a cancellation does. Any other is a failure, also
    one outside `Exception`: libraries in Rust raise `pyo3_runtime.PanicException`, which is a BaseException."""
    return isinstance(error, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt | SystemExit)


def log_failure(error: BaseException) -> None:
    """Record what is the server's fault; what the client did wrong, the client is told."""
    if not isinstance(error, ApiError | RequestError | EngineOverloaded):
        logger.error("A completion failed.", exc_info=error)


def _prompts_of(prompt: Prompt) -> list[str | list[int]]:
    """The four spellings of `prompt` as a list of texts or of lists of token ids."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return cast(list[str | list[int]], [prompt] if is_one else prompt)


def _decode_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Text of a prompt and where each of its tokens begins."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
    return "".join(piece.text for piece in pieces), tuple(start for piece in pieces for start in piece.starts)
