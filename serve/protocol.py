"""What travels over HTTP: typed requests, responses and stream frames in OpenAI's shapes, and its error object.

A request is checked whole before anything runs. A field that OpenAI or a well-known server or client has and this
endpoint has not is refused, unless its value asks for what happens here anyway; any other field is refused. null means
the field's default, as it does for OpenAI.

Ranges of numbers are those of `SamplingParams`, so that the endpoint, the command line and every engine agree.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic.types import FailFast
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.responses import Response

from kraken.engine.protocol import (
    MAX_LOGIT_BIAS,
    MAX_PENALTY,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    ContextLengthExceeded,
    EngineError,
    EngineOverloaded,
    FinishReason,
    RequestError,
    SamplingParams,
    check_stop_strings,
)
from kraken.tokenizer import END_OF_TEXT

MAX_CHOICES_PER_PROMPT = 128
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 5
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
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
    def of(cls, error: BaseException) -> "ApiError":
        """Any error as one for the client; what is unexpected shows nothing of its inside."""
        match error:
            case ApiError():
                return error
            case ContextLengthExceeded():
                return cls(400, _context_length_message(error), param="prompt", code="context_length_exceeded")
            case RequestError():
                return cls(400, str(error), param=API_NAME.get(error.field or "", error.field), code="invalid_value")
            case EngineOverloaded():
                headers = {"Retry-After": str(RETRY_AFTER_S)}
                return cls(429, str(error), kind="rate_limit_error", code="engine_overloaded", headers=headers)
            case EngineError():
                return _server_error("the engine failed", code="engine_failed")
            case _:
                return _server_error("the server failed", code=None)


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorObject


API_NAME = {"stop_ids": "stop_token_ids", "num_logprobs": "logprobs"}
"""Field of `SamplingParams` or `Request` -> field of the HTTP request, where the two differ."""


def _context_length_message(error: ContextLengthExceeded) -> str:
    """OpenAI's sentence, which clients recognise, and what to do about it."""
    length = error.context_length
    num_tokens = f"{'at least ' if error.is_lower_bound else ''}{error.num_prompt_tokens + error.max_tokens} tokens"
    return (
        f"This model's maximum context length is {length} tokens, however you requested {num_tokens} "
        f"({error.num_prompt_tokens} in your prompt; {error.max_tokens} for the completion). Please reduce your prompt "
        f"or completion length; a client that cuts documents to windows must know this length (lm-eval: "
        f"max_length={length})."
    )


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


