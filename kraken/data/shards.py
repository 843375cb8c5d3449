"""Token shards: flat little-endian arrays of ids, as nanoGPT's `train.bin`, written whole or not at all."""

import os
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kraken.data.corpus import Split
from kraken.manifest import ArtefactError

FLUSH_TOKENS = 2**18
"""Tokens gathered before they are checked and written."""


def token_dtype(num_ids: int) -> np.dtype:
    """Two bytes a token as long as every id fits."""
    return np.dtype("<u2") if num_ids <= 2**16 else np.dtype("<u4")


def shard_name(split: Split, index: int) -> str:
    """File name of a shard; sorted names are in reading order."""
    return f"{split}_{index:06d}.bin"


class ShardWriter:
    """One shard, written under a hidden name and renamed when it is whole. Without tokens there is no file.

    Args:
        num_ids: ids of the tokenizer; decides the type on disk and bounds what is valid.
    """

    def __init__(self, folder: Path, split: Split, index: int, num_ids: int):
        self.path = folder / shard_name(split, index)
        self.split = split
        self.num_ids = num_ids
        self.num_tokens = 0
        # Two attempts at one shard may overlap, when the first one's machine was only thought dead.
        self._partial = folder / f".{self.path.name}.{uuid.uuid4().hex}"
        self._file: BinaryIO | None = None
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids.

        Raises:
            ArtefactError: an id is past the vocabulary.
        """
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._num_pending:
            return
        ids = np.concatenate(self._pending)
        if int(ids.max()) >= self.num_ids:
            raise ArtefactError(
                f"a {self.split} document holds id {int(ids.max())}, past the {self.num_ids} ids of the tokenizer"
            )
        self._file = self._file or self._partial.open("wb")
        ids.astype(token_dtype(self.num_ids)).tofile(self._file)
        self.num_tokens += len(ids)
        self._pending, self._num_pending = [], 0

    def finish(self) -> None:
        """Make the shard exist for readers, or not exist when nothing was written."""
        self._flush()
        if self._file is None:
            self.path.unlink(missing_ok=True)  # of an attempt by other rules
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Leave nothing behind; after `finish` nothing happens."""
        if self._file is not None:
            self._file.close()
        self._partial.unlink(missing_ok=True)


class TokenShards:
    """The tokens of one split, memory-mapped and read as one long array.

    Args:
        folder: a prepared artefact's folder.
        num_ids: ids of the tokenizer; decides the type on disk and bounds what is valid.

    Raises:
        ArtefactError: no shards, or one whose size is not a whole number of tokens.
    """

    def __init__(self, folder: Path, split: Split, num_ids: int):
        dtype = token_dtype(num_ids)
        paths = sorted(folder.glob(f"{split}_*.bin"))
        if not paths:
            raise ArtefactError(f"{folder} holds no {split} shards; run prepare again")
        for path in paths:
            num_bytes = path.stat().st_size
            if num_bytes == 0 or num_bytes % dtype.itemsize:
                raise ArtefactError(
                    f"{path} is truncated: its {num_bytes} bytes are no multiple of {dtype.itemsize}, or none; "
                    f"delete {folder} and run prepare again"
                )
        self.folder = folder
        self.split = split
        self.num_ids = num_ids
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.num_tokens = int(self._ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64.

        Raises:
            ArtefactError: an id is past the tokenizer's: the shard is damaged.
        """
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} are outside 0..{self.num_tokens}")
        tokens = np.empty(length, dtype=np.int64)
        shard_index = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < length:
            shard = self._shards[shard_index]
            offset = start + filled - (int(self._ends[shard_index]) - len(shard))
            part = shard[offset : offset + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            shard_index += 1
        if length and int(tokens.max()) >= self.num_ids:
            raise ArtefactError(
                f"{self.split} tokens {start}..{start + length} hold id {int(tokens.max())}, past the {self.num_ids} "
                f"ids of the tokenizer: the shards are damaged; delete {self.folder} and run prepare again"
            )
        return tokens
