"""Stage 1, prepare: a corpus becomes a tokenizer and token shards."""

from typing import Any

from kraken.config import ConfigError, RunConfig, to_dict
from kraken.manifest import Manifest
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


def is_valid(config: RunConfig, manifest: Manifest) -> bool:
    """Whether prepared data are what a config asks for, beyond their fingerprint.

    Raises:
        ConfigError: documents were left out, and the config says to stop at them.
    """
    num_skipped = int(manifest.value("skipped_documents")) if "skipped_documents" in manifest.metrics else 0
    if num_skipped and config.data.on_bad_document == "stop":
        raise ConfigError(
            f"data.on_bad_document=stop, but the prepared data {manifest.fingerprint[:12]} leave out {num_skipped} bad "
            "documents of this corpus; accept them with data.on_bad_document=skip, or mend the documents"
        )
    return True


STAGE = Stage("prepare", parents=(), section=section, work=work, still_valid=is_valid)
