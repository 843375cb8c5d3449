"""/v1/chat/completions, for models whose folder carries a chat template: messages become the prompt of a completion,
and the completion becomes the assistant's message.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from kraken.engine.protocol import FinishReason
from serve.chat_template import ChatTemplate
from serve.completions import CompletionCall, Part, ServedModel
from serve.observer import CallObserver
from serve.protocol import (
    MAX_LOGPROBS,
    CompletionRequest,
    GenerationRequest,
    Logprobs,
    RequestBody,
    Usage,
    refusal,
)


class TextContent(RequestBody):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(RequestBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextContent]
    name: str | None = None
    """The client's label of who speaks; most templates do not show it."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(RequestBody):
    type: Literal["text"] = "text"


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Needs `logprobs`."""
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool = True
    """Makes no difference: there are no tools."""
    tools: Annotated[list[Any], Field(default_factory=list, max_length=0)]

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("invalid_value", "top_logprobs", "top_logprobs needs logprobs=true")
        if self.max_tokens == 0:
            raise refusal("invalid_value", "max_tokens", "max_tokens=0 leaves nothing to answer; give at least 1")
        return self

    def completion(self, prompt: str) -> CompletionRequest:
        """The same as a request for a completion."""
        shared = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return CompletionRequest.model_construct(**shared, prompt=prompt, logprobs=num_logprobs)


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprobs]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    system_fingerprint: str | None


class ChatDelta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A frame of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
    system_fingerprint: str | None


class ChatCall(CompletionCall):
    """One call of /v1/chat/completions."""

    id_prefix = "chatcmpl"

    @classmethod
    async def prepare_chat(
        cls, body: ChatRequest, model: ServedModel, template: ChatTemplate, observer: CallObserver
    ) -> "ChatCall":
        """As `CompletionCall.prepare`."""
        model.require_name(body.model)
        prompt = template.render([{"role": message.role, "content": message.text} for message in body.messages])
        call = await cls.prepare(body.completion(prompt), model, observer)
        assert isinstance(call, ChatCall)
        return call

    @classmethod
    def limit(cls, body: CompletionRequest, room: int) -> int:
        """Without a limit the answer may fill the context, as OpenAI's does."""
        return body.max_tokens if body.max_tokens is not None else max(1, room)

    def response(self, parts: Sequence[Part], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=part.index,
                message=AssistantMessage(content=part.text),
                logprobs=_logprobs(part.logprobs),
                finish_reason=part.finish_reason,
            )
            for part in parts
        ]
        return ChatCompletion(**self.head, choices=choices, usage=usage)

    def chunk(self, parts: Sequence[Part], usage: Usage | None) -> BaseModel:
        choices = [
            ChatChunkChoice(
                index=part.index,
                delta=ChatDelta(content=part.text),
                logprobs=_logprobs(part.logprobs),
                finish_reason=part.finish_reason,
            )
            for part in parts
        ]
        return ChatChunk(**self.head, choices=choices, usage=usage)


def _logprobs(found: Logprobs | None) -> ChatLogprobs | None:
    """The chat API's form of a completion's log-probabilities."""
    if found is None:
        return None
    content = []
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob is not None and top is not None, "only a prompt's first token has none"
        ranked = sorted(top.items(), key=lambda pair: -pair[1])
        content.append(
            ChatTokenLogprobs(
                token=token,
                logprob=logprob,
                bytes=_bytes_of(token),
                top_logprobs=[ChatToken(token=t, logprob=p, bytes=_bytes_of(t)) for t, p in ranked],
            )
        )
    return ChatLogprobs(content=content)


def _bytes_of(label: str) -> list[int]:
    """The bytes of a token from its label; see `token_label`."""
    if label.startswith("bytes:\\x"):
        return list(bytes.fromhex(label.removeprefix("bytes:").replace("\\x", "")))
    return list(label.encode())
