"""nanoGPT's `train.bin` and `val.bin`: GPT-2's ids as flat uint16, used as they are."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.fs

from kraken.config import ConfigError
from kraken.data.corpus import Split
from kraken.data.files import open_path, readable
from kraken.data.shards import shard_name, token_dtype
from kraken.manifest import ArtefactError
from kraken.tokenizer import Tokenizer

FILE_NAMES: dict[Split, str] = {"train": "train.bin", "validation": "val.bin"}
CHECKED_TOKENS = 2**24
"""Tokens looked at together."""


class NanoGptFolder:
    """A folder as nanoGPT's `prepare.py` leaves it.

    Args:
        path: absolute path or URI.
    """

    name = "nanogpt"

    def __init__(self, path: str):
        self.path = path

    def _locate(self, name: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """The file system, and the path of one of the folder's files in it."""
        file_system, root, rest = open_path(self.path)
        return file_system, "/".join(filter(None, (root.rstrip("/"), rest, name)))

    def _info(self, name: str) -> pyarrow.fs.FileInfo:
        file_system, path = self._locate(name)
        with readable(self.path):
            return file_system.get_file_info(path)

    @property
    def fingerprint(self) -> str:
        """Hash of the two files' names, sizes and times of change.

        Raises:
            ConfigError: a file is missing, or the folder's ids are not GPT-2's.
        """
        listing = []
        for name in FILE_NAMES.values():
            info = self._info(name)
            if info.type != pyarrow.fs.FileType.File:
                raise ConfigError(
                    f"data.paths={self.path} holds no {name}; give the folder that nanoGPT's prepare.py wrote, with "
                    f"{' and '.join(FILE_NAMES.values())}"
                )
            listing.append([name, info.size, info.mtime_ns or 0])
        if self._info("meta.pkl").type == pyarrow.fs.FileType.File:
            raise ConfigError(
                f"data.paths={self.path} has a vocabulary of its own (meta.pkl), as nanoGPT's character-level data "
                "sets do, not GPT-2's; use its text with data.corpus=files"
            )
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def adopt(self, split: Split, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
        """Put one split's file into `folder` as its only shard: a hard link where possible, else a copy.

        Returns:
            How often each id occurs, int64 [num_ids].
        Raises:
            ArtefactError: the file is empty or truncated, or holds ids that are not GPT-2's; nothing is left then.
        """
        file_system, source = self._locate(FILE_NAMES[split])
        target = folder / shard_name(split, 0)
        target.unlink(missing_ok=True)
        try:
            if not isinstance(file_system, pyarrow.fs.LocalFileSystem):
                raise OSError("a link needs a local file")
            os.link(source, target)
        except OSError:
            local = pyarrow.fs.LocalFileSystem()
            with readable(source):
                pyarrow.fs.copy_files(source, str(target), source_filesystem=file_system, destination_filesystem=local)
        try:
            return count_ids(target, tokenizer.num_ids, source)
        except ArtefactError:
            target.unlink()
            raise


def count_ids(path: Path, num_ids: int, name: str) -> np.ndarray:
    """How often each id occurs in a shard, int64 [num_ids]; it need not fit in memory.

    Raises:
        ArtefactError: `name` is truncated, empty, or holds an id past the vocabulary.
    """
    dtype = token_dtype(num_ids)
    num_bytes = path.stat().st_size
    if num_bytes == 0 or num_bytes % dtype.itemsize:
        raise ArtefactError(f"{name} has {num_bytes} bytes, which is no whole number of tokens; write it again")
    counts = np.zeros(num_ids, dtype=np.int64)
    for start in range(0, num_bytes // dtype.itemsize, CHECKED_TOKENS):
        found = np.bincount(np.fromfile(path, dtype, CHECKED_TOKENS, offset=start * dtype.itemsize))
        if len(found) > num_ids:
            raise ArtefactError(
                f"{name} holds id {len(found) - 1}, past the {num_ids} ids of GPT-2: it was written with another "
                "tokenizer; use its text with data.corpus=files"
            )
        counts[: len(found)] += found
    return counts
