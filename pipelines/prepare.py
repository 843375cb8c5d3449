"""Stage 1, prepare: a corpus becomes a tokenizer and token shards."""

from typing import Any

from kraken.config import RunConfig, to_dict
from pipelines.progress import ProgressLines
from pipelines.stage import Outcome, Stage, Work


def section(config: RunConfig) -> dict[str, Any]:
    """The data config, what its source holds now, and the rules by which it is read."""
    from kraken.data.prepare import identity

    return {"data": to_dict(config.data), **identity(config.data)}


def work(work: Work) -> Outcome:
    from kraken.data.corpora import open_corpus
    from kraken.data.prepare import adopt_nanogpt, prepare
    from pipelines.prepare_tasks import PieceTasks

    data = work.config.data
    if data.corpus == "nanogpt":
        outcome = adopt_nanogpt(data, work.folder)
    else:
        work.storage.fetch_files(work.storage.remote_files(work.folder))  # what an attempt on another node finished
        corpus = open_corpus(data)
        progress = ProgressLines("prepare: tokenize", corpus.unit)
        outcome = prepare(data, corpus, work.folder, progress, PieceTasks(work))
    work.storage.prune(work.folder)
    return outcome


STAGE = Stage("prepare", parents=(), section=section, work=work)
