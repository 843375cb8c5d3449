"""Tensor files: safetensors whose header says which piece of which whole tensor each entry is.

Written by hand, as the format is eight bytes of length, a JSON header and the numbers: straight from the buffers that a
snapshot fills, in blocks during which Python's lock is free, and hashed on the way, so that a checkpoint written beside
the training neither copies its tensors again nor reads its file back.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from kraken.checkpoint.pieces import Piece
from kraken.manifest import ArtefactError, FileRecord

BLOCK_BYTES = 2**24
"""Bytes hashed and written at a time."""

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

PIECES_KEY = "pieces"
"""Metadata: JSON of name -> [shape of the whole, start of the piece]."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> FileRecord:
    """Write contiguous CPU tensors, durably, and return the file's size and hash.

    Raises:
        OSError: the disk is full, or gone.
    """
    places = {name: [list(pieces[name].whole), list(pieces[name].start)] for name in tensors}
    header: dict[str, object] = {"__metadata__": {PIECES_KEY: json.dumps(places)}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            _write_all(file.fileno(), memoryview(block))
        for tensor in tensors.values():
            numbers = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(numbers), BLOCK_BYTES):
                block_view = numbers[start : start + BLOCK_BYTES]
                digest.update(block_view)
                _write_all(file.fileno(), block_view)
        os.fsync(file.fileno())
    return FileRecord(path=path.name, num_bytes=8 + len(text) + offset, sha256=digest.hexdigest())


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


def read_pieces(path: Path) -> dict[str, Piece]:
    """What a file holds, by name; only its header is read.

    Raises:
        ArtefactError: the header is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()[PIECES_KEY])
            return {
                name: Piece(tuple(places[name][0]), tuple(places[name][1]), tuple(file.get_slice(name).get_shape()))
                for name in places
            }
    except (OSError, ValueError, KeyError, TypeError, IndexError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path} is damaged ({error})") from error
