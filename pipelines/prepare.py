"""Stage 1, prepare: a corpus becomes a tokenizer and token shards."""

import os
from typing import Any

from kraken.config import RunConfig, to_dict
from kraken.data.corpora import open_corpus
from pipelines.progress import ProgressLines
from pipelines.stage import Outcome, Stage, Work


def section(config: RunConfig) -> dict[str, Any]:
    """The data config and the very text it means on this machine."""
    return {"data": to_dict(config.data), "corpus_fingerprint": open_corpus(config.data).fingerprint}


def work(work: Work) -> Outcome:
    from kraken.data.prepare import prepare

    for leftover in work.folder.iterdir():
        leftover.unlink()
    data = work.config.data
    threads = len(os.sched_getaffinity(0))
    return prepare(data, open_corpus(data), work.folder, threads, ProgressLines("prepare: tokenize", "B"))


STAGE = Stage("prepare", parents=(), section=section, work=work)
