"""Prepare: a corpus becomes a tokenizer and token shards, in one folder."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kraken.config import DataConfig
from kraken.data.corpora import SPLITS, Document, EmbeddedCorpus, documents_of
from kraken.data.shards import TokenShards, write_shards
from kraken.manifest import Metric
from kraken.tokenizer import Tokenizer

DOCUMENTS_PER_BATCH = 64
"""Documents encoded at once; bounds memory and the steps of the progress bar."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def prepare(
    config: DataConfig, corpus: EmbeddedCorpus, folder: Path, num_threads: int, on_progress: Progress
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Train or load the tokenizer, then write both splits' shards.

    Returns:
        The manifest's metrics and details.
    """
    tokenizer = Tokenizer.make(config, (d.text for d in documents_of(corpus, "train", config.validation_fraction)))
    tokenizer.save(folder)
    total_bytes = sum(len(document.text.encode()) for document in corpus.documents)
    done_bytes = 0

    def encode(documents: Iterator[Document], counts: dict[str, int]) -> Iterator[np.ndarray]:
        nonlocal done_bytes
        while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
            yield from tokenizer.encode_documents([document.text for document in batch], num_threads)
            num_bytes = sum(len(document.text.encode()) for document in batch)
            counts["documents"] += len(batch)
            counts["bytes"] += num_bytes
            done_bytes += num_bytes
            on_progress(done_bytes, total_bytes)

    metrics: dict[str, Metric] = {}
    for split in SPLITS:
        counts = {"documents": 0, "bytes": 0}
        documents = documents_of(corpus, split, config.validation_fraction)
        num_tokens = write_shards(folder, split, encode(documents, counts), tokenizer.num_ids, config.tokens_per_shard)
        metrics[f"{split}_documents"] = Metric(counts["documents"], "documents")
        metrics[f"{split}_bytes"] = Metric(counts["bytes"], "bytes")
        metrics[f"{split}_tokens"] = Metric(num_tokens, "tokens")
    validation = TokenShards(folder, "validation", tokenizer.num_ids)
    metrics["unigram_entropy"] = Metric(unigram_entropy(validation), "nats/token")
    metrics["vocabulary_ids"] = Metric(tokenizer.num_ids, "ids")
    details = {
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    return metrics, details


def unigram_entropy(shards: TokenShards) -> float:
    """Entropy of the split's token frequencies in nats per token: what knowing only the frequencies would reach.

    It is measured on the very tokens that a model is scored on, which makes it the harder mark to beat.
    """
    counts = np.zeros(shards.num_ids, dtype=np.int64)
    for start in range(0, shards.num_tokens, 2**24):
        tokens = shards.read(start, min(2**24, shards.num_tokens - start))
        counts += np.bincount(tokens, minlength=shards.num_ids)
    probabilities = counts[counts > 0] / shards.num_tokens
    return float(-(probabilities * np.log(probabilities)).sum())
