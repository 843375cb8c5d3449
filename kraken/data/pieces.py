"""Pieces become shards, each on its own: whoever does it, wherever and in whichever order, the bytes are the same."""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import dacite
import numpy as np

from kraken.config import DataConfig
from kraken.data.corpus import SPLITS, Corpus, Piece, Split, position_of, split_of
from kraken.data.shards import ShardWriter, shard_name, token_dtype
from kraken.manifest import ArtefactError, write_atomically
from kraken.tokenizer import META_NAME, RANKS_NAME, EncodingError, Tokenizer

RECORDS_FOLDER = "pieces"
KEPT_REASONS = 5
"""Documents left out that a piece's record names; the others it counts."""

FIRST_DOCUMENTS = 64
"""Documents whose positions a piece's record holds."""

MAX_SAMPLED_PIECES = 64
"""Pieces that a tokenizer's training text is taken from; each may be a download."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What one split got from a piece."""

    documents: int = 0
    num_bytes: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceRecord:
    """What came of a piece. Written last: with it the piece is finished, without it nothing of it counts."""

    index: int
    digest: str
    """Hash of the piece and the tokenizer."""
    splits: dict[Split, SplitCounts]
    num_skipped: int
    """Documents left out."""
    skipped: tuple[str, ...]
    """The first of them, with the reasons."""
    first_documents: tuple[tuple[float, int], ...]
    """(position, tokens) of the first documents by position, see `position_of`: what a larger validation fraction would
    hold out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(counts.num_tokens for counts in self.splits.values())

    def paths(self, folder: Path) -> list[Path]:
        """The piece's files, the record last."""
        shards = [folder / shard_name(split, self.index) for split in SPLITS if self.splits[split].num_tokens]
        return [*shards, record_path(folder, self.index)]


def record_path(folder: Path, index: int) -> Path:
    """Where a piece's record lies."""
    return folder / RECORDS_FOLDER / f"{index:06d}.json"


def digest_of(piece: Piece, tokenizer: Tokenizer) -> str:
    """Hash of what decides a piece's bytes, beyond the settings that already name the artefact's folder."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(piece), tokenizer.fingerprint]).encode()).hexdigest()


class BadDocuments:
    """What becomes of documents that cannot be used: the end of the work, or a count."""

    def __init__(self, config: DataConfig):
        self.stops = config.on_bad_document == "stop"
        self.num_skipped = 0
        self.reasons: list[str] = []

    def __call__(self, message: str) -> None:
        """Take note of one.

        Raises:
            ArtefactError: the setting says to stop.
        """
        if self.stops:
            raise ArtefactError(f"{message}; mend it, or leave such documents out with data.on_bad_document=skip")
        self.num_skipped += 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(message)


def tokenize_piece(config: DataConfig, corpus: Corpus, piece: Piece, tokenizer: Tokenizer, folder: Path) -> PieceRecord:
    """Encode a piece's documents into its shards, then write its record; memory does not grow with the piece.

    Raises:
        ArtefactError: a document cannot be used and the settings say to stop, or the source is damaged.
    """
    bad = BadDocuments(config)
    documents = dict.fromkeys(SPLITS, 0)
    num_bytes = dict.fromkeys(SPLITS, 0)
    last_first: list[tuple[float, int]] = []  # a heap of the first documents, with negative positions
    end_of_text = np.array([tokenizer.eot_id], dtype=np.uint32)
    with ExitStack() as stack:
        writers = {split: ShardWriter(folder, split, piece.index, tokenizer.num_ids) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.discard)
        for document in corpus.read(piece, bad):
            try:
                content = document.text.encode()
                ids = tokenizer.encode_array(document.text)
            except UnicodeEncodeError as error:
                bad(f"{document.name}: not UTF-8 (half of a surrogate pair at its character {error.start})")
                continue
            except EncodingError as error:
                bad(f"{document.name}: {error}")
                continue
            split = split_of(content, config.validation_fraction)
            writers[split].write(ids)
            if document.ends:
                writers[split].write(end_of_text)
            documents[split] += 1
            num_bytes[split] += len(content)
            heapq.heappush(last_first, (-position_of(content), len(ids) + document.ends))
            if len(last_first) > FIRST_DOCUMENTS:
                heapq.heappop(last_first)
        for writer in writers.values():
            writer.finish()
    record = PieceRecord(
        index=piece.index,
        digest=digest_of(piece, tokenizer),
        splits={s: SplitCounts(documents[s], num_bytes[s], writers[s].num_tokens) for s in SPLITS},
        num_skipped=bad.num_skipped,
        skipped=tuple(bad.reasons),
        first_documents=tuple(sorted((-position, size) for position, size in last_first)),
    )
    write_atomically(record_path(folder, piece.index), json.dumps(dataclasses.asdict(record)))
    return record


def finished_record(folder: Path, piece: Piece, tokenizer: Tokenizer) -> PieceRecord | None:
    """The record of a piece that an earlier attempt finished by the same rules and whose files are whole."""
    record = read_record(record_path(folder, piece.index))
    if record is None or record.digest != digest_of(piece, tokenizer):
        return None
    itemsize = token_dtype(tokenizer.num_ids).itemsize
    for split, counts in record.splits.items():
        path = folder / shard_name(split, piece.index)
        if counts.num_tokens and (not path.is_file() or path.stat().st_size != counts.num_tokens * itemsize):
            return None
    return record


def read_record(path: Path) -> PieceRecord | None:
    """A piece's record; None where there is none, or a damaged one."""
    try:
        values = json.loads(path.read_text())
        return dacite.from_dict(PieceRecord, values, config=dacite.Config(strict=True, cast=[tuple]))
    except (OSError, ValueError, KeyError, TypeError, dacite.DaciteError):
        return None


def read_records(folder: Path) -> list[PieceRecord]:
    """The records of a prepared artefact's pieces."""
    paths = sorted((folder / RECORDS_FOLDER).glob("*.json"))
    return [record for path in paths if (record := read_record(path)) is not None]


def finished_records(folder: Path, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[int, PieceRecord]:
    """Piece -> record of what earlier attempts finished; everything else but the tokenizer is removed."""
    records = {p.index: record for p in pieces if (record := finished_record(folder, p, tokenizer))}
    kept = {folder / META_NAME, folder / RANKS_NAME}.union(*(record.paths(folder) for record in records.values()))
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    return records


def training_texts(config: DataConfig, corpus: Corpus, pieces: Sequence[Piece]) -> Iterator[str]:
    """The text that a tokenizer learns from: the training split, or evenly spread parts of it if it is larger.

    It depends on the corpus and the settings alone, not on how often or where it is read.
    """
    left = share = config.tokenizer_training_bytes
    sizes = [piece.num_bytes for piece in pieces]
    if not (all(sizes) and sum(sizes) <= left):
        num_pieces = min(len(pieces), MAX_SAMPLED_PIECES)
        pieces = [pieces[index * len(pieces) // num_pieces] for index in range(num_pieces)]
        share = left // num_pieces
    bad = BadDocuments(config)
    for piece in pieces:
        end = max(left - share, 0)
        for document in corpus.read(piece, bad):
            try:
                content = document.text.encode()
            except UnicodeEncodeError:
                continue  # no document: refused or left out when the pieces are tokenised
            if split_of(content, config.validation_fraction) == "train":
                text = content[: left - end]
                left -= len(text)
                yield text.decode(errors="ignore")  # a character may be cut at the end
                if left <= end:
                    break
