"""The proxy's middleware: an application without running replicas answers 503 instead of nothing."""

import asyncio
import json
from typing import Any

import pytest

from serve import unavailable
from serve.unavailable import AnswerWithoutReplicas


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unavailable, "PATIENCE_S", 0.02)
    monkeypatch.setattr(unavailable, "STATUS_AGE_S", 0.0)


class Proxy:
    """Stands for Serve's: answers after `delay_s`, the body `pause_s` later."""

    def __init__(self, delay_s: float, pause_s: float = 0.0):
        self.delay_s, self.pause_s = delay_s, pause_s
        self.was_cancelled = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(self.delay_s)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(self.pause_s)
            await send({"type": "http.response.body", "body": b"text"})
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


def ask(proxy: Proxy, path: str = "/v1/completions", **scope: Any) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what the middleware sends."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(AnswerWithoutReplicas(proxy)({"type": "http", "path": path, **scope}, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent)


def replicas(monkeypatch: pytest.MonkeyPatch, found: dict[str, int]) -> None:
    monkeypatch.setattr(unavailable, "running_replicas", lambda: found)


def test_without_a_replica_the_answer_is_503_and_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas(monkeypatch, {"/": 0})
    proxy = Proxy(60.0)
    status, headers, body = ask(proxy)
    assert (status, headers["retry-after"]) == (503, "5")
    error = json.loads(body)["error"]
    assert error["code"] == "model_not_ready" and error["type"] == "server_error"
    assert proxy.was_cancelled, "Serve must not go on with a request that was answered"


@pytest.mark.parametrize("found", [{"/": 1}, {}])
def test_a_slow_answer_of_a_replica_is_waited_for(monkeypatch: pytest.MonkeyPatch, found: dict[str, int]) -> None:
    replicas(monkeypatch, found)
    assert ask(Proxy(0.2))[::2] == (200, b"text")


def test_a_stream_that_has_begun_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas(monkeypatch, {"/": 0})
    assert ask(Proxy(0.0, pause_s=0.2))[::2] == (200, b"text")


def test_the_longest_route_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas(monkeypatch, {"/": 1, "/other": 0})
    assert ask(Proxy(60.0), "/other/v1/completions")[0] == 503
    assert ask(Proxy(0.1), "/otherwise")[0] == 200


def test_a_client_that_leaves_ends_the_request_below(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas(monkeypatch, {"/": 1})
    proxy = Proxy(60.0)

    async def leave() -> None:
        call = asyncio.ensure_future(AnswerWithoutReplicas(proxy)({"type": "http", "path": "/"}, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(leave())
    assert proxy.was_cancelled
