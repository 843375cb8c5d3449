"""Messages between an engine's process and its user: JSON and numpy arrays over a socket, no pickle.

A frame is two lengths (uint32 big-endian), a JSON object, and the raw bytes of its arrays one after the other.
"""

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

HEAD = struct.Struct("!II")
ARRAYS = "arrays"


def pack(message: Mapping[str, Any], arrays: Mapping[str, np.ndarray | None] | None = None) -> bytes:
    """One frame; arrays that are None are left out."""
    present = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items() if array is not None}
    shapes = {name: [array.dtype.name, list(array.shape)] for name, array in present.items()}
    text = json.dumps({**message, ARRAYS: shapes}).encode()
    blob = b"".join(array.tobytes() for array in present.values())
    return HEAD.pack(len(text), len(blob)) + text + blob


async def read(reader: asyncio.StreamReader) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next frame.

    Raises:
        EOFError: the other side is gone.
    """
    try:
        text_length, blob_length = HEAD.unpack(await reader.readexactly(HEAD.size))
        message: dict[str, Any] = json.loads(await reader.readexactly(text_length))
        blob = await reader.readexactly(blob_length)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EOFError("the other side closed the connection") from error
    arrays, offset = {}, 0
    for name, (dtype, shape) in message.pop(ARRAYS).items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(blob, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return message, arrays
