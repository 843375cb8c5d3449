"""What is known about one HTTP request: its ids, token counts, times and how it ended; never text. The request log and
the metrics are made from it.

`Recorder` is the outermost layer of the application. It begins a record for every request, puts it into the request's
state, where handlers complete it, and ends it when the response has been sent or the client has left.
"""

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_CLOSED = "client_closed"
"""`reason` of a request whose client disconnected before the response was complete."""
MAX_ID_LENGTH = 128
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
"""W3C Trace Context: version, trace id, id of the client's span, flags."""

request_logger = logging.getLogger("kraken.requests")


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are of `time.monotonic`."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The header x-request-id; Serve's proxy adds one where the client sent none, and puts it on the response."""
    traceparent: str | None = None
    """The W3C header, if it is valid."""
    method: str = ""
    route: str = ""
    """Pattern of the URL; empty for an unknown one, which could be anything."""
    key_name: str | None = None
    """Name of the API key that the client showed."""
    model: str | None = None
    started_at: float = field(default_factory=time.monotonic)
    started_unix_ns: int = field(default_factory=time.time_ns)
    first_token_at: float | None = None
    ended_at: float | None = None
    queue_s: float | None = None
    """Time in the engine's queue; the longest of the call's choices."""
    status: int = 0
    """HTTP status; 499 where the client left first, as nginx writes it."""
    reason: str | None = None
    """How it ended: finish reasons, an error's code, or `CLIENT_CLOSED`."""
    error: str | None = None
    """Code of the error that the client was told, also inside a stream; its type where it has no code."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int | None = None

    @classmethod
    def of(cls, scope: Scope) -> "RequestRecord":
        """A new record for a request."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        record = cls(method=scope["method"])
        if shown := headers.get(b"x-request-id", "")[:MAX_ID_LENGTH]:
            record.id = shown
        traceparent = headers.get(b"traceparent", "").strip()
        if TRACEPARENT.fullmatch(traceparent):
            record.traceparent = traceparent
        return record

    @property
    def duration_s(self) -> float:
        return (self.ended_at or time.monotonic()) - self.started_at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    def line(self) -> str:
        """The line of the request log."""
        trace = TRACEPARENT.fullmatch(self.traceparent) if self.traceparent else None
        values: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.started_unix_ns / 1e9))
            + f".{self.started_unix_ns // 10**6 % 1000:03d}Z",
            "request_id": self.id,
            "trace_id": trace and trace[1],
            "key": self.key_name,
            "method": self.method,
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "reason": self.reason,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "cached_tokens": self.num_cached_tokens,
            "queue_ms": _in_ms(self.queue_s),
            "ttft_ms": _in_ms(self.ttft_s),
            "duration_ms": _in_ms(self.duration_s),
        }
        return json.dumps(values)

    def fail(self, error: dict[str, Any]) -> None:
        """Note an error object of OpenAI's form, as the client gets it."""
        self.error = self.reason = error["code"] or error["type"]


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def record_of(request: Request) -> RequestRecord:
    """The record of a request in a handler."""
    record: RequestRecord = request.state.record
    return record


class Recorder:
    """ASGI middleware; see the module's docstring.

    Args:
        on_end: called with every ended record.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[RequestRecord], None]):
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord.of(scope)
        has_own_id = any(name.lower() == b"x-request-id" for name, _ in scope["headers"])
        scope.setdefault("state", {})["record"] = record
        has_ended = False

        async def recording_send(message: Message) -> None:
            nonlocal has_ended
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if not has_own_id:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)
            has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, recording_send)
        except asyncio.CancelledError:
            if not has_ended:
                record.status, record.reason = 499, CLIENT_CLOSED
            raise
        finally:
            record.route = getattr(scope.get("route"), "path", "")
            record.ended_at = time.monotonic()
            self._on_end(record)


def log_requests_to_stdout() -> None:
    """Write one line of JSON per request to this process's standard output, which Ray keeps in its session's logs.

    Not through the logger of Serve, whose format and level are others.
    """
    if not request_logger.handlers:
        request_logger.addHandler(logging.StreamHandler(sys.__stdout__))
    request_logger.setLevel(logging.INFO)
    request_logger.propagate = False
