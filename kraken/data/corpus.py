"""What a corpus is: documents, the pieces of work that it is cut into, and which of its documents are held out.

A *piece* is what one task tokenises: a stretch of files, Parquet row groups or a Hugging Face shard. The pieces of a
corpus follow from its layout alone, without reading it and whatever the number of workers.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

MAX_DOCUMENT_BYTES = 2**26
"""A longer document is refused: a document is in memory whole while it is encoded."""

OnBad = Callable[[str], None]
"""Told of a document that cannot be used, and why. Raises where such a document ends the work."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that is stable across machines."""

    name: str
    text: str
    ends: bool = True
    """Whether end-of-text follows; not after a section of a long text, unless it is the last."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one source."""

    name: str
    """Stable name of the source, which its documents' names begin with."""
    start: int
    """First byte, row group, shard or document; documents that begin from here on belong to the part."""
    end: int
    """The first that does not belong to it."""
    num_bytes: int
    """Size in bytes as far as it is known without reading; 0: unknown."""
    source: str = ""
    """Where it is read: a path inside the file system of `origin`."""
    origin: int = 0
    """Index into `data.paths`."""
    version: str = ""
    """What the source was when the piece was cut; it is compared when the piece is read."""
    section_bytes: int = 0
    """About how many bytes of a text file make a section; 0: the file is one document."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one task tokenises, in the corpus's order."""

    index: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Size as far as it is known; 0: unknown."""
        return sum(part.num_bytes for part in self.parts)


class Corpus(Protocol):
    """A source of documents. Making one reads nothing, so that every worker can."""

    name: str
    unit: str
    """What progress counts: `B` where the pieces' sizes are known."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the documents, without reading them all.

        Raises:
            ConfigError, ArtefactError: there is no such source, or it cannot be reached.
        """
        ...

    def pieces(self, bytes_per_piece: int) -> tuple[Piece, ...]:
        """All pieces, none of them empty as far as sizes are known."""
        ...

    def read(self, piece: Piece, on_bad: OnBad) -> Iterator[Document]:
        """The documents of a piece in order, one in memory at a time.

        Raises:
            ArtefactError: the source is not what it was when the piece was cut, or is damaged.
        """
        ...


def group(parts: Iterable[Part], bytes_per_piece: int) -> tuple[Piece, ...]:
    """Put parts together, in order, into pieces of about `bytes_per_piece`; neighbours in a source become one part."""
    pieces: list[Piece] = []
    current: list[Part] = []
    num_bytes = 0
    for part in parts:
        if current and num_bytes + part.num_bytes > bytes_per_piece:
            pieces.append(Piece(len(pieces), tuple(current)))
            current, num_bytes = [], 0
        num_bytes += part.num_bytes
        if current and (last := current[-1]).source == part.source and last.end == part.start:
            current[-1] = replace(last, end=part.end, num_bytes=last.num_bytes + part.num_bytes)
        else:
            current.append(part)
    if current:
        pieces.append(Piece(len(pieces), tuple(current)))
    return tuple(pieces)


def position_of(content: bytes) -> float:
    """Where in 0..1 a document stands among all documents: a hash of its text as UTF-8.

    Documents of equal text have one position, so that a text never lies in both splits.
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") / 2**64


def split_of(content: bytes, validation_fraction: float) -> Split:
    """Which split a document of this text, as UTF-8, belongs to; it never moves as a corpus grows or is renamed."""
    return "validation" if position_of(content) < validation_fraction else "train"
