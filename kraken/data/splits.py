"""Whether both splits are long enough to train and validate on, and which setting would make them so."""

import math
from collections.abc import Sequence
from pathlib import Path

from kraken.data.pieces import PieceRecord, read_records
from kraken.manifest import ArtefactError, Manifest

MARGIN = 1.25
"""A suggested fraction holds out this many times what is needed: another fraction means another trained tokenizer."""


def require_windows(folder: Path, data: Manifest, context_length: int) -> None:
    """Check before training that every split of a prepared artefact holds the windows which training needs.

    Args:
        folder: the artefact's folder; read only to find the way out.
        context_length: tokens per window [T].
    Raises:
        ArtefactError: the training split is shorter than two windows, or the validation split than one.
    """
    needed = {"train": 2 * context_length + 1, "validation": context_length + 1}
    for split, what in (("train", "two windows"), ("validation", "one window")):
        num_tokens = int(data.value(f"{split}_tokens"))
        if num_tokens >= needed[split]:
            continue
        way = way_out(read_records(folder), needed["validation"], needed["train"])
        raise ArtefactError(
            f"the {split} split of {num_tokens} tokens is shorter than {what} of "
            f"model.context_length={context_length}; {way}, or choose a shorter model.context_length"
        )


def way_out(records: Sequence[PieceRecord], num_validation: int = 1, num_train: int = 1) -> str:
    """What would give the splits so many tokens, in words.

    Args:
        records: of all pieces of the corpus; none for token files of others.
    """
    documents = sorted(document for record in records for document in record.first_documents)
    num_documents = sum(counts.documents for record in records for counts in record.splits.values())
    if not records:
        return "give longer token files"
    if not num_documents:
        return "no document of the corpus can be used: give others"
    if num_documents == 1:
        return (
            "the corpus is a single document, and a document lies in one split as a whole: give several, one a JSON "
            "line, Parquet row or text file"
        )
    if len({position for position, _ in documents}) == 1 and len(documents) == num_documents:
        return (
            f"the {num_documents} documents of the corpus have the same text, and equal texts lie in the same split: "
            "give different ones"
        )
    num_tokens = sum(record.num_tokens for record in records)
    fraction = suggest_fraction(documents, num_documents, num_tokens, num_validation, num_train)
    if fraction is None:
        return f"no data.validation_fraction divides these {num_documents} documents well enough: give more text"
    return f"set data.validation_fraction={fraction}, which holds out enough of the {num_documents} documents"


def suggest_fraction(
    documents: Sequence[tuple[float, int]], num_documents: int, num_tokens: int, num_validation: int, num_train: int
) -> float | None:
    """The shortest decimal below 0.5 which, as data.validation_fraction, gives both splits the tokens they need.

    Args:
        documents: (position, tokens) of the first documents by position.
        num_documents: of the whole corpus.
        num_tokens: of the whole corpus.
    Returns:
        None: there is no such fraction.
    """
    held_out = 0
    for index, (position, size) in enumerate(documents):
        held_out += size
        if num_tokens - held_out < num_train:
            return None
        is_last = index + 1 == len(documents)
        if is_last and len(documents) < num_documents:
            return None  # where the next document stands is not known
        limit = min(0.5, 1.0 if is_last else documents[index + 1][0])
        if held_out >= math.ceil(num_validation * MARGIN):
            for num_digits in range(1, 16):
                fraction = (math.floor(position * 10**num_digits) + 1) / 10**num_digits
                if position < fraction <= limit and fraction < 0.5:
                    return fraction
    return None
