"""What travels over HTTP: typed requests, responses and stream frames in OpenAI's shapes, and its error object.

A request is checked whole before anything runs. A field that OpenAI knows and this endpoint does not have is refused
unless it says "off"; a field nobody knows is refused. null means the field's default, as it does for OpenAI.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.types import FailFast
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from kraken.engine.protocol import EngineError, EngineOverloaded, FinishReason, RequestError
from kraken.tokenizer import END_OF_TEXT

MAX_CHOICES_PER_PROMPT = 128
MAX_STOP_STRINGS = 4
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 5
RETRY_AFTER_S = 1


class ApiError(Exception):
    """An error as OpenAI's clients read it.

    Args:
        status: HTTP status; a 4xx is the client's fault.
        message: says what to change; never holds prompt or output text.
        param: the request's field at fault.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def json(self) -> str:
        return json.dumps(self.body)

    def response(self) -> Response:
        return Response(self.json(), self.status, self.headers, media_type="application/json")

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """Any error as one for the client; what is unexpected shows nothing of its inside."""
        match error:
            case ApiError():
                return error
            case RequestError():
                return cls(400, str(error), code="invalid_value")
            case EngineOverloaded():
                headers = {"Retry-After": str(RETRY_AFTER_S)}
                return cls(429, str(error), kind="rate_limit_error", code="engine_overloaded", headers=headers)
            case EngineError():
                return _server_error("the engine failed", code="engine_failed")
            case _:
                return _server_error("the server failed", code=None)


def _server_error(message: str, code: str | None) -> ApiError:
    # Clients repeat a 5xx up to twice; the engine would fail again, so they are told not to.
    return ApiError(500, message, kind="server_error", code=code, headers={"x-should-retry": "false"})


def bad_request(error: ValidationError) -> ApiError:
    """The first thing wrong with a request, without the value that was sent."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    path = [part for part in first["loc"] if isinstance(part, str)]
    param = context.get("param") or (path[0] if path else None)
    if kind == "extra_forbidden":
        param = ".".join(path)
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is missing; it must be given", param=param, code="missing_required_parameter")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({context['error']})", code="invalid_json")
    if kind == "unsupported_parameter":
        return ApiError(400, first["msg"], param=param, code=kind)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    message = first["msg"] if kind in ("invalid_type", "invalid_value") else f"{param}: {first['msg']}"
    return ApiError(400, message, param=param, code=code)


class _Body(BaseModel):
    """A request: JSON types as they are (no "16" for 16), nothing unknown, null as if left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


def _check_prompt(value: Any) -> Any:
    """Plain code, since a union of four types would read a long list four times and report every element of it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds == {list}:
            kinds = {type(token_id) for ids in value for token_id in ids} | {int}
        if kinds in ({str}, {int}):
            return value
    raise PydanticCustomError(
        "invalid_type",
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists, and not be empty",
    )


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_check_prompt)]
Ids = Annotated[list[int], FailFast()]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class StreamOptions(_Body):
    include_usage: bool = False
    """End the stream with a frame of token counts."""
    include_obfuscation: Literal[False] = False
    """Padding against traffic analysis, which OpenAI adds; not here."""


class CompletionRequest(_Body):
    """POST /v1/completions."""

    model: str
    prompt: Prompt = END_OF_TEXT
    """Left out: the beginning of a new document."""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """0 needs `echo`: the prompt comes back, scored."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not OpenAI's: draw from this many most likely tokens; 0 draws from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Not OpenAI's: draw from tokens at least this share as likely as the most likely one."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Not OpenAI's: above 1, tokens of prompt and completion become less likely."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Not OpenAI's: tokens before the end of text, a stop id or a stop string may end the completion."""
    ignore_eos: bool = False
    """Not OpenAI's: the end of text is a token like any other."""
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STOP_TOKEN_IDS)] = []
    """Not OpenAI's: ids that end the completion; they are no part of its text."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Not OpenAI's: the prompt's log-probabilities, in a field of their own, with this many most likely tokens."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_CHOICES_PER_PROMPT)] | None = None
    """Choice k of a prompt draws with seed + k."""
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    user: str | None = None
    """The client's own label of its end user, which has no effect; OpenAI defines it so."""
    best_of: int | None = None
    suffix: str = ""
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> "CompletionRequest":
        for param in ("suffix", "logit_bias", "presence_penalty", "frequency_penalty"):
            if getattr(self, param):
                raise _refusal("unsupported_parameter", param, f"{param} is not supported; leave it out")
        if self.best_of not in (None, self.n):
            raise _refusal(
                "unsupported_parameter", "best_of", "best_of is not supported; leave it out or make it equal n"
            )
        if self.stream_options is not None and not self.stream:
            raise _refusal("invalid_value", "stream_options", "stream_options needs stream=true")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "max_tokens=0 needs echo=true or prompt_logprobs, or nothing would come back"
            raise _refusal("invalid_value", "max_tokens", message)
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower it"
            raise _refusal("invalid_value", "min_tokens", message)
        return self


def _refusal(code: Literal["unsupported_parameter", "invalid_value"], param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{message}", {"param": param, "message": message})


class TokenizeRequest(_Body):
    """POST /tokenize, as vLLM offers it and lm-eval reads it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    """Makes no difference, as with GPT-2: there is no special token that belongs around every text."""


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: Ids
    model: str | None = None


class Logprobs(BaseModel):
    """Parallel lists, one entry per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Where the token begins in the choice's text, in characters."""

    def extend(self, more: "Logprobs") -> None:
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """A whole choice, or in a stream the next part of one."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: Logprobs | None = None
    """Only there when asked for; in a stream with a choice's first part."""

    @model_serializer(mode="wrap")
    def _leave_out_what_openai_has_not(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = to_dict(self)
        if self.prompt_logprobs is None:
            del values["prompt_logprobs"]
        return values


class Completion(BaseModel):
    """The response, or one frame of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
    system_fingerprint: str | None
    """The exchange checkpoint's fingerprint: equal seeds repeat only where this is equal."""


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kraken"] = "kraken"
    context_length: int
    """Not OpenAI's: prompt and completion together, in tokens."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info."""

    name: str
    num_ids: int
    fingerprint: str
    bos_token: str = END_OF_TEXT
    eos_token: str = END_OF_TEXT
    pad_token: str = END_OF_TEXT
    chat_template: None = None


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    prompt: str


class EngineStatus(BaseModel):
    """`EngineStats` as JSON."""

    model_config = ConfigDict(from_attributes=True)

    num_running: int
    num_queued: int
    num_finished: int
    num_aborted: int
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float | None = None
    """Median time to first token, where the engine measures it; from the request's arrival at the engine."""
    reported_ttft_ms: float | None = None
    reported_queue_ms: float | None = None
    """The same, and the time in the queue, by TensorRT-LLM's own clock."""


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok", "unhealthy"]
    model: str
    engine: str
    tokenizer_fingerprint: str
    exchange_fingerprint: str | None
    deployment: str | None
    """Digest of the model and of every setting and file of code that decides how it is served."""
    stats: EngineStatus
