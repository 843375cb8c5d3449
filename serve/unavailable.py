"""An HTTP middleware of Serve's proxy: 503 with Retry-After while an application has no running replica.

Without it the proxy holds a request until a replica runs, which may be minutes (the replica fetches the model from the
storage) or never (no node has room for it), and the client waits without an answer. Serve loads the middleware in every
proxy whose environment holds `PROXY_SETTINGS`; the deploy stage sets it for the Serve instance that it starts.
"""

import asyncio
import contextlib
import time

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol import ApiError
from serve.ray_internals import serve_details

PROXY_SETTINGS = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.unavailable:proxy_middlewares",
    # Serve kills a proxy that is not ready after five seconds, which a busy machine needs for its imports alone.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Environment variables of Serve's own processes, which read them while they import it."""
PATIENCE_S = 2.0
"""A request without the head of a response for so long makes the proxy ask how many replicas run."""
STATUS_AGE_S = 1.0
"""The controller's answer serves every waiting request for so long."""
RETRY_AFTER_S = 5
"""Seconds that clients are asked to wait; a replica needs a few to start where its node has the model."""


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve in the proxy's process."""
    return [Middleware(AnswerWithoutReplicas)]


class AnswerWithoutReplicas:
    """Answers for an application without running replicas; requests of all others pass through unchanged.

    Args:
        app: Serve's proxy, or the middleware below this one.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._num_running: dict[str, int] = {}
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        inner = asyncio.ensure_future(self._app(scope, receive, watched_send))
        try:
            await asyncio.wait({inner}, timeout=PATIENCE_S)
            while not has_begun and not inner.done():
                if not await self._is_served(scope["path"]) and not has_begun:
                    await cancel(inner)
                    await unavailable().response()(scope, receive, send)
                    return
                await asyncio.wait({inner}, timeout=PATIENCE_S)
            await inner
        finally:
            await cancel(inner)

    async def _is_served(self, path: str) -> bool:
        """Whether the application of a path has a running replica; true for a path of no application."""
        async with self._asking:
            if time.monotonic() - self._asked_at > STATUS_AGE_S:
                self._num_running = await asyncio.to_thread(running_replicas)
                self._asked_at = time.monotonic()
        found = [prefix for prefix in self._num_running if is_below(path, prefix)]
        return not found or self._num_running[max(found, key=len)] > 0


def unavailable() -> ApiError:
    """The answer; OpenAI's clients repeat the request after the time in it."""
    return ApiError(
        503,
        "no replica of this model is ready: one is starting, or waits for a node with room for it; try again later",
        kind="server_error",
        code="model_not_ready",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def running_replicas() -> dict[str, int]:
    """Route prefix of every application -> the smallest number of running replicas that a deployment of it has.

    Empty where the controller does not answer: then nothing is known, and requests go on waiting.
    """
    try:
        details = serve_details()
    except Exception:  # the controller restarts
        return {}
    if details is None:
        return {}
    return {
        application["route_prefix"]: min(
            (
                sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
                for deployment in application["deployments"].values()
            ),
            default=0,
        )
        for application in details["applications"].values()
        if application.get("route_prefix")
    }


def is_below(path: str, prefix: str) -> bool:
    """Whether a request's path belongs to a route prefix."""
    return prefix == "/" or path == prefix or path.startswith(prefix + "/")


async def cancel(task: "asyncio.Future[None]") -> None:
    """End a task and wait for its end; no-op for one that has ended."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
