"""Passes the outputs of requests from an engine to one coroutine: the engine puts them into an inbox, and the coroutine
is woken when an output is due. Serving reads all choices of a call from one inbox; `stream` reads one request.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

from kraken.engine.protocol import Engine, Item, Output, Request, TokenOutput, check_request


class Inbox:
    """Outputs of one or more requests in the order in which they came, for one reader. Belongs to one event loop."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Item]] = []
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._has_end = False

    def put(self, index: int, item: Item) -> None:
        """Add an output or the end of a request.

        Args:
            index: the reader's number of the request.
        """
        self._items.append((index, item))
        if not isinstance(item, Output) or (isinstance(item, TokenOutput) and item.finish_reason is not None):
            self._has_end = True
        self._wake_if_due()

    async def take(self, not_before: float = 0.0) -> list[tuple[int, Item]]:
        """Everything that has come since the last call; waits until there is something.

        Args:
            not_before: time of the event loop until which outputs are collected, so that they can share one write. The
                last output of a request does not wait for it. Infinite: nothing but the end of a request is waited for.
        """
        self._not_before = not_before
        self._waiter = self._loop.create_future()
        try:
            if self._items:
                self._wake_if_due()
            await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        items, self._items, self._has_end = self._items, [], False
        return items

    def _wake_if_due(self) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if self._has_end or self._not_before <= self._loop.time():
            self._wake()
        elif self._timer is None and self._not_before < math.inf:
            self._timer = self._loop.call_at(self._not_before, self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def stream(engine: Engine, request: Request) -> AsyncGenerator[Output, None]:
    """`Engine.generate` for an engine whose own way of answering is `submit`."""
    inbox = Inbox()
    cancel = engine.submit(request, partial(inbox.put, 0))
    try:
        while True:
            for _, item in await inbox.take():
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        cancel()


def submit_by_generate(engine: Engine, request: Request, receive: Callable[[Item], None]) -> Callable[[], None]:
    """`Engine.submit` for an engine whose own way of answering is `generate`: a task per request passes outputs on."""
    check_request(request, engine.info)
    task = asyncio.get_running_loop().create_task(_pass_on(engine.generate(request), receive))

    def cancel() -> None:
        task.cancel()  # the closure also holds the task, which nothing else does

    return cancel


async def _pass_on(outputs: AsyncIterator[Output], receive: Callable[[Item], None]) -> None:
    end: BaseException | None = None
    try:
        async with aclosing(outputs):  # type: ignore[type-var]  # engines write `generate` as a generator
            async for output in outputs:
                receive(output)
    except BaseException as error:
        if is_end_of_task(error):
            raise
        end = error  # else the reader would wait for ever
    receive(end)


def is_end_of_task(error: BaseException) -> bool:
    """Whether an exception ends this task or process by intention, as a cancellation does. Any other is a failure, also
    one outside `Exception`: libraries in Rust raise `pyo3_runtime.PanicException`, which is a BaseException."""
    return isinstance(error, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt | SystemExit)
