"""Prepare: a corpus becomes a tokenizer and token shards, in one folder, whose finished pieces are never done twice."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kraken.config import DataConfig
from kraken.data.corpora import open_corpus
from kraken.data.corpus import SPLITS, Corpus, Piece
from kraken.data.nanogpt import NanoGptFolder
from kraken.data.pieces import PieceRecord, finished_records, tokenize_piece, training_texts
from kraken.data.shards import TokenShards
from kraken.data.splits import way_out
from kraken.manifest import ArtefactError, Metric
from kraken.tokenizer import META_NAME, Tokenizer

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all, in the corpus's unit, and a note on the speed."""

Workers = Callable[[Sequence[Piece], Tokenizer], Iterator[PieceRecord]]
"""Tokenises pieces, whose records it gives as they are finished, in any order."""

Outcome = tuple[dict[str, Metric], dict[str, Any]]
"""The manifest's metrics and details."""

SHOWN_SKIPPED = 20

RULES = 2
"""Version of the rules by which documents become shards; part of the stage's fingerprint. 2: the split of a document
follows from its text instead of its name, a file with several names is read once, a lone text file is cut."""


def identity(config: DataConfig) -> dict[str, Any]:
    """What determines the shards beside the data config: what its source holds, and by which rules it is read."""
    if config.corpus == "nanogpt":  # its files are the shards
        return {"corpus_fingerprint": NanoGptFolder(config.paths[0]).fingerprint}
    return {"corpus_fingerprint": open_corpus(config).fingerprint, "rules": RULES}


def prepare(
    config: DataConfig, corpus: Corpus, folder: Path, on_progress: Progress, workers: Workers | None = None
) -> Outcome:
    """Train or load the tokenizer, then turn every piece that is not finished into shards.

    Args:
        workers: None works through the pieces here.
    Raises:
        ArtefactError: the corpus is empty or damaged, or one of the splits is empty.
    """
    pieces = corpus.pieces(config.bytes_per_piece)
    if not pieces:
        raise ArtefactError(f"the corpus is empty: nothing in {config.paths or config.dataset or corpus.name} is text")
    tokenizer = make_tokenizer(config, corpus, pieces, folder)
    finished = finished_records(folder, pieces, tokenizer)
    if config.on_bad_document == "stop":  # pieces of which an earlier attempt skipped documents must stop this one
        finished = {index: record for index, record in finished.items() if not record.num_skipped}
    records = list(finished.values())
    meter = Meter(pieces, records, on_progress)
    todo = [piece for piece in pieces if piece.index not in finished]
    work = workers or (lambda some, tok: (tokenize_piece(config, corpus, piece, tok, folder) for piece in some))
    for record in work(todo, tokenizer):
        records.append(record)
        meter.add(record)
    for path in folder.glob(".*"):  # of attempts whose process was killed
        path.unlink()
    return summarise(config, corpus, tokenizer, records, folder)


def make_tokenizer(config: DataConfig, corpus: Corpus, pieces: Sequence[Piece], folder: Path) -> Tokenizer:
    """The tokenizer that an earlier attempt left in the folder, else a new one, saved there."""
    if (folder / META_NAME).is_file():
        try:
            return Tokenizer.load(folder)
        except ArtefactError:
            pass  # damaged: made again
    if config.tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    else:
        tokenizer = Tokenizer.train(training_texts(config, corpus, pieces), config.num_trained_ids)
    tokenizer.save(folder)
    return tokenizer


class Meter:
    """Progress over the pieces, finished ones included; the speed is that of this attempt."""

    def __init__(self, pieces: Sequence[Piece], finished: Sequence[PieceRecord], on_progress: Progress):
        self._sizes = {piece.index: piece.num_bytes or 1 for piece in pieces}
        self._total = sum(self._sizes.values())
        self._done = sum(self._sizes[record.index] for record in finished)
        self._num_tokens = 0
        self._on_progress = on_progress
        self._started_at = time.monotonic()

    def add(self, record: PieceRecord) -> None:
        """Count a piece that was just finished."""
        self._done += self._sizes[record.index]
        self._num_tokens += record.num_tokens
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        self._on_progress(self._done, self._total, f"{self._num_tokens / seconds:,.0f} tokens/s")


def summarise(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, records: Sequence[PieceRecord], folder: Path
) -> Outcome:
    """What the manifest says of finished shards.

    Raises:
        ArtefactError: a split is empty.
    """
    metrics: dict[str, Metric] = {}
    for split in SPLITS:
        counts = [record.splits[split] for record in records]
        metrics[f"{split}_documents"] = Metric(sum(c.documents for c in counts), "documents")
        metrics[f"{split}_bytes"] = Metric(sum(c.num_bytes for c in counts), "bytes")
        metrics[f"{split}_tokens"] = Metric(sum(c.num_tokens for c in counts), "tokens")
    num_skipped = sum(record.num_skipped for record in records)
    for split in SPLITS:
        if metrics[f"{split}_tokens"].value == 0:
            left_out = f" ({num_skipped} documents were left out)" if num_skipped else ""
            raise ArtefactError(
                f"the {split} split holds no tokens with data.validation_fraction={config.validation_fraction}"
                f"{left_out}; {way_out(records)}"
            )
    metrics["skipped_documents"] = Metric(num_skipped, "documents")
    metrics["unigram_entropy"] = Metric(
        unigram_entropy(TokenShards(folder, "validation", tokenizer.num_ids)), "nats/token"
    )
    metrics["vocabulary_ids"] = Metric(tokenizer.num_ids, "ids")
    details = details_of(corpus.name, corpus.fingerprint, tokenizer)
    if num_skipped:
        in_order = sorted(records, key=lambda record: record.index)
        details["skipped"] = [reason for record in in_order for reason in record.skipped][:SHOWN_SKIPPED]
    return metrics, details


def details_of(corpus_name: str, fingerprint: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which corpus and tokenizer the shards come from."""
    return {
        "corpus": corpus_name,
        "corpus_fingerprint": fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def adopt_nanogpt(config: DataConfig, folder: Path) -> Outcome:
    """Take over nanoGPT's token files as shards, with GPT-2's tokenizer; their ids are checked."""
    source = NanoGptFolder(config.paths[0])
    fingerprint = source.fingerprint
    for leftover in folder.iterdir():
        leftover.unlink()
    tokenizer = Tokenizer.gpt2()
    tokenizer.save(folder)
    counts = {split: source.adopt(split, tokenizer, folder) for split in SPLITS}
    metrics: dict[str, Metric] = {}
    for split in SPLITS:
        metrics[f"{split}_documents"] = Metric(int(counts[split][tokenizer.eot_id]), "documents")
        metrics[f"{split}_tokens"] = Metric(int(counts[split].sum()), "tokens")
    metrics["unigram_entropy"] = Metric(entropy_of(counts["validation"]), "nats/token")
    metrics["vocabulary_ids"] = Metric(tokenizer.num_ids, "ids")
    return metrics, details_of(source.name, fingerprint, tokenizer)


def unigram_entropy(shards: TokenShards) -> float:
    """Entropy of the split's token frequencies in nats per token: what knowing only the frequencies would reach.

    It is measured on the very tokens that a model is scored on, which makes it the harder mark to beat.
    """
    counts = np.zeros(shards.num_ids, dtype=np.int64)
    for start in range(0, shards.num_tokens, 2**24):
        tokens = shards.read(start, min(2**24, shards.num_tokens - start))
        counts += np.bincount(tokens, minlength=shards.num_ids)
    return entropy_of(counts)


def entropy_of(counts: np.ndarray) -> float:
    """Entropy in nats of frequencies given as counts."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
