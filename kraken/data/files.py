"""Files as a corpus: JSONL, Parquet and text, local or in any store that `pyarrow.fs` opens, read as streams.

Large files are cut at byte positions that need no reading. What begins at or after a cut, the first line or section
there, belongs to the stretch after it, so that neighbouring stretches meet without a gap wherever they are cut.
"""

import hashlib
import io
import json
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from kraken.config import ConfigError
from kraken.data.corpus import MAX_DOCUMENT_BYTES, Document, OnBad, Part, Piece, group
from kraken.manifest import ArtefactError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
"""What of a folder is text; a file or glob that is named itself may have any suffix."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PACKED_SUFFIXES = (*COMPRESSIONS, ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")

WHOLE_TEXT_BYTES = 2**18
"""A longer text file is cut into sections, so that it need not fit in memory and a single file yields both splits."""
SECTION_BYTES = 2**13
"""Distance of the positions from which a section's beginning, the next line, is looked for."""
LONE_SECTION_BYTES = 2**10
"""The least such distance in a text file that is the whole corpus, which is always cut into sections."""
LONE_SECTIONS = 2**8
"""Sections that such a file should have at least: enough for a validation split."""

READ_BYTES = 2**20
"""Read at once from a file; a store answers each read with a request."""
PARQUET_ROWS = 32
"""Rows decoded at once."""

Format = Literal["jsonl", "parquet", "text"]
Identity = tuple[str | int, ...]


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
    identity: Identity
    """Equal for two names of one file: links, hard links, and paths that spell a folder differently."""

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
        """Every file, sorted within each of the paths; a file with several names or links counts once.

        Raises:
            ConfigError: a path that matches nothing, or only what cannot be read.
        """
        found: dict[Identity, File] = {}
        for origin, path in enumerate(self.paths):
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
                found.setdefault(file.identity, file)
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
        file_format = format_of(file.name)
        section_bytes = 0
        if file_format == "text":
            section_bytes = section_bytes_of(file.num_bytes, is_lone=len(self.files) == 1)

        def part(start: int, end: int, num_bytes: int) -> Part:
            return Part(
                file.name,
                start,
                end,
                num_bytes,
                source=file.path,
                origin=file.origin,
                version=file.version,
                section_bytes=section_bytes,
            )

        if file_format == "parquet":
            for index, num_bytes in enumerate(self._row_groups(file)):
                yield part(index, index + 1, num_bytes)
        elif compression_of(file.name) or (file_format == "text" and not section_bytes):
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
        return open_file_system(self.paths[origin])[0].open_input_file(path)

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
            file_system = open_file_system(self.paths[part.origin])[0]
            with buffered(file_system.open_input_stream(part.source, compression=compression)) as stream:
                yield from read_jsonl(stream, part.name, 0, None, self.text_field, on_bad)
        elif file_format == "jsonl":
            with self._open_at(part) as stream:
                yield from read_jsonl(stream, part.name, part.start, part.end, self.text_field, on_bad)
        else:
            with self._open_at(part) as stream:
                if part.section_bytes:
                    sections = cut_sections(stream, part.start, part.end, part.section_bytes)
                else:
                    sections = iter([(0, stream.read(), True)])
                yield from read_text(sections, part.name, on_bad)

    def _open_at(self, part: Part) -> io.BufferedReader:
        """The file at the byte before the part, which tells whether a line begins at the part's first."""
        opened = self._open(part.source, part.origin)
        opened.seek(max(part.start - 1, 0))
        return buffered(opened)

    def _require_unchanged(self, part: Part) -> None:
        info = open_file_system(self.paths[part.origin])[0].get_file_info(part.source)
        version = f"{info.size}-{info.mtime_ns or 0}"
        if version != part.version:
            raise ArtefactError(
                f"{part.source} has changed since the work on it began ({part.version} is now {version}, size and "
                "time); run the same command again when nobody writes there"
            )


