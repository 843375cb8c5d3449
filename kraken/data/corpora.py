"""Corpora: where documents come from, and which of them are held out."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from kraken.config import DataConfig
from kraken.manifest import ArtefactError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

# Not the library's own text: tests, what it vendors, what others installed, and a folder of demos.
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that is stable across machines."""

    name: str
    text: str


class EmbeddedCorpus:
    """The Python standard library of the running interpreter: real text on every machine, with nothing shipped."""

    name = "embedded"

    def __init__(self, root: Path | None = None):
        self.root = root or Path(sysconfig.get_paths()["stdlib"])

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """Every document, in the order of their names.

        Raises:
            ArtefactError: the interpreter came without its library's source files.
        """
        documents = []
        for path in sorted(self.root.rglob("*.py")):
            relative = path.relative_to(self.root)
            if LEFT_OUT_FOLDERS.isdisjoint(relative.parts):
                try:
                    text = path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue  # a handful of files declare another encoding
                if text:
                    documents.append(Document(relative.as_posix(), text))
        if not documents:
            raise ArtefactError(
                f"data.corpus=embedded found no .py files under {self.root}; use a Python with its library's source"
            )
        return tuple(documents)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name.encode(), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def open_corpus(config: DataConfig) -> EmbeddedCorpus:
    """The corpus that a data config names."""
    return EmbeddedCorpus()


def split_of(document_name: str, validation_fraction: float) -> Split:
    """Which split a document belongs to: decided by a hash of its name, so that it never moves as a corpus grows."""
    position = int.from_bytes(hashlib.sha256(document_name.encode()).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


def documents_of(corpus: EmbeddedCorpus, split: Split, validation_fraction: float) -> Iterator[Document]:
    """The documents of one split, in the corpus's order."""
    return (doc for doc in corpus.documents if split_of(doc.name, validation_fraction) == split)
