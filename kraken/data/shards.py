"""Token shards: flat little-endian arrays of ids, as nanoGPT's `train.bin`, written whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kraken.data.corpora import Split
from kraken.manifest import ArtefactError


def token_dtype(num_ids: int) -> np.dtype:
    """Two bytes a token as long as every id fits."""
    return np.dtype("<u2") if num_ids <= 2**16 else np.dtype("<u4")


def shard_name(split: Split, index: int) -> str:
    """File name of a shard; sorted names are in reading order."""
    return f"{split}_{index:06d}.bin"


def write_shards(
    folder: Path, split: Split, documents: Iterable[np.ndarray], num_ids: int, tokens_per_shard: int
) -> int:
    """Write the documents' ids one after the other into shards of exactly `tokens_per_shard` tokens (the last: fewer).

    Returns:
        The number of tokens written.
    Raises:
        ArtefactError: an id is past the vocabulary, or the split is empty.
    """
    dtype = token_dtype(num_ids)
    num_tokens, index, pending, num_pending = 0, 0, [], 0

    def write(ids: np.ndarray) -> None:
        nonlocal index
        partial = folder / f".{shard_name(split, index)}"
        with partial.open("wb") as file:
            ids.astype(dtype).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / shard_name(split, index))
        index += 1

    for ids in documents:
        if len(ids) and int(ids.max()) >= num_ids:
            raise ArtefactError(
                f"a {split} document holds id {int(ids.max())}, past the {num_ids} ids of the tokenizer"
            )
        pending.append(ids)
        num_pending += len(ids)
        num_tokens += len(ids)
        if num_pending >= tokens_per_shard:
            whole = np.concatenate(pending)
            cut = num_pending - num_pending % tokens_per_shard
            for start in range(0, cut, tokens_per_shard):
                write(whole[start : start + tokens_per_shard])
            pending, num_pending = [whole[cut:]], num_pending - cut
    if num_pending:
        write(np.concatenate(pending))
    if num_tokens == 0:
        raise ArtefactError(f"the {split} split holds no tokens; give more text or another data.validation_fraction")
    return num_tokens


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
            if path.stat().st_size % dtype.itemsize:
                raise ArtefactError(
                    f"{path} is truncated: its size is no multiple of {dtype.itemsize} bytes; run prepare again"
                )
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
                "ids of the tokenizer: the shards are damaged; run prepare again"
            )
        return tokens
