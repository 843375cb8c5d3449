"""Files as a corpus: JSONL, Parquet and text, local or in any store that `pyarrow.fs` opens, read as streams.

Large files are cut at byte positions that need no reading. What begins at or after a cut, the first line or section
there, belongs to the stretch after it, so that neighbouring stretches meet without a gap wherever they are cut.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from kraken.config import ConfigError
from kraken.data.corpora import MAX_DOCUMENT_BYTES, Document, OnBad, Part, Piece, group
from kraken.manifest import ArtefactError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
"""What of a folder is text; a file or glob that is named itself may have any suffix."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PACKED_SUFFIXES = (*COMPRESSIONS, ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")

WHOLE_TEXT_BYTES = 2**18
"""A longer text file is cut into sections, so that it need not fit in memory and a single file yields both splits."""
SECTION_BYTES = 2**13
"""Distance of the positions from which a section's beginning, the next line, is looked for."""

READ_BYTES = 2**20
"""Read at once from a file; a store answers each read with a request."""
PARQUET_ROWS = 32
"""Rows decoded at once."""

Format = Literal["jsonl", "parquet", "text"]


@dataclass(frozen=True, slots=True)
class File:
    """One file of the corpus."""

    name: str
    """Path relative to the folder or the fixed part of the glob, and the file's own name otherwise."""
    path: str
    """Path inside its file system."""
    origin: int
    """Index of the setting that it comes from."""
    num_bytes: int
    mtime_ns: int

    @property
    def version(self) -> str:
        """Changes when the file does."""
        return f"{self.num_bytes}-{self.mtime_ns}"


