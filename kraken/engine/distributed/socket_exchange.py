"""Exchange of messages between CPU ranks over TCP: the kernel carries them while this process computes.

`start` writes a message into a socket's send buffer, and `wait` reads the other rank's message from the receive buffer.
In between the network stack does its work in interrupts. gloo has a thread instead, which needs the core that the
engine computes on: with one core a process, that costs milliseconds a message, ten times as much as the kernel needs.

The buffers must hold a whole message. `ProcessGroupAllReduce` leaves messages above `Exchange.capacity` to gloo.
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
"""Linux socket options that Python has no names for: buffers beyond net.core.wmem_max and rmem_max, for processes that
may administer the network."""
BUFFERS_PER_MESSAGE = 4
"""Size of a socket's buffer divided by the size of a message: the kernel doubles the size for its bookkeeping, and
half of that is the receiver's window."""
MAX_MESSAGE_BYTES = 2**26
"""Largest message that buffers are made for: kernel memory is limited, and every other rank takes two buffers of twice
this size."""
TOKEN_BYTES = 32
NUMBER_BYTES = 8


class Link:
    """A connection to one other rank. Messages arrive in the order in which they were started."""

    def __init__(self, connection: socket.socket, rank: int, timeout_s: float):
        self._socket, self._rank, self._timeout_s = connection, rank, timeout_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)

    def start(self, message: memoryview) -> memoryview:
        """Write a message into the send buffer; returns the rest that did not fit."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # `finish` reports a broken connection
            while len(message):
                message = message[self._socket.send(message) :]
        return message

    def finish(self, unsent: memoryview, message: memoryview) -> None:
        """Receive the other rank's message into `message`, and send the rest of this rank's message.

        Raises:
            RuntimeError: the other rank is gone, or sends nothing for `timeout_s`.
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
                        raise ConnectionError("the other end closed the connection")
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
    """An exchange in flight: a message to each other rank, and one from each."""

    links: Sequence[Link]
    unsent: list[memoryview]
    received: list[memoryview]
    kept: tuple[Tensor, ...]
    """The tensors that own the messages' memory."""

    def wait(self) -> None:
        """Wait for all messages. Must be called in the order in which the exchanges were started."""
        for link, unsent, received in zip(self.links, self.unsent, self.received, strict=True):
            link.finish(unsent, received)


class Exchange:
    """A rank's connections to all other ranks.

    Args:
        capacity: size in bytes of the largest message that fits into all buffers, at both ends of every connection.
    """

    def __init__(self, links: Sequence[Link], capacity: int):
        self._links, self.capacity = links, capacity

    def start(self, own: Tensor, received: Sequence[Tensor]) -> PendingExchange:
        """Send `own` to every other rank, and receive their messages into `received`, in the order of the ranks.

        All tensors must be contiguous, on the CPU and of equal size, and must not be modified before `wait` returns.
        """
        message = _bytes_of(own)
        unsent = [link.start(message) for link in self._links]
        return PendingExchange(self._links, unsent, [_bytes_of(part) for part in received], (own, *received))

    def close(self) -> None:
        """Close all connections: ranks that wait for this one fail."""
        for link in self._links:
            link.close()


def connect_all(store: Store, rank: int, size: int, address: str, message_bytes: int, timeout_s: float) -> Exchange:
    """Connect with every other rank; all of them call this at the same time.

    Args:
        store: shared by the ranks of this engine alone, since it holds the secrets by which they know each other.
        address: of this host, as the other ranks reach it.
        message_bytes: size of a message that the buffers should hold; they are smaller if the system allows no more.
    Raises:
        RuntimeError: a rank cannot be reached, or does not connect in time.
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
                    connection.close()  # not a rank of this engine
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
    """Must be called before the socket connects: the largest TCP window is negotiated then."""
    wanted = message_bytes * BUFFERS_PER_MESSAGE // 2
    for forced, usual in ((SO_SNDBUFFORCE, socket.SO_SNDBUF), (SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        connection.setsockopt(socket.SOL_SOCKET, usual, wanted)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, forced, wanted)


def _call(store: Store, rank: int, other: int, message_bytes: int, deadline: float) -> socket.socket:
    """Connect to a rank of a lower number, which listens."""
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
    """The rank that connected; None if the other end does not know the token."""
    try:
        greeting = _receive(connection, TOKEN_BYTES + NUMBER_BYTES, deadline)
    except OSError:
        return None
    if not hmac.compare_digest(greeting[:TOKEN_BYTES], token.encode()):
        return None
    return int.from_bytes(greeting[TOKEN_BYTES:], "big")


def _agree_on_capacity(connection: socket.socket, message_bytes: int, deadline: float) -> int:
    """Size of the largest message that all four buffers of a connection hold; both ends get the same."""
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
            raise ConnectionError("the other end closed the connection")
        found += part
    return found


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    content: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(content)
