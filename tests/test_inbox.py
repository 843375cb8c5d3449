"""The inbox: when its reader is woken, and what a request that ends or is cancelled leaves behind."""

import asyncio
import math

import pytest

from kraken.engine.echo import EchoEngine
from kraken.engine.inbox import Inbox, stream
from kraken.engine.protocol import EngineError, EngineInfo, Item, Request, RequestError, SamplingParams, TokenOutput

TOKEN, LAST = TokenOutput(token_id=5), TokenOutput(token_id=6, finish_reason="length")
INFO = EngineInfo(name="echo", context_length=64, num_ids=300, eot_id=299, tokenizer_fingerprint="none")


def request(name: str = "r", max_tokens: int = 4) -> Request:
    return Request(id=name, prompt_ids=(5, 6), sampling=SamplingParams(max_tokens=max_tokens))


def test_everything_that_has_come_is_taken_at_once() -> None:
    async def main() -> None:
        inbox = Inbox()
        inbox.put(0, TOKEN)
        inbox.put(1, TOKEN)
        assert await inbox.take() == [(0, TOKEN), (1, TOKEN)]
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put(1, LAST)
        assert await reader == [(1, LAST)]

    asyncio.run(main())


@pytest.mark.parametrize("end", [LAST, None, EngineError("inside")], ids=str)
def test_tokens_wait_for_the_time_and_an_end_does_not(end: Item) -> None:
    async def main() -> None:
        inbox, loop = Inbox(), asyncio.get_running_loop()
        started = loop.time()
        inbox.put(0, TOKEN)
        reader = asyncio.create_task(inbox.take(started + 0.05))
        await asyncio.sleep(0.01)
        inbox.put(0, TOKEN)
        assert await reader == [(0, TOKEN)] * 2 and loop.time() >= started + 0.05
        for not_before in (loop.time() + 60, math.inf):
            reader = asyncio.create_task(inbox.take(not_before))
            await asyncio.sleep(0)
            inbox.put(0, TOKEN)
            await asyncio.sleep(0.01)
            assert not reader.done()
            inbox.put(0, end)
            assert await reader == [(0, TOKEN), (0, end)]

    asyncio.run(main())


def test_a_reader_that_gives_up_loses_nothing() -> None:
    async def main() -> None:
        inbox = Inbox()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.take(), 0.01)
        inbox.put(0, TOKEN)
        assert await inbox.take() == [(0, TOKEN)]

    asyncio.run(main())


def test_what_is_submitted_is_what_is_generated_and_ends_once() -> None:
    async def main() -> None:
        engine = EchoEngine(INFO)
        generated = [output async for output in engine.generate(request())]
        assert [output async for output in stream(engine, request())] == generated
        items: list[Item] = []
        engine.submit(request(), items.append)
        while engine.stats().num_finished < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert items == [*generated, None]

    asyncio.run(main())


def test_a_cancelled_request_is_aborted_also_before_it_has_begun() -> None:
    async def main() -> None:
        engine, items = EchoEngine(INFO, token_delay_s=0.01), list[Item]()
        engine.submit(request("never"), items.append)()
        await asyncio.sleep(0.02)
        assert not items and engine.stats().num_aborted == 0
        cancel = engine.submit(request("begun", 50), items.append)
        await asyncio.sleep(0.05)
        assert items and engine.stats().num_running == 1
        cancel()
        cancel()
        await asyncio.sleep(0)
        num_items = len(items)
        await asyncio.sleep(0.03)
        stats = engine.stats()
        assert (stats.num_running, stats.num_aborted, len(items)) == (0, 1, num_items)

    asyncio.run(main())


def test_refusals_are_raised_at_once() -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="context of 64"):
            EchoEngine(INFO).submit(request(max_tokens=64), lambda item: None)

    asyncio.run(main())
