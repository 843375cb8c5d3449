"""Failures as HTTP responses: whatever goes wrong, the client reads an OpenAI error object in JSON.

Requests that no route takes are answered here as well, with what exists instead.
"""

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kraken.engine.inbox import is_end_of_task
from serve.completions import log_failure
from serve.protocol import ApiError
from serve.record import RequestRecord

BASE_MODEL = "base model without a chat template; use /v1/completions"
CHAT = "/v1/chat/completions"
MISSING_ENDPOINTS = {
    CHAT: BASE_MODEL,
    "/v1/responses": "use /v1/completions",
    "/v1/messages": "use /v1/completions",
    "/v1/embeddings": "the model generates text and computes no embeddings",
}
"""URLs that clients expect of an OpenAI-compatible server -> why this one does not have them. Chat is there if the
model has a template."""


class ErrorResponses:
    """ASGI middleware that answers with an OpenAI error object where the application raises.

    It also takes exceptions outside `Exception`, which panics of Rust libraries are: they would otherwise reach the
    web server, which answers in plain text.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except BaseException as error:
            if is_end_of_task(error) or scope["type"] != "http":
                raise
            if has_started:  # no other status can follow; the server cuts the connection
                raise RuntimeError("the response failed after its first bytes") from error
            record: RequestRecord = scope["state"]["record"]
            log_failure(error, record.id)
            told = ApiError.of(error)
            record.fail(told.body["error"])
            await told.response()(scope, receive, send)


async def refuse_missing_endpoint(request: Request) -> Response:
    """A URL of `MISSING_ENDPOINTS`. 400, since clients read a 404 as "no such model", and repeat a 5xx."""
    reason = MISSING_ENDPOINTS[request.scope["route"].path]
    message = f"{request.url.path} is not supported: {reason}. {_what_exists(request)}"
    raise ApiError(400, message, code="unsupported_endpoint")


async def refuse_route(request: Request, error: Exception) -> Response:
    """No such URL, or not with this method."""
    assert isinstance(error, HTTPException)
    tried = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message = f"Unknown request URL: {tried}. {_what_exists(request)}"
        raise ApiError(404, message, code="unknown_url", headers=error.headers)
    if error.status_code == 405:
        message = f"Method not allowed: {tried}. {_what_exists(request)}"
        raise ApiError(405, message, code="method_not_allowed", headers=error.headers)
    raise ApiError(error.status_code, f"{error.detail}: {tried}", headers=error.headers)


def _what_exists(request: Request) -> str:
    routes: Iterable[object] = request.app.routes
    known = [
        f"{method} {route.path.replace('{name:path}', '{model}')}"
        for route in routes
        if isinstance(route, APIRoute) and route.endpoint is not refuse_missing_endpoint
        for method in sorted(route.methods or ())
    ]
    return f"This endpoint has {', '.join(known)}; the base URL of OpenAI clients ends in /v1."