class readable:
    """Turn errors of file systems, decompression and Arrow into one that names the file.

    Damaged files also make Arrow raise errors of Python: ValueError (as UnicodeDecodeError), KeyError, OverflowError.
    """

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        library_errors = (OSError, pa.ArrowException, EOFError, ValueError, LookupError, ArithmeticError)
        if isinstance(error, library_errors) and not isinstance(error, ConfigError):
            reason = (str(error) or "its end is missing").splitlines()[0]
            raise ArtefactError(
                f"{self.path} cannot be read ({reason}); mend the file, or leave it out of data.paths"
            ) from error


# Finding files


def open_path(path: str) -> tuple[pyarrow.fs.FileSystem, str, str]:
    """The file system of one of `data.paths`, a path in it, and the glob below that; empty for a plain path.

    A file or folder that exists under a name with wildcards is taken literally: `/data/corpus [v2]/*.txt`.

    Raises:
        ConfigError: no file system opens such a URI.
        ArtefactError: the file system cannot be asked.
    """
    file_system, root = open_file_system(path)
    components = [component for component in split_glob(path)[1].split("/") if component]
    with readable(path):
        while components:
            literal = f"{root.rstrip('/')}/{components[0]}"
            if file_system.get_file_info(literal).type == pyarrow.fs.FileType.NotFound:
                break
            root = literal
            del components[0]
    return file_system, root, "/".join(components)


@cache
def open_file_system(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of one of `data.paths`, and the path in it up to the first component with a wildcard.

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
    """The files that one of `data.paths` means, sorted by name; hidden ones only if named themselves.

    Of a local file with several names, links among them, the first name that is no link is listed.

    Raises:
        ConfigError: a link to nothing, or a name that is not UTF-8.
    """
    file_system, root, glob = open_path(path)
    is_local = isinstance(file_system, pyarrow.fs.LocalFileSystem)
    with readable(path):
        info = file_system.get_file_info(root)
        if info.type == pyarrow.fs.FileType.File and not glob:
            identity = identity_of(os.stat(root), root) if is_local else (file_system.type_name, info.path)
            return [File(info.base_name, info.path, origin, info.size, info.mtime_ns or 0, identity)]
        entries = walk(root, every_path=bool(glob)) if is_local else walk_store(file_system, root)
    pattern = glob_pattern(glob) if glob else None
    files: dict[Identity, File] = {}
    for entry in sorted(entries, key=lambda entry: (entry.is_linked, entry.name)):
        if any(component.startswith((".", "_")) for component in entry.name.split("/")):
            continue
        if not (pattern.fullmatch(entry.name) if pattern else is_known(entry.name)):
            continue
        if not entry.identity:
            raise ConfigError(
                f"data.paths={path} matches {entry.path}, a link to {os.readlink(entry.path)}, which does not exist; "
                "restore that file or remove the link"
            )
        try:
            entry.path.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"data.paths={path} matches {os.fsencode(entry.path)!r}, whose name is not UTF-8; rename it"
            ) from None
        file = File(entry.name, entry.path, origin, entry.num_bytes, entry.mtime_ns, entry.identity)
        files.setdefault(file.identity, file)
    return sorted(files.values(), key=lambda file: file.name)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was found below a folder."""

    name: str
    """Path relative to the folder."""
    path: str
    num_bytes: int
    mtime_ns: int
    identity: Identity
    """As a File's; empty: a link to nothing."""
    is_linked: bool = False
    """Whether the file or a folder on the way to it is a link."""


def walk_store(file_system: pyarrow.fs.FileSystem, root: str) -> list[Entry]:
    """All files below a folder of a store, which has no links."""
    selector = pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
    skipped = len(root.rstrip("/")) + 1
    return [
        Entry(info.path[skipped:], info.path, info.size, info.mtime_ns or 0, (file_system.type_name, info.path))
        for info in file_system.get_file_info(selector)
        if info.type == pyarrow.fs.FileType.File
    ]


