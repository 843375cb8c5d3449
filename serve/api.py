"""The HTTP API around one engine, as an ASGI application without Ray: `serve/deployment.py` puts it into a replica, and
tests call it in their own process.

A request passes the layers from the outside: `Recorder` (record, log, metrics), `ErrorResponses` (every failure becomes
an error object), the routes of `OPERATIONS`.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import kraken
from kraken.engine.prompt import encode_prompt
from serve import metrics
from serve.api_key import ApiKeyDigest, KeyRing
from serve.chat import ChatCall, ChatCompletion, ChatRequest
from serve.completions import CompletionCall, ServedModel
from serve.errors import CHAT, MISSING_ENDPOINTS, ErrorResponses, refuse_missing_endpoint, refuse_route
from serve.metrics import EndpointMetrics
from serve.observer import CallObserver
from serve.openapi import Operation, docs_page, document
from serve.pages import Page
from serve.protocol import (
    ApiError,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    EngineStatus,
    Health,
    HealthStatus,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    Version,
    bad_request,
)
from serve.record import Recorder, RequestRecord, record_of, request_logger

Body = TypeVar("Body", bound=BaseModel)

MAX_BODY_BYTES = 8 * 2**20

OPERATIONS = (
    Operation("POST", "/v1/completions", "Complete text", CompletionRequest, Completion, errors=(404, 429, 500)),
    Operation("GET", "/v1/models", "The model that is served", None, ModelList),
    Operation("GET", "/v1/models/{name:path}", "One model", None, ModelCard, errors=(404,)),
    Operation("GET", "/tokenizer_info", "The model's tokenizer", None, TokenizerInfo),
    Operation("POST", "/tokenize", "Token ids of a text", TokenizeRequest, TokenizeResponse, errors=(404,)),
    Operation("POST", "/detokenize", "Text of token ids", DetokenizeRequest, DetokenizeResponse, errors=(404,)),
    Operation("GET", "/version", "Version of the server", None, Version),
    Operation("GET", "/metrics", "Metrics in Prometheus' text format", None, "text/plain"),
    Operation("GET", "/health", "Whether the model can be used, and with the key why not", None, Health, is_open=True),
    Operation("GET", "/openapi.json", "This description", None, "application/json", is_open=True),
    Operation("GET", "/docs", "This description as a page", None, "text/html", is_open=True),
    Operation("GET", "/", "A page to try the model", None, "text/html", is_open=True),
)
"""Everything that the endpoint answers. `/openapi.json` and `/docs` are made from it."""
CHAT_OPERATION = Operation(
    "POST", CHAT, "Answer in a conversation", ChatRequest, ChatCompletion, errors=(404, 429, 500)
)
"""Only of models with a chat template."""


class Api:
    """The handlers of `OPERATIONS`.

    Args:
        model: what is served. Closing the application closes its engine.
        keys: that clients must show; None lets everybody in.
        deployment: digest of what is served and how, for `/health`.
        replica: name of this replica, a label of all metrics.
    """

    def __init__(
        self,
        model: ServedModel,
        keys: KeyRing | None = None,
        deployment: str | None = None,
        replica: str = "",
    ):
        self._model = model
        self._keys = keys or KeyRing(None)
        self._deployment = deployment
        self._metrics = EndpointMetrics(model.engine, {"model_name": model.name, "replica": replica})
        has_chat = model.chat_template is not None
        self._operations = (*OPERATIONS, CHAT_OPERATION) if has_chat else OPERATIONS
        self._missing = {path: why for path, why in MISSING_ENDPOINTS.items() if not (has_chat and path == CHAT)}
        self._document = document(self._operations, self._missing, model.engine.info)
        self._docs = docs_page(self._document)
        self._playground = Page.load("playground.html")

    def app(self) -> FastAPI:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            yield
            await self._model.engine.close()

        # FastAPI's own documentation pages would load scripts from elsewhere. No CORS: other sites' pages stay out.
        app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
        guard = [Depends(self._require_api_key)]
        handlers: dict[str, Callable[..., Awaitable[Response]]] = {
            "/v1/completions": self._create_completion,
            CHAT: self._create_chat_completion,
            "/v1/models": self._list_models,
            "/v1/models/{name:path}": self._get_model,
            "/tokenizer_info": self._tokenizer_info,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/version": self._version,
            "/metrics": self._get_metrics,
            "/health": self._health,
            "/openapi.json": self._openapi,
            "/docs": self._docs.respond,
            "/": self._playground.respond,
        }
        for operation in self._operations:
            dependencies = [] if operation.is_open else guard
            handler = handlers[operation.path]
            app.add_api_route(operation.path, handler, methods=[operation.method], dependencies=dependencies)
        for path in self._missing:
            app.add_api_route(path, refuse_missing_endpoint, methods=["GET", "POST"], dependencies=guard)
        app.add_exception_handler(HTTPException, refuse_route)
        app.add_middleware(ErrorResponses)
        app.add_middleware(Recorder, on_end=self._request_ended)  # added last, so that it is the outermost
        return app

    def _request_ended(self, record: RequestRecord) -> None:
        self._metrics.http_request(record)
        if record.error is not None:
            self._metrics.error(record.error)
        if record.num_completion_tokens and record.status == 200 and record.error is None:
            self._metrics.completion_ended(record.duration_s)
        request_logger.info("%s", record.line())

    async def _create_completion(self, request: Request) -> Response:
        body = await read_body(CompletionRequest, request)
        observer = CallObserver(record_of(request), self._metrics)
        return await _answer(await CompletionCall.prepare(body, self._model, observer), body.stream)

    async def _create_chat_completion(self, request: Request) -> Response:
        body, template = await read_body(ChatRequest, request), self._model.chat_template
        assert template is not None, "the route exists only with a template"
        observer = CallObserver(record_of(request), self._metrics)
        return await _answer(await ChatCall.prepare_chat(body, self._model, template, observer), body.stream)

    async def _list_models(self) -> Response:
        return _json(ModelList(data=[self._model_card()]))

    async def _get_model(self, name: str) -> Response:
        self._require_model(name)
        return _json(self._model_card())

    async def _tokenizer_info(self) -> Response:
        tokenizer, template = self._model.tokenizer, self._model.chat_template
        return _json(
            TokenizerInfo(
                name=tokenizer.name,
                num_ids=tokenizer.num_ids,
                fingerprint=tokenizer.fingerprint,
                chat_template=None if template is None else template.source,
            )
        )

    async def _tokenize(self, request: Request) -> Response:
        body = await read_body(TokenizeRequest, request)
        self._require_model(body.model)
        ids = await asyncio.to_thread(encode_prompt, self._model.tokenizer, body.prompt)
        context_length = self._model.engine.info.context_length
        return _json(TokenizeResponse(tokens=ids, count=len(ids), max_model_len=context_length))

    async def _detokenize(self, request: Request) -> Response:
        body = await read_body(DetokenizeRequest, request)
        self._require_model(body.model)
        tokenizer = self._model.tokenizer
        bad = next((i for i in body.tokens if not 0 <= i < tokenizer.num_ids), None)
        if bad is not None:
            message = f"tokens holds id {bad}; this model's ids are 0..{tokenizer.num_ids - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return _json(DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens)))

    async def _version(self) -> Response:
        return _json(Version(version=kraken.__version__))

    async def _get_metrics(self) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _health(self, request: Request) -> Response:
        """Strangers learn whether the model can be used, and nothing else."""
        model, stats = self._model, self._model.engine.stats()
        if not (self._keys.is_open or self._shown_key(request)):
            return _json(HealthStatus(status="ok" if stats.healthy else "unhealthy"), 200 if stats.healthy else 503)
        health = Health(
            status="ok" if stats.healthy else "unhealthy",
            reason=None if stats.healthy else stats.failure or "the engine is unhealthy",
            model=model.name,
            engine=model.engine.info.name,
            tokenizer_fingerprint=model.tokenizer.fingerprint,
            exchange_fingerprint=model.exchange_fingerprint,
            deployment=self._deployment,
            stats=EngineStatus.model_validate(stats),
        )
        return _json(health, status=200 if stats.healthy else 503)

    async def _openapi(self) -> Response:
        return Response(self._document.json, media_type="application/json")

    def _model_card(self) -> ModelCard:
        model, length = self._model, self._model.engine.info.context_length
        return ModelCard(
            id=model.name, created=model.created, root=model.name, max_model_len=length, context_length=length
        )

    def _require_model(self, name: str | None) -> None:
        if name is not None:
            self._model.require_name(name)

    def _shown_key(self, request: Request) -> ApiKeyDigest | None:
        """The key that a client shows; None without one, or with a wrong one."""
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        return self._keys.find(shown) if scheme.lower() == "bearer" else None

    async def _require_api_key(self, request: Request) -> None:
        if self._keys.is_open:
            return
        key = self._shown_key(request)
        if key is None:
            raise ApiError(
                401,
                "Incorrect or missing API key; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        record_of(request).key_name = key.name
        if wait_s := self._keys.take(key):
            raise ApiError(
                429,
                f"the key {key.name} may send {key.requests_per_minute:g} requests a minute; wait {wait_s:.1f} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )


class EventStream(StreamingResponse):
    """Server-sent events that close their source however the response ends.

    Starlette merely drops a stream whose client has left; the engine's slots must be free at once.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[str, None], source: AsyncGenerator[object, None]):
        super().__init__(frames, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def _answer(call: CompletionCall, is_stream: bool) -> Response:
    parts = call.parts()
    if not is_stream:
        return _json(await call.collect(parts))
    first = await anext(parts)  # up to here a failure is a status code, from here on it is a frame
    return EventStream(call.frames(first, parts), parts)


async def read_body(body_class: type[Body], request: Request) -> Body:
    """A request's JSON, bounded and checked.

    Raises:
        ApiError: too large, not JSON, or not of this class.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        # Also keeps web pages out: a browser sends other types across origins unasked.
        message = f"Unsupported content type: {content_type!r}; send Content-Type: application/json"
        raise ApiError(400, message, code="unsupported_content_type")
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    except ClientDisconnect as error:  # nobody reads this answer, and nobody need read of it in the log
        raise ApiError(400, "the body is incomplete", code="request_incomplete") from error
    try:
        return body_class.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise bad_request(error) from None


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
