"""Hugging Face data sets as a corpus, streamed: nothing is downloaded but what is being read."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from kraken.config import ConfigError, DataConfig
from kraken.data.corpus import Document, OnBad, Part, Piece
from kraken.data.files import PARQUET_ROWS, read_column
from kraken.manifest import ArtefactError
from kraken.tokenizer import first_line

SHORT_NAMES = {"openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet")}
"""Name -> id and revision. The data set's own branch holds a loading script, which `datasets` no longer runs."""


class HuggingFaceCorpus:
    """One split of a data set on the hub, in the cache below HF_HOME, or in a local folder."""

    name = "huggingface"
    unit = " shards"  # their sizes are not known

    def __init__(self, config: DataConfig):
        assert config.dataset is not None
        self.config = config
        self.dataset, default_revision = SHORT_NAMES.get(config.dataset, (config.dataset, None))
        self.revision = config.dataset_revision or default_revision

    @cached_property
    def _builder(self) -> Any:
        import datasets  # a second, which other corpora need not spend
        from datasets.exceptions import DatasetNotFoundError

        setting = f"data.dataset={self.config.dataset}"
        try:
            with quiet_hub():
                return datasets.load_dataset_builder(self.dataset, self.config.dataset_config, revision=self.revision)
        except (DatasetNotFoundError, FileNotFoundError, ValueError, RuntimeError) as error:
            # among them an unknown configuration, a gated data set, and one that needs its loading script
            raise ConfigError(
                f"{setting} (data.dataset_config={self.config.dataset_config}, data.dataset_revision={self.revision}) "
                f"cannot be opened: {first_line(error)}; choose others, or download it and use data.corpus=files"
            ) from error
        except OSError as error:
            raise ArtefactError(
                f"{setting}: the Hugging Face hub cannot be reached and its cache does not hold the data set; without "
                "network, bring HF_HOME from a machine where load_dataset has run, or use --data.corpus files "
                "--data.paths FOLDER with the data set's Parquet files, or --data.corpus embedded"
            ) from error

    @cached_property
    def version(self) -> str:
        """The commit on the hub; for a local folder, a hash of its files' names, sizes and times of change."""
        if not os.path.isabs(self.dataset):
            return str(self._builder.hash)
        paths = sorted(path for path in Path(self.dataset).rglob("*") if path.is_file())
        listing = [(str(p.relative_to(self.dataset)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the id, the configuration, the split and the commit that the revision means."""
        parts = [self.dataset, self._builder.config.name, self.config.dataset_split, self.version]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _stream(self) -> Any:
        """The split as an IterableDataset of its text column, in Arrow's format."""
        split, field = self.config.dataset_split, self.config.text_field
        with self._reading():
            try:
                stream = self._builder.as_streaming_dataset(split)
            except ValueError as error:
                if "split" not in str(error):
                    raise
                raise ConfigError(f"data.dataset_split={split} does not exist: {first_line(error)}") from error
            names = stream.column_names or list(next(iter(stream), {}))
            if field not in names:
                raise ConfigError(f"{self.dataset} has no column {field!r}; choose data.text_field from {names}")
            return stream.select_columns([field]).with_format("arrow")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Any error of the network, of decompression or of a damaged file as one that says what was read.

        `datasets` lets errors of all the libraries through that it reads with: httpx, fsspec, zlib, zstandard, pandas.
        """
        try:
            yield
        except (ConfigError, ArtefactError):
            raise
        except Exception as error:
            raise ArtefactError(
                f"{self.dataset} cannot be read ({first_line(error)}); run the same command again, which keeps what is "
                "finished; if it fails again, download its files and read them with data.corpus=files"
            ) from error

    def pieces(self, bytes_per_piece: int) -> tuple[Piece, ...]:
        """The data set's own shards, usually its files; what is inside one is reached only by reading it."""
        name = f"{self.dataset}/{self.config.dataset_split}"
        return tuple(
            Piece(index, (Part(name, index, index + 1, 0, source=self.dataset, version=self.version),))
            for index in range(self._stream.num_shards)
        )

    def read(self, piece: Piece, on_bad: OnBad) -> Iterator[Document]:
        """The documents of one shard, named after its number and their rows.

        Raises:
            ArtefactError: the data set has changed, or another node's cache holds another version.
        """
        [part] = piece.parts
        if part.version != self.version:
            raise ArtefactError(
                f"{self.dataset} is {self.version[:12]} here, but the work was planned for {part.version[:12]}; set "
                "data.dataset_revision to a commit, or bring the same HF_HOME to every node"
            )
        name = f"{part.name}/{part.start}"
        shard = self._stream.shard(num_shards=self._stream.num_shards, index=part.start)
        row = 0
        with self._reading():
            for table in shard.iter(batch_size=PARQUET_ROWS):
                yield from read_column(table.column(0), name, row, self.config.text_field, on_bad)
                row += table.num_rows


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's client from printing each of its attempts; the last one's error says what there is to say."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