def walk(root: str, every_path: bool) -> list[Entry]:
    """All files below a local folder that are not hidden. Links are followed, but never to a folder around them.

    Args:
        every_path: give a file under every path that leads to it, among which a glob chooses. Otherwise each folder is
            read once, however many links lead to it.
    """
    if not os.path.isdir(root):
        return []
    found: list[Entry] = []
    read: set[Identity] = set()
    # (path, name, its identity, those of the folders around it)
    Folder = tuple[str, str, Identity, frozenset[Identity]]
    folders: deque[Folder] = deque([(root, "", identity_of(os.stat(root), root), frozenset())])
    linked_folders: deque[Folder] = deque()  # read after all others, so that those keep their own names
    while folders or linked_folders:
        is_linked = not folders
        path, name, folder, around = (folders or linked_folders).popleft()
        if folder in (around if every_path else read):
            continue
        read.add(folder)
        with os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            is_link = is_linked or entry.is_symlink()
            entry_name = f"{name}/{entry.name}" if name else entry.name
            try:
                status = entry.stat()
            except OSError:
                if not entry.is_symlink():
                    raise
                found.append(Entry(entry_name, entry.path, 0, 0, ()))
                continue
            identity = identity_of(status, entry.path)
            if stat.S_ISREG(status.st_mode):
                found.append(Entry(entry_name, entry.path, status.st_size, status.st_mtime_ns, identity, is_link))
            elif stat.S_ISDIR(status.st_mode):
                (linked_folders if is_link else folders).append((entry.path, entry_name, identity, around | {folder}))
    return found


def identity_of(status: os.stat_result, path: str) -> Identity:
    """What two names of one local file or folder have in common."""
    # some file systems give every file the same number 0
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(path),)


def compression_of(name: str) -> str | None:
    """Compression of a JSONL file, by its suffix."""
    compression = next((c for suffix, c in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)
    return compression if format_of(name) == "jsonl" else None


def format_of(name: str) -> Format:
    """How a file is read, by its suffix."""
    if name.lower().endswith(".parquet"):
        return "parquet"
    return "jsonl" if re.search(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", name.lower()) else "text"


def section_bytes_of(num_bytes: int, is_lone: bool) -> int:
    """Into sections of about which size a text file of `num_bytes` is cut; 0: it is one document."""
    if not is_lone:
        return SECTION_BYTES if num_bytes > WHOLE_TEXT_BYTES else 0
    section_bytes = SECTION_BYTES
    while section_bytes > LONE_SECTION_BYTES and section_bytes * LONE_SECTIONS > num_bytes:
        section_bytes //= 2
    return section_bytes


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
        has = f"its fields are {', '.join(record)[:200]}" if isinstance(record, dict) else "it is no object"
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


def cut_sections(
    stream: io.BufferedReader, start: int, end: int, section_bytes: int = SECTION_BYTES
) -> Iterator[tuple[int, bytes, bool]]:
    """The sections of a text file that begin in [start, end), each shorter than 2 * section_bytes.

    From every multiple of section_bytes on, a section begins at the first line that begins before the next multiple; in
    a line that is too long for that, at the first character.

    Args:
        stream: at byte start - 1, or at 0; `start` is a multiple of section_bytes.
    Returns:
        First byte, content, whether the file ends with it.
    """
    before = stream.read(1) if start > 0 else b"\n"
    cell, position = stream.read(section_bytes), start
    begun: tuple[int, bytes] | None = None
    while cell:
        following = stream.read(section_bytes)
        cut = first_cut(cell, before, section_bytes)
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


def first_cut(cell: bytes, before: bytes, section_bytes: int) -> int:
    """Where in these section_bytes (fewer at the file's end) a section begins; `before` is the byte before them."""
    if before == b"\n":
        return 0
    newline = cell.find(b"\n", 0, section_bytes - 1)
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
