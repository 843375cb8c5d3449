"""Exchanges between ranks, here threads of one process that talk over loopback."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from kraken.engine.distributed.socket_exchange import MAX_MESSAGE_BYTES, Exchange, connect_all


@contextmanager
def ranks(size: int, message_bytes: int = 1 << 16, timeout_s: float = 10.0) -> Iterator[list[Exchange]]:
    store = HashStore()
    store.set_timeout(timedelta(seconds=timeout_s))
    exchanges = each(lambda rank: connect_all(store, rank, size, "127.0.0.1", message_bytes, timeout_s), size)
    try:
        yield exchanges
    finally:
        for exchange in exchanges:
            exchange.close()


def each(work: Callable[[int], Any], size: int) -> list[Any]:
    """What every rank's thread returns."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def messages(size: int, count: int, dtype: torch.dtype, num_rounds: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(count, generator=generator).to(dtype) for _ in range(num_rounds)] for _ in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "count"), [(2, 1), (2, 12_345), (2, 2_000_000), (3, 4_000), (4, 17)])
def test_every_rank_gets_what_the_others_sent(size: int, count: int, dtype: torch.dtype) -> None:
    """The largest messages do not fit into the buffers: both ends send and receive by turns."""
    sent = messages(size, count, dtype, 3)

    with ranks(size) as exchanges:

        def run(rank: int) -> list[list[Tensor]]:
            found = []
            for message in sent[rank]:
                parts = [torch.empty_like(message) for _ in range(size - 1)]
                exchanges[rank].start(message, parts).wait()
                found.append(parts)
            return found

        found = each(run, size)
    for rank in range(size):
        for index in range(3):
            expected = [sent[other][index] for other in range(size) if other != rank]
            assert all(map(torch.equal, found[rank][index], expected))


def test_the_kernel_carries_a_message_that_fits_while_nobody_waits() -> None:
    count = 300_000
    with ranks(2, 4 * count) as (first, second):
        if first.capacity < 4 * count:
            pytest.skip("this system allows smaller buffers only")
        messages_sent = torch.ones(count), torch.full((count,), 2.0)
        received = torch.empty(count), torch.empty(count)
        pending = first.start(messages_sent[0], [received[0]])
        assert not len(pending.unsent[0])  # nobody has read a byte yet
        time.sleep(0.1)
        answer = second.start(messages_sent[1], [received[1]])
        first.close()  # what was sent is on its way whatever becomes of the sender
        answer.wait()
        assert (received[1] == 1.0).all()


def test_both_ends_agree_on_the_capacity() -> None:
    with ranks(3, 1 << 20) as exchanges:
        capacities = {exchange.capacity for exchange in exchanges}
    assert len(capacities) == 1
    assert 0 < capacities.pop() <= 1 << 20


def test_buffers_have_an_end() -> None:
    with ranks(2, 1 << 40) as exchanges:
        assert all(0 < exchange.capacity <= MAX_MESSAGE_BYTES for exchange in exchanges)


def test_a_rank_that_is_gone_is_named() -> None:
    with ranks(2) as (first, second):
        pending = first.start(torch.ones(4), [torch.empty(4)])
        second.close()
        with pytest.raises(RuntimeError, match="connection to rank 1 broke"):
            pending.wait()


def test_a_rank_that_sends_nothing_is_named() -> None:
    with ranks(2, timeout_s=0.3) as (first, _), pytest.raises(RuntimeError, match=r"rank 1 sent nothing for 0\.3 s"):
        first.start(torch.ones(4), [torch.empty(4)]).wait()


def test_a_rank_that_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="rank 0 did not get connections to all others"):
        connect_all(HashStore(), 0, 2, "127.0.0.1", 1024, 0.2)


def test_a_stranger_is_hung_up_on() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))
    found: list[Exchange] = []
    leader = threading.Thread(target=lambda: found.append(connect_all(store, 0, 2, "127.0.0.1", 1024, 10.0)))
    leader.start()
    store.wait(["exchange/0"])
    _, port, address = store.get("exchange/0").decode().split(" ")
    with socket.create_connection((address, int(port))) as stranger:
        stranger.sendall(b"x" * 32 + (1).to_bytes(8, "big"))
        assert stranger.recv(1) == b""
    other = connect_all(store, 1, 2, "127.0.0.1", 1024, 10.0)
    leader.join()
    received = torch.empty(2)
    work = other.start(torch.ones(2), [torch.empty(2)])
    found[0].start(torch.zeros(2), [received]).wait()
    work.wait()
    assert (received == 1.0).all()
    other.close()
    found[0].close()
