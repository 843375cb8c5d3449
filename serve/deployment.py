"""The replica: HTTP in front of one engine, in one process, so that no token takes a second hop.

Ray Serve cancels the handler of a client that has left; everything below here lets that cancellation through to the
engine. Requests queue inside the engine, which knows its batch, and never in Serve.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kraken.engine import protocol as engine_protocol
from kraken.engine.prompt import encode_prompt
from kraken.engine.protocol import SamplingParams
from serve.api_key import ApiKeyDigest
from serve.completions import CompletionCall, ServedModel
from serve.errors import MISSING_ENDPOINTS, ErrorResponses, missing_endpoint_response, routing_error_response
from serve.protocol import (
    ApiError,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    EngineStatus,
    Health,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    bad_request,
)
from serve.ray_internals import keep_replica_on_loopback

Body = TypeVar("Body", bound=BaseModel)

MAX_BODY_BYTES = 8 * 2**20
DRAIN_TIMEOUT_S = 60
"""A replica that is told to stop finishes what it has begun, for this long."""
HEALTH_CHECK_PERIOD_S = 1
MAX_ONGOING_REQUESTS = 10_000
"""Far above what the engine queues: it must be the engine that refuses, with 429 and Retry-After."""


@ray_serve.deployment(
    name="endpoint",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=HEALTH_CHECK_PERIOD_S,
    logging_config={"enable_access_log": False},
)
@ray_serve.ingress()
class Endpoint:
    """One replica.

    Args:
        load: makes the model, in the replica and on its event loop, where the engine will run.
        api_key: digest of the key that clients must show; None lets everybody in.
        loopback_only: nothing of this replica listens on another address.
        deployment: digest of what is served and how, for `/health`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        load: Callable[[], ServedModel],
        api_key: ApiKeyDigest | None = None,
        loopback_only: bool = False,
        deployment: str | None = None,
    ) -> None:
        if loopback_only:
            keep_replica_on_loopback()
        self._api_key = api_key
        self._deployment = deployment
        self._model = load()
        await warm_up(self._model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            yield
            await self._model.engine.close()

        # No documentation pages: they would load scripts from elsewhere. No CORS either: browsers stay out.
        app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
        guard = [Depends(self._require_api_key)]
        for method, path, handler in (
            ("POST", "/v1/completions", self._create_completion),
            ("GET", "/v1/models", self._list_models),
            ("GET", "/v1/models/{name:path}", self._get_model),
            ("GET", "/tokenizer_info", self._tokenizer_info),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/detokenize", self._detokenize),
        ):
            app.add_api_route(path, handler, methods=[method], dependencies=guard)
        for path in MISSING_ENDPOINTS:
            app.add_api_route(path, missing_endpoint_response, methods=["GET", "POST"], dependencies=guard)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_exception_handler(HTTPException, routing_error_response)
        app.add_middleware(ErrorResponses)
        return app

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if not self._model.engine.stats().healthy:
            raise RuntimeError("the engine is unhealthy")

    async def _create_completion(self, request: Request) -> Response:
        body = await read_body(CompletionRequest, request)
        call = await CompletionCall.prepare(body, self._model)
        parts = call.parts()
        if not body.stream:
            return _json(await call.collect(parts))
        first = await anext(parts)  # up to here a failure is a status code, from here on it is a frame
        return EventStream(call.frames(first, parts), parts)

    async def _list_models(self) -> Response:
        return _json(ModelList(data=[self._model_card()]))

    async def _get_model(self, name: str) -> Response:
        self._require_model(name)
        return _json(self._model_card())

    async def _tokenizer_info(self) -> Response:
        tokenizer = self._model.tokenizer
        return _json(TokenizerInfo(name=tokenizer.name, num_ids=tokenizer.num_ids, fingerprint=tokenizer.fingerprint))

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

    async def _health(self) -> Response:
        model, stats = self._model, self._model.engine.stats()
        health = Health(
            status="ok" if stats.healthy else "unhealthy",
            model=model.name,
            engine=model.engine.info.name,
            tokenizer_fingerprint=model.tokenizer.fingerprint,
            exchange_fingerprint=model.exchange_fingerprint,
            deployment=self._deployment,
            stats=EngineStatus.model_validate(stats),
        )
        return _json(health, status=200 if stats.healthy else 503)

    def _model_card(self) -> ModelCard:
        model = self._model
        return ModelCard(id=model.name, created=model.created, context_length=model.engine.info.context_length)

    def _require_model(self, name: str | None) -> None:
        if name is not None:
            self._model.require_name(name)

    async def _require_api_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._api_key.matches(key):
            raise ApiError(
                401,
                "Incorrect or missing API key; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
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


async def warm_up(model: ServedModel) -> None:
    """Run the longest request once, before the replica is ready: what compiles, allocates or fails does so here."""
    info = model.engine.info
    prompt_ids = (info.eot_id,) * max(1, info.context_length - 2)
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    request = engine_protocol.Request(id="warm-up", prompt_ids=prompt_ids, sampling=sampling)
    async for _output in model.engine.generate(request):
        pass


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