class FilesCorpus:
    """The documents of files.

    Args:
        paths: files, globs or folders, each an absolute path or a URI.
        text_field: the field of a JSON object, or the column, that holds the text.
    """

    name = "files"
    unit = "B"

    def __init__(self, paths: tuple[str, ...], text_field: str = "text"):
        self.paths = paths
        self.text_field = text_field

    @cached_property
    def files(self) -> tuple[File, ...]:
        """Every file, sorted within each of the paths; a file that two of them name counts once.

        Raises:
            ConfigError: a path that matches nothing, or only what cannot be read.
        """
        found: dict[tuple[str, str], File] = {}
        for origin, path in enumerate(self.paths):
            file_system, _ = open_path(path)
            files = list_files(path, origin)
            if not files:
                raise ConfigError(
                    f"data.paths={path} matches no file to read; a folder is searched for JSONL, Parquet and "
                    f"{', '.join(TEXT_SUFFIXES)}; for other text give a glob such as /data/**/*.py"
                )
            for file in files:
                if format_of(file.name) == "text" and file.name.lower().endswith(PACKED_SUFFIXES):
                    raise ConfigError(
                        f"data.paths={path} matches {file.path}, which is packed; only JSONL is read packed, as "
                        f"{' and '.join(COMPRESSIONS)}; unpack it first"
                    )
                found.setdefault((file_system.type_name, file.path), file)
        return tuple(found.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times of change."""
        listing = [[file.name, file.num_bytes, file.mtime_ns] for file in self.files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def pieces(self, bytes_per_piece: int) -> tuple[Piece, ...]:
        """Stretches of large files, small files together. Of Parquet files the footers are read."""
        return group((part for file in self.files for part in self._parts(file, bytes_per_piece)), bytes_per_piece)

    def _parts(self, file: File, bytes_per_piece: int) -> Iterator[Part]:
        def part(start: int, end: int, num_bytes: int) -> Part:
            return Part(file.name, start, end, num_bytes, source=file.path, origin=file.origin, version=file.version)

        file_format = format_of(file.name)
        if file_format == "parquet":
            for index, num_bytes in enumerate(self._row_groups(file)):
                yield part(index, index + 1, num_bytes)
        elif compression_of(file.name) or (file_format == "text" and file.num_bytes <= WHOLE_TEXT_BYTES):
            if file.num_bytes:
                yield part(0, file.num_bytes, file.num_bytes)
        else:
            stride = -(-bytes_per_piece // SECTION_BYTES) * SECTION_BYTES
            for start in range(0, file.num_bytes, stride):
                end = min(start + stride, file.num_bytes)
                yield part(start, end, end - start)

    def _row_groups(self, file: File) -> list[int]:
        """Bytes of text of each row group, before compression."""
        with readable(file.path), self._open(file.path, file.origin) as opened:
            parquet = pq.ParquetFile(opened)
            names = parquet.schema_arrow.names
            if self.text_field not in names:
                raise ConfigError(f"{file.path} has no column {self.text_field!r}; choose data.text_field from {names}")
            columns = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)]
            if self.text_field not in columns:
                raise ConfigError(
                    f"column {self.text_field!r} of {file.path} is nested; choose data.text_field from the plain ones"
                )
            column = columns.index(self.text_field)
            groups = (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))
            return [max(1, row_group.column(column).total_uncompressed_size) for row_group in groups]

    def _open(self, path: str, origin: int) -> pa.NativeFile:
        return open_path(self.paths[origin])[0].open_input_file(path)

    def read(self, piece: Piece, on_bad: OnBad) -> Iterator[Document]:
        """The documents of a piece."""
        for part in piece.parts:
            folder = part.source.removesuffix(part.name)
            self._require_unchanged(part)
            with readable(part.source):
                yield from self._read_part(part, lambda message, folder=folder: on_bad(folder + message))  # type: ignore[misc]

    def _read_part(self, part: Part, on_bad: OnBad) -> Iterator[Document]:
        file_format = format_of(part.name)
        if file_format == "parquet":
            with self._open(part.source, part.origin) as opened:
                yield from read_parquet(opened, part, self.text_field, on_bad)
        elif compression := compression_of(part.name):
            file_system = open_path(self.paths[part.origin])[0]
            with buffered(file_system.open_input_stream(part.source, compression=compression)) as stream:
                yield from read_jsonl(stream, part.name, 0, None, self.text_field, on_bad)
        elif file_format == "jsonl":
            with self._open_at(part) as stream:
                yield from read_jsonl(stream, part.name, part.start, part.end, self.text_field, on_bad)
        else:
            with self._open_at(part) as stream:
                if int(part.version.split("-")[0]) <= WHOLE_TEXT_BYTES:
                    sections: Iterable[tuple[int, bytes, bool]] = [(0, stream.read(), True)]
                else:
                    sections = cut_sections(stream, part.start, part.end)
                yield from read_text(sections, part.name, on_bad)

    def _open_at(self, part: Part) -> io.BufferedReader:
        """The file at the byte before the part, which tells whether a line begins at the part's first."""
        opened = self._open(part.source, part.origin)
        opened.seek(max(part.start - 1, 0))
        return buffered(opened)

    def _require_unchanged(self, part: Part) -> None:
        info = open_path(self.paths[part.origin])[0].get_file_info(part.source)
        version = f"{info.size}-{info.mtime_ns or 0}"
        if version != part.version:
            raise ArtefactError(
                f"{part.source} has changed since the work on it began ({part.version} is now {version}, size and "
                "time); run the same command again when nobody writes there"
            )


class readable:
    """Turn a file system's errors into one that names the file."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, pa.ArrowException, EOFError)):
            reason = (str(error) or "its end is missing").splitlines()[0]
            raise ArtefactError(
                f"{self.path} cannot be read ({reason}); mend the file, or leave it out of data.paths"
            ) from error


# Finding files


@cache
def open_path(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of one of `data.paths`, and the path in it up to the first wildcard.

    Raises:
        ConfigError: no file system opens such a URI.
    """
    fixed = split_glob(path)[0]
    if "://" not in path:
        return pyarrow.fs.LocalFileSystem(), fixed
    try:
        file_system, root = pyarrow.fs.FileSystem.from_uri(fixed)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"data.paths={path} cannot be opened ({error}); give a path or a reachable URI") from error
    return file_system, root