class RequestBody(BaseModel):
    """A request: JSON types as they are (no "16" for 16), nothing unknown, null as if left out."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Write into the schema that null is possible wherever a field may be left out."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            options = field.get("anyOf", ())
            if name not in schema.get("required", ()) and {"type": "null"} not in options:
                outside = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outside}
        return schema

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


IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                IDS_SCHEMA,
                {"type": "array", "items": IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
Ids = Annotated[list[int], FailFast()]
Stop = Annotated[
    list[str],
    FailFast(),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
            ]
        }
    ),
]


def _only(expected: bool | int) -> Any:
    """Accept one value of a field that other servers have: the one that says what happens here anyway."""

    def check(value: bool | int) -> bool | int:
        if value != expected:
            shown = {"expected": json.dumps(expected)}
            raise PydanticCustomError("unsupported_value", "only {expected} is possible here; leave it out", shown)
        return value

    return AfterValidator(check)


Off = Annotated[bool, _only(False), Field(json_schema_extra={"enum": [False]})]


def _range(minimum: float, maximum: float | None = None) -> Any:
    """The range in the schema. `SamplingParams` checks it, so that the message is that of every engine."""
    bounds: JsonDict = {"minimum": minimum} if maximum is None else {"minimum": minimum, "maximum": maximum}
    return Field(json_schema_extra=bounds)


def _bias_by_id(value: dict[str, float]) -> dict[str, float]:
    if not all(name.isascii() and name.isdigit() for name in value):
        raise PydanticCustomError("invalid_value", "logit_bias must map token ids, written as strings, to numbers")
    return value


LogitBias = Annotated[
    dict[str, float],
    AfterValidator(_bias_by_id),
    WithJsonSchema(
        {
            "type": "object",
            "patternProperties": {
                "^[0-9]+$": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS}
            },
            "additionalProperties": False,
        }
    ),
]


def _truncation(value: int) -> int:
    if value < -1 or value == 0:
        raise PydanticCustomError(
            "invalid_value", "truncate_prompt_tokens must be at least 1, or -1 for what the context has room for"
        )
    return value


class StreamOptions(RequestBody):
    include_usage: bool = False
    """End the stream with a frame of token counts."""
    continuous_usage_stats: bool = False
    """Not OpenAI's but vLLM's: every frame has the token counts of its own choice so far."""
    include_obfuscation: Off = False
    """Padding against traffic analysis, which OpenAI adds; not here."""


class GenerationRequest(RequestBody):
    """What requests for completions and for chat have in common."""

    model: str
    max_tokens: Annotated[int, _range(0)] | None = None
    """Left out: 16 for completions, and in a chat what the prompt leaves of the context; never more than that. 0 needs
    `echo` or `prompt_logprobs`: the prompt comes back, scored."""
    max_completion_tokens: Annotated[int, _range(0)] | None = None
    """`max_tokens` by the name that chat completions have for it."""
    temperature: Annotated[float, _range(0, 100)] = 1.0
    """0 takes the most likely token, 1 samples as trained; 0 to 100."""
    top_p: Annotated[float, _range(0, 1)] = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: Annotated[int, _range(-1)] = 0
    """Not OpenAI's: sample from this many most likely tokens; 0 or -1 from all."""
    min_p: Annotated[float, _range(0, 1)] = 0.0
    """Not OpenAI's: sample from tokens at least this share as likely as the most likely one."""
    repetition_penalty: Annotated[float, _range(MIN_REPETITION_PENALTY, 100)] = 1.0
    """Not OpenAI's: above 1, tokens of prompt and completion become less likely."""
    presence_penalty: Annotated[float, _range(-MAX_PENALTY, MAX_PENALTY)] = 0.0
    """Above 0, ids that the completion has already become less likely; -2 to 2."""
    frequency_penalty: Annotated[float, _range(-MAX_PENALTY, MAX_PENALTY)] = 0.0
    """The same for each time that the completion has the id."""
    logit_bias: LogitBias = {}
    """Token id -> what is added to its logit, -100 to 100."""
    truncate_prompt_tokens: Annotated[int, AfterValidator(_truncation)] | None = None
    """vLLM's: only so many last tokens of each prompt are read; -1 reads as many as the context has room for beside
    `max_tokens`."""
    skip_special_tokens: bool = True
    """vLLM's: an end of text that does not end the completion (see `ignore_eos`) has no text. False: its text is
    `<|endoftext|>`."""
    min_tokens: Annotated[int, _range(0)] = 0
    """Not OpenAI's: tokens before the end of text, a stop id or a stop string may end the completion."""
    ignore_eos: bool = False
    """Not OpenAI's: the end of text is a token like any other."""
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STOP_TOKEN_IDS)] = []
    """Not OpenAI's: ids that end the completion; they are no part of its text."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] = 1
    """Choices for each prompt."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_CHOICES_PER_PROMPT)] | None = None
    """Choice k of a prompt draws with seed + k."""
    stop: Stop = []
    """Up to 32 strings that end the text; they are no part of it."""
    stream: bool = False
    """Send the text in parts, as server-sent events."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """The client's own label of its end user, which has no effect; OpenAI defines it so."""

    # What other servers offer and their clients send. Only the values that say what happens here anyway are accepted.
    add_special_tokens: bool = True
    """Makes no difference, as with GPT-2: there is no special token that belongs around every text."""
    spaces_between_special_tokens: Off = False
    include_stop_str_in_output: Off = False
    return_tokens_as_token_ids: Off = False
    return_token_ids: Off = False
    use_beam_search: Off = False
    num_beams: Annotated[int, _only(1), Field(json_schema_extra={"enum": [1]})] = 1
    """Hugging Face's; lm-eval passes it on from some tasks."""
    detokenize: Annotated[bool, _only(True), Field(json_schema_extra={"enum": [True]})] = True
    priority: Annotated[int, _only(0), Field(json_schema_extra={"enum": [0]})] = 0
    bad_words: Annotated[list[str], Field(max_length=0)] = []
    store: Off = False
    """Nothing is stored."""

    @model_validator(mode="before")
    @classmethod
    def _merge_spellings_of_max_tokens(cls, values: Any) -> Any:
        """Write `max_completion_tokens` as `max_tokens`; two different values are refused."""
        if not isinstance(values, dict) or (limit := values.get("max_completion_tokens")) is None:
            return values
        other = values.get("max_tokens")
        if other is not None and (type(other), other) != (type(limit), limit):
            message = "max_tokens and max_completion_tokens are the same limit and differ; give one"
            raise refusal("invalid_value", "max_completion_tokens", message)
        return values | {"max_tokens": limit}

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise refusal("invalid_value", "stream_options", "stream_options needs stream=true")
        try:
            self.sampling_params(self.limit(), eot_id=0)
            check_stop_strings(self.stop)
        except RequestError as error:
            raise refusal("invalid_value", str(error.field), str(error)) from None
        return self

    def limit(self, room: int = DEFAULT_MAX_TOKENS) -> int:
        """Most tokens of a completion.

        Args:
            room: tokens that the prompt leaves of the context. A limit that the client has not given is at most this,
                and at least 1.
        """
        return max(1, min(DEFAULT_MAX_TOKENS, room)) if self.max_tokens is None else self.max_tokens

    def sampling_params(self, max_tokens: int, eot_id: int, choice: int = 0) -> SamplingParams:
        """How the tokens of one choice of a prompt are sampled.

        Args:
            max_tokens: see `limit`.
            eot_id: the model's end-of-text id, which ends the completion unless `ignore_eos`.
            choice: counts the choices of one prompt from 0.

        Raises:
            RequestError: a value is out of range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in self.logit_bias.items()),
            min_tokens=self.min_tokens,
            seed=None if self.seed is None else self.seed + choice,
            stop_ids=(*(() if self.ignore_eos else (eot_id,)), *self.stop_token_ids),
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt = END_OF_TEXT
    """Left out: the beginning of a new document."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Not OpenAI's: the prompt's log-probabilities, in a field of their own, with this many most likely tokens."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: Annotated[str, Field(json_schema_extra={"maxLength": 0})] = ""

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.suffix:
            raise refusal("unsupported_parameter", "suffix", "suffix is not supported; leave it out")
        if self.best_of not in (None, self.n):
            raise refusal(
                "unsupported_parameter", "best_of", "best_of is not supported; leave it out or make it equal n"
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "max_tokens=0 needs echo=true or prompt_logprobs, or nothing would come back"
            raise refusal("invalid_value", "max_tokens", message)
        return self


def refusal(code: Literal["unsupported_parameter", "invalid_value"], param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{message}", {"param": param, "message": message})


class TokenizeRequest(RequestBody):
    """POST /tokenize, as vLLM offers it and lm-eval reads it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    """Makes no difference, as with GPT-2: there is no special token that belongs around every text."""


class DetokenizeRequest(RequestBody):
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

    @classmethod
    def join(cls, parts: "Sequence[Logprobs]") -> "Logprobs":
        """The lists one after the other."""
        lists = {name: [value for part in parts for value in getattr(part, name)] for name in cls.model_fields}
        return cls(**lists)


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Tokens of the prompt that the engine had computed for an earlier request."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    """Only there if the engine measures it."""

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_measured(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = to_dict(self)
        if self.prompt_tokens_details is None:
            del values["prompt_tokens_details"]
        return values


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
    root: str
    """vLLM's: the name of the model itself, which has no other here."""
    max_model_len: int
    """vLLM's: prompt and completion together, in tokens."""
    context_length: int
    """The same by another name."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    """GET /version."""

    version: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info."""

    name: str
    num_ids: int
    fingerprint: str
    bos_token: str = END_OF_TEXT
    eos_token: str = END_OF_TEXT
    pad_token: str = END_OF_TEXT
    chat_template: str | None = None


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


class HealthStatus(BaseModel):
    """GET /health without the key."""

    status: Literal["ok", "unhealthy"]


class Health(HealthStatus):
    """GET /health. Without the key only `status` is there."""

    reason: str | None = None
    """Why the model cannot be used; null if it can."""
    model: str = ""
    engine: str = ""
    tokenizer_fingerprint: str = ""
    exchange_fingerprint: str | None = None
    deployment: str | None = None
    """Digest of the model and of every setting and file of code that decides how it is served."""
    stats: EngineStatus | None = None
