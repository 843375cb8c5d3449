"""The embedded corpus: real text on every machine, with nothing shipped."""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from kraken.data.corpus import Document, OnBad, Part, Piece, group
from kraken.manifest import ArtefactError

# Not the library's own text: tests, what it vendors, what others installed, and a folder of demos.
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled", "__pycache__"}
)


class EmbeddedCorpus:
    """The Python standard library of the running interpreter; it is small, and in memory whole."""

    name = "embedded"
    unit = "B"

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

    def pieces(self, bytes_per_piece: int) -> tuple[Piece, ...]:
        """Neighbouring documents together."""
        parts = (
            Part(
                self.name,
                index,
                index + 1,
                len(document.text.encode()),
                source=str(self.root),
                version=self.fingerprint,
            )
            for index, document in enumerate(self.documents)
        )
        return group(parts, bytes_per_piece)

    def read(self, piece: Piece, on_bad: OnBad) -> Iterator[Document]:
        """The documents of a piece.

        Raises:
            ArtefactError: this machine's standard library is not the one that was cut into pieces.
        """
        for part in piece.parts:
            if part.version != self.fingerprint:
                raise ArtefactError(
                    f"the standard library in {self.root} differs from that of the machine which planned the work; use "
                    "the same Python on every node, or data.corpus=files"
                )
            yield from self.documents[part.start : part.end]