def split_glob(path: str) -> tuple[str, str]:
    """The part of a path up to the first component with a wildcard, and the rest; the rest of a plain path is empty.

    In a URI a question mark begins the options of its file system, which stay with the first part.
    """
    scheme, separator, rest = path.rpartition("://")
    rest, mark, options = rest.partition("?") if separator else (rest, "", "")
    components = rest.split("/")
    fixed = next((i for i, component in enumerate(components) if set(component) & set("*?[")), len(components))
    return scheme + separator + ("/".join(components[:fixed]) or "/") + mark + options, "/".join(components[fixed:])


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `**/` any folders, `*` and `?` anything but `/`, `[...]` one of."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    return re.compile(
        "".join(tokens.get(part, part.replace("[!", "[^") if part[:1] == "[" else re.escape(part)) for part in parts)
    )


def list_files(path: str, origin: int) -> list[File]:
    """The files that one of `data.paths` means, sorted by name; hidden ones only if named themselves."""
    file_system, root = open_path(path)
    glob = split_glob(path)[1]
    with readable(path):
        info = file_system.get_file_info(root)
        if info.type == pyarrow.fs.FileType.File and not glob:
            return [File(info.base_name, info.path, origin, info.size, info.mtime_ns or 0)]
        selector = pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
        infos = file_system.get_file_info(selector)
    pattern = glob_pattern(glob) if glob else None
    files = []
    for info in infos:
        name = info.path[len(root.rstrip("/")) + 1 :]
        if info.type != pyarrow.fs.FileType.File or any(c.startswith((".", "_")) for c in name.split("/")):
            continue
        if pattern.fullmatch(name) if pattern else is_known(name):
            files.append(File(name, info.path, origin, info.size, info.mtime_ns or 0))
    return sorted(files, key=lambda file: file.name)


