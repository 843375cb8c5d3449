"""Exchanges of messages between CPU processes over TCP, carried by the kernel while this process computes.

To start an exchange is to write a message into a socket's send buffer, to wait for it is to read the other's from the
receive buffer. Nothing runs here in between: the network stack does its work in interrupts. gloo has a thread for it,
which must be given the core that another thread computes on; where each process has one core, that costs milliseconds a
message, ten times what the kernel needs.

The buffers must hold a whole message for that. What is larger than `Exchange.capacity` is better left to gloo.
"""

import contextlib
import hmac
import secrets
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
"""Linux's, of which Python has no names: beyond net.core.wmem_max and rmem_max, for who may administer the network."""
BUFFERS_PER_MESSAGE = 4
"""The kernel doubles what is asked for, for its own records, and a receiver's window is half of what it then has."""
MAX_MESSAGE_BYTES = 2**26
"""Kernel memory has an end: two buffers of twice this at most for every other rank."""
TOKEN_BYTES = 32
NUMBER_BYTES = 8


class Link:
    """A connection to one other rank; messages arrive in the order in which they were started."""

    def __init__(self, connection: socket.socket, rank: int, timeout_s: float):
        self._socket, self._rank, self._timeout_s = connection, rank, timeout_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)

    def start(self, message: memoryview) -> memoryview:
        """Hand a message to the kernel; returns what it had no room for."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # that it is broken is said by `finish`
            while len(message):
                message = message[self._socket.send(message) :]
        return message

    def finish(self, unsent: memoryview, message: memoryview) -> None:
        """Fill a message with what the other rank sends, and send the rest of ours.

        Raises:
            RuntimeError: the other rank is gone, or sends nothing for as long as a rank may be waited for.
        """
        try:
            self._finish(unsent, message, time.monotonic() + self._timeout_s)
        except OSError as error:
            raise RuntimeError(f"the connection to rank {self._rank} broke: {error}") from error

    def _finish(self, unsent: memoryview, message: memoryview, deadline: float) -> None:
        poll = select.poll()
        while len(unsent) or len(message):
            with contextlib.suppress(BlockingIOError):
                if len(unsent):
                    unsent = unsent[self._socket.send(unsent) :]
            with contextlib.suppress(BlockingIOError):
                if len(message):
                    count = self._socket.recv_into(message)
                    if count == 0:
                        raise ConnectionError("the other end hung up")
                    message = message[count:]
                    continue
            if len(unsent) or len(message):
                events = (select.POLLIN if len(message) else 0) | (select.POLLOUT if len(unsent) else 0)
                poll.register(self._socket, events)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                    raise RuntimeError(f"rank {self._rank} sent nothing for {self._timeout_s:g} s")

    def close(self) -> None:
        self._socket.close()


@dataclass(slots=True)
class PendingExchange:
    """A message to each other rank, and one from each, in flight."""

    links: Sequence[Link]
    unsent: list[memoryview]
    received: list[memoryview]
    kept: tuple[Tensor, ...]
    """Whose memory the messages are."""

    def wait(self) -> None:
        """Return when all have arrived. Exchanges are waited for in the order in which they were started."""
        for link, unsent, received in zip(self.links, self.unsent, self.received, strict=True):
            link.finish(unsent, received)


class Exchange:
    """A rank's connections to all others.

    Args:
        capacity: bytes of the largest message that the buffers at both ends of every connection hold.
    """

    def __init__(self, links: Sequence[Link], capacity: int):
        self._links, self.capacity = links, capacity

    def start(self, own: Tensor, received: Sequence[Tensor]) -> PendingExchange:
        """Send `own` to every other rank, and fill `received` with theirs, in the order of the ranks; all contiguous,
        on the CPU, and of equal size."""
        message = _bytes_of(own)
        unsent = [link.start(message) for link in self._links]
        return PendingExchange(self._links, unsent, [_bytes_of(part) for part in received], (own, *received))

    def close(self) -> None:
        """Hang up; whoever waits for this rank fails."""
        for link in self._links:
            link.close()


def connect_all(store: Store, rank: int, size: int, address: str, message_bytes: int, timeout_s: float) -> Exchange:
    """Connect with every other rank.

    Args:
        store: shared by the ranks, and by nobody else: what is in it lets them know each other.
        address: of this host, as the others reach it.
        message_bytes: what the buffers should hold; less where that is too much, or the system allows no more.
    Raises:
        RuntimeError: a rank cannot be reached, or does not come.
    """
    message_bytes = min(message_bytes, MAX_MESSAGE_BYTES)
    deadline = time.monotonic() + timeout_s
    connections: dict[int, socket.socket] = {}
    try:
        with socket.create_server((address, 0), family=_family(address), backlog=size) as listener:
            _enlarge_buffers(listener, message_bytes)
            token = secrets.token_hex(TOKEN_BYTES // 2)
            store.set(f"exchange/{rank}", f"{token} {listener.getsockname()[1]} {address}")
            for other in range(rank):
                connections[other] = _call(store, rank, other, message_bytes, deadline)
            while len(connections) < size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                connection = listener.accept()[0]
                caller = _answer(connection, token, deadline)
                if caller is None or caller in connections:
                    connection.close()  # a stranger
                else:
                    connections[caller] = connection
        held = [
            _agree_on_capacity(connection, message_bytes, deadline) for _, connection in sorted(connections.items())
        ]
    except OSError as error:
        for connection in connections.values():
            connection.close()
        raise RuntimeError(f"rank {rank} did not get connections to all others: {error}") from error
    links = [Link(connection, other, timeout_s) for other, connection in sorted(connections.items())]
    return Exchange(links, min(held, default=0))


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


def _enlarge_buffers(connection: socket.socket, message_bytes: int) -> None:
    """Before it is connected: how much may be in flight is agreed on then."""
    wanted = message_bytes * BUFFERS_PER_MESSAGE // 2
    for forced, usual in ((SO_SNDBUFFORCE, socket.SO_SNDBUF), (SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        connection.setsockopt(socket.SOL_SOCKET, usual, wanted)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, forced, wanted)


def _call(store: Store, rank: int, other: int, message_bytes: int, deadline: float) -> socket.socket:
    """Connect to a rank that listens."""
    key = f"exchange/{other}"
    store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
    token, port, address = store.get(key).decode().split(" ")
    connection = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        _enlarge_buffers(connection, message_bytes)
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.connect((address, int(port)))
        connection.sendall(token.encode() + rank.to_bytes(NUMBER_BYTES, "big"))
    except OSError:
        connection.close()
        raise
    return connection


def _answer(connection: socket.socket, token: str, deadline: float) -> int | None:
    """The rank that called; None for whoever does not know the token."""
    try:
        greeting = _receive(connection, TOKEN_BYTES + NUMBER_BYTES, deadline)
    except OSError:
        return None
    if not hmac.compare_digest(greeting[:TOKEN_BYTES], token.encode()):
        return None
    return int.from_bytes(greeting[TOKEN_BYTES:], "big")


def _agree_on_capacity(connection: socket.socket, message_bytes: int, deadline: float) -> int:
    """The largest message that all four buffers of a connection hold, the same at both ends."""
    options = (socket.SO_SNDBUF, socket.SO_RCVBUF)
    held = min(connection.getsockopt(socket.SOL_SOCKET, option) for option in options) // BUFFERS_PER_MESSAGE
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    connection.sendall(min(held, message_bytes).to_bytes(NUMBER_BYTES, "big"))
    return min(held, message_bytes, int.from_bytes(_receive(connection, NUMBER_BYTES, deadline), "big"))


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    found = b""
    while len(found) < count:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the other end hung up")
        found += part
    return found


def _bytes_of(x: Tensor) -> memoryview:
    """A tensor's memory."""
    content: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(content)
