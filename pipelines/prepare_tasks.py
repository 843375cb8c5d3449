"""Tokenisation as Ray tasks, one a piece: at most so many at once that memory stays bounded, however many there are.

A task writes its piece's files into the artefact's folder. Where the storage is remote that folder is a cache of the
task's node: the task publishes the files, its record last, and the stage fetches what was made on another node. So what
is finished is in the storage, whichever node is lost.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray

from kraken.config import DataConfig
from kraken.data.corpora import open_corpus
from kraken.data.corpus import Corpus, Piece
from kraken.data.pieces import PieceRecord, tokenize_piece
from kraken.storage import Storage
from kraken.tokenizer import META_NAME, RANKS_NAME, Tokenizer, require_same_tokenizer
from pipelines.cluster import cancel_unfinished, result_of
from pipelines.stage import Work

TASKS_PER_CPU = 2
"""Tasks submitted at once: one that runs and one that is ready when it ends."""


class PieceTasks:
    """The pieces of one prepare stage as tasks of one CPU each, on every CPU of the cluster.

    Args:
        max_workers: tasks at once; None: as many as there are CPUs. It never changes the result.
    """

    def __init__(self, work: Work, max_workers: int | None = None):
        self._work = work
        self._max_workers = max_workers

    def __call__(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[PieceRecord]:
        """Records as the tasks end.

        Raises:
            ConfigError, ArtefactError: the first piece that failed says why; the others are stopped.
        """
        storage, folder = self._work.storage, self._work.folder
        storage.publish_files(folder / name for name in (RANKS_NAME, META_NAME))
        task = ray.remote(num_cpus=1, max_retries=3)(run_piece)
        config = ray.put(self._work.config.data)  # once, not with every task
        where = (storage.uri, self._work.fingerprint, tokenizer.fingerprint)
        waiting = iter(pieces)
        running: list[Any] = []
        try:
            while True:
                while len(running) < self._most_at_once() and (piece := next(waiting, None)) is not None:
                    running.append(task.options(name=f"prepare: piece {piece.index}").remote(config, *where, piece))
                if not running:
                    return
                done, running = ray.wait(running)
                for reference in done:
                    record: PieceRecord = result_of(reference)
                    storage.fetch_files(record.paths(folder))
                    yield record
        finally:
            cancel_unfinished(running)

    def _most_at_once(self) -> int:
        if self._max_workers is not None:
            return self._max_workers
        return max(1, int(ray.cluster_resources().get("CPU", 1))) * TASKS_PER_CPU


def run_piece(config: DataConfig, uri: str, fingerprint: str, tokenizer_digest: str, piece: Piece) -> PieceRecord:
    """The body of a task."""
    storage = Storage(uri)
    folder = storage.folder("prepare", fingerprint)
    storage.fetch_files(folder / name for name in (RANKS_NAME, META_NAME))
    record = tokenize_piece(config, worker_corpus(config), piece, worker_tokenizer(folder, tokenizer_digest), folder)
    storage.publish_files(record.paths(folder))
    return record


# A worker process runs many tasks of one stage: what they share is made once.


@lru_cache(maxsize=1)
def worker_corpus(config: DataConfig) -> Corpus:
    """The corpus, as this process sees it."""
    return open_corpus(config)


@lru_cache(maxsize=1)
def worker_tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        ArtefactError: this node's folder holds another one than the stage's.
    """
    tokenizer = Tokenizer.load(folder)
    require_same_tokenizer(tokenizer.fingerprint, fingerprint, str(folder), "the stage's copy")
    return tokenizer