def compression_of(name: str) -> str | None:
    """Compression of a JSONL file, by its suffix."""
    compression = next((c for suffix, c in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)
    return compression if format_of(name) == "jsonl" else None


def format_of(name: str) -> Format:
    """How a file is read, by its suffix."""
    if name.lower().endswith(".parquet"):
        return "parquet"
    return "jsonl" if re.search(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", name.lower()) else "text"


def is_known(name: str) -> bool:
    """Whether a file is read when only its folder is named."""
    return format_of(name) != "text" or name.lower().endswith(TEXT_SUFFIXES)


# Reading them


def buffered(opened: pa.NativeFile) -> io.BufferedReader:
    """A stream with fast lines, which reads a block at a time."""
    return io.BufferedReader(opened, READ_BYTES)


def read_jsonl(
    stream: io.BufferedReader, name: str, start: int, end: int | None, text_field: str, on_bad: OnBad
) -> Iterator[Document]:
    """The documents of the lines that begin in [start, end); named after the byte at which they do.

    Args:
        stream: at byte start - 1, or at 0.
        end: None reads to the end.
    """
    offset = start
    if start > 0 and stream.read(1) != b"\n":
        offset += skip_line(stream)
    while end is None or offset < end:
        line = stream.readline(MAX_DOCUMENT_BYTES)
        if not line:
            return
        where = f"{name}, byte {offset}"
        if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            on_bad(f"{where}: the line is longer than {MAX_DOCUMENT_BYTES} bytes")
            offset += len(line) + skip_line(stream)
            continue
        if line.strip():
            text = text_of_line(line, where, text_field, on_bad)
            if text:
                yield Document(f"{name}:{offset}", text)
        offset += len(line)


def skip_line(stream: io.BufferedReader) -> int:
    """Read past the end of the current line; returns how many bytes that took."""
    num_bytes = 0
    while part := stream.readline(READ_BYTES):
        num_bytes += len(part)
        if part.endswith(b"\n"):
            break
    return num_bytes


def text_of_line(line: bytes, where: str, text_field: str, on_bad: OnBad) -> str | None:
    """The text of one JSON object; None when it has none that can be used."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        on_bad(f"{where}: not UTF-8 ({error.reason} at its byte {error.start})")
        return None
    except (ValueError, RecursionError) as error:
        on_bad(f"{where}: not a JSON object on one line ({error})")
        return None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
        on_bad(f"{where}: no text in field {text_field!r} (data.text_field); {has}")
        return None
    return text


def read_text(sections: Iterable[tuple[int, bytes, bool]], name: str, on_bad: OnBad) -> Iterator[Document]:
    """Documents of (first byte, content, whether the file ends with it)."""
    for start, content, is_last in sections:
        text = ""
        try:
            text = content.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            on_bad(f"{name}, byte {start + error.start}: not UTF-8 ({error.reason})")
        if text:
            yield Document(name if start == 0 and is_last else f"{name}:{start}", text, ends=is_last)


def cut_sections(stream: io.BufferedReader, start: int, end: int) -> Iterator[tuple[int, bytes, bool]]:
    """The sections of a text file that begin in [start, end), each shorter than 2 * SECTION_BYTES.

    From every multiple of SECTION_BYTES on, a section begins at the first line that begins before the next multiple; in
    a line that is too long for that, at the first character.

    Args:
        stream: at byte start - 1, or at 0; `start` is a multiple of SECTION_BYTES.
    Returns:
        First byte, content, whether the file ends with it.
    """
    before = stream.read(1) if start > 0 else b"\n"
    cell, position = stream.read(SECTION_BYTES), start
    begun: tuple[int, bytes] | None = None
    while cell:
        following = stream.read(SECTION_BYTES)
        cut = first_cut(cell, before)
        if begun is not None:
            content = begun[1] + cell[:cut]
            if content:
                yield begun[0], content, not following and cut == len(cell)
        if position >= end:
            return
        begun = (position + cut, cell[cut:])
        position += len(cell)
        before, cell = cell[-1:], following
    if begun is not None and begun[1]:
        yield begun[0], begun[1], True


def first_cut(cell: bytes, before: bytes) -> int:
    """Where in these SECTION_BYTES (fewer at the file's end) a section begins; `before` is the byte before them."""
    if before == b"\n":
        return 0
    newline = cell.find(b"\n", 0, SECTION_BYTES - 1)
    if newline >= 0:
        return newline + 1
    return next((i for i, byte in enumerate(cell[:4]) if byte & 0xC0 != 0x80), 0)


def read_parquet(opened: pa.NativeFile, part: Part, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """The documents of a part's row groups, named after their row in the file."""
    # Without the buffer the whole row group would be read ahead, whatever its size.
    parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=READ_BYTES)
    row = sum(parquet.metadata.row_group(index).num_rows for index in range(part.start))
    batches = parquet.iter_batches(
        PARQUET_ROWS, row_groups=range(part.start, part.end), columns=[text_field], use_threads=False
    )
    for batch in batches:
        yield from read_column(batch.column(0), part.name, row, text_field, on_bad)
        row += batch.num_rows


def read_column(column: Any, name: str, first_row: int, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """The documents of an Arrow column, named after their row."""
    for row, value in enumerate(column, first_row):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            on_bad(f"{name}, row {row}: not UTF-8 ({error.reason} at its byte {error.start})")
            continue
        if not isinstance(text, str):
            on_bad(f"{name}, row {row}: {'nothing' if text is None else value.type} in column {text_field!r}, not text")
        elif len(text) > MAX_DOCUMENT_BYTES:
            on_bad(f"{name}, row {row}: the text is longer than {MAX_DOCUMENT_BYTES} characters")
        elif text:
            yield Document(f"{name}:{row}", text)
