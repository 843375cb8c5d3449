"""The endpoint without Ray: the replica's own HTTP application under uvicorn, on a thread of this process."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial

import uvicorn

from serve.app import ServeArgs, load_model
from serve.deployment import Endpoint


@contextlib.contextmanager
def served(args: ServeArgs) -> Iterator[str]:
    """Base URL of an endpoint that serves what `args` say, until the block ends. Serve's proxy is not in between."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started, failures = threading.Event(), list[BaseException]()
        server: uvicorn.Server | None = None

        async def run() -> None:
            nonlocal server
            try:
                replica = object.__new__(Endpoint.func_or_class)  # type: ignore[attr-defined]  # Serve's decorator
                await replica.__init__(partial(load_model, args))
                config = uvicorn.Config(replica.__serve_build_asgi_app__(), log_level="error", lifespan="on")
                server = uvicorn.Server(config)
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                started.set()
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            started.wait()
            if failures:
                raise failures[0]
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            if server is not None:
                server.should_exit = True
            thread.join()
