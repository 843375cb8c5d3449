"""The control channel between rank 0 of an engine and a worker: frames over a TCP connection.

A frame is a kind, a length and so many bytes: JSON during startup, then one array of int32 for each step. Nothing that
arrives is executed or unpickled.
"""

import contextlib
import json
import socket
import struct
import time
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("!BQ")
MAX_FRAME_BYTES = 2**30
SPIN_S = 0.003
"""Time that a worker polls before it sleeps. Waking a process costs both ends some 40 us, and the steps of small models
follow each other within this time."""


class Kind(IntEnum):
    """Kind of a frame."""

    JSON = 0
    STEP = 1
    STOP = 2


class ConnectionLost(ConnectionError):
    """The other end has closed the connection."""


class Connection:
    """One end of a connection, blocking; frames arrive whole and in order."""

    def __init__(self, end: socket.socket):
        self._socket = end
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def local_address(self) -> str:
        """Address of this host, as the other end reaches it."""
        return str(self._socket.getsockname()[0])

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_timeout(self, timeout_s: float | None) -> None:
        self._socket.settimeout(timeout_s)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame. Raises: OSError: the other end is gone."""
        self._socket.sendall(HEADER.pack(kind, len(payload)) + payload)

    def send_json(self, values: dict[str, Any]) -> None:
        self.send(Kind.JSON, json.dumps(values).encode())

    def receive(self, spins: bool = False) -> tuple[Kind, bytes]:
        """Wait for the next frame.

        Args:
            spins: poll for up to `SPIN_S` before sleeping.
        Raises:
            ConnectionLost: the other end is gone, or sent something that is not a frame.
            TimeoutError: no frame came in time, see `set_timeout`.
        """
        if spins:
            self._spin()
        kind, num_bytes = HEADER.unpack(self._receive_bytes(HEADER.size))
        if kind not in list(Kind) or num_bytes > MAX_FRAME_BYTES:
            raise ConnectionLost("the other end sent something that is not a frame")
        return Kind(kind), self._receive_bytes(num_bytes)

    def receive_json(self) -> dict[str, Any]:
        """Wait for the next frame, which must be JSON. Raises as `receive` does."""
        kind, payload = self.receive()
        if kind is not Kind.JSON:
            raise ConnectionLost(f"{kind.name} where JSON was expected")
        values: dict[str, Any] = json.loads(payload)
        return values

    def close(self) -> None:
        self._socket.close()

    def _spin(self) -> None:
        """Poll until bytes have arrived, or for `SPIN_S`."""
        ends_at = time.monotonic() + SPIN_S
        while time.monotonic() < ends_at:
            with contextlib.suppress(BlockingIOError):
                self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                return

    def _receive_bytes(self, count: int) -> bytes:
        buffer = bytearray(count)
        view, start = memoryview(buffer), 0
        while start < count:
            num_read = self._socket.recv_into(view[start:])
            if num_read == 0:
                raise ConnectionLost("the connection was closed")
            start += num_read
        return bytes(buffer)
