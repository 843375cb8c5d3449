"""The identity of a storage: a random id that lies in the storage itself.

A path or URI is not enough. Two machines have a folder of the same path each, and one shared folder is mounted under
several paths. A local storage holds its id in one file; a remote one in the name of an object, since object stores
cannot create a file only where there is none.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import pyarrow.fs

from kraken.manifest import ArtefactError
from kraken.storage import is_remote

ID_NAME = "storage_id"
"""File of a local storage, folder of a remote one."""
SETTLE_S = 2.0
"""Object stores date objects in whole seconds. An id that is older than this cannot be preceded by another any more."""
READ_LIMIT_S = 2.0
"""How long a file without content may still be in the making."""


def storage_id(uri: str) -> str:
    """The id of a storage, which is created if there is none: 32 hexadecimal digits.

    Processes that ask for the first time at once get the same answer.

    Args:
        uri: absolute local path, or a URI such as `s3://bucket/prefix`.

    Raises:
        ArtefactError: the storage cannot be written, or its id is damaged.
    """
    found = _read_or_create(uri, create=True)
    assert found is not None
    return found


def find_storage_id(uri: str) -> str | None:
    """The id of a storage; None where it has none yet. Raises as `storage_id` does."""
    return _read_or_create(uri, create=False)


def _read_or_create(uri: str, *, create: bool) -> str | None:
    try:
        if not is_remote(uri):
            return _local_id(Path(uri), create)
        file_system, base = pyarrow.fs.FileSystem.from_uri(uri)
        if isinstance(file_system, pyarrow.fs.LocalFileSystem):
            return _local_id(Path(base), create)
        return _remote_id(file_system, base, create)
    except (OSError, ImportError) as error:
        raise ArtefactError(
            f"storage={uri} cannot hold its id, {ID_NAME} ({error}); make it writable, or choose another --storage"
        ) from error


# Local


def _local_id(root: Path, create: bool) -> str | None:
    path = root / ID_NAME
    if not path.exists():
        if not create:
            return None
        root.mkdir(parents=True, exist_ok=True)
        _create(path, _record(uuid.uuid4().hex, root))
    found, recorded_root = _read(path)
    if _is_copy(path, found, recorded_root):
        # Follows from the place, so that several processes that notice the copy at once agree.
        found = hashlib.sha256(f"{found} {root}".encode()).hexdigest()[:32]
        if create:
            partial = _written_beside(path, _record(found, root))
            partial.replace(path)
    return found


def _record(storage: str, root: Path) -> str:
    return json.dumps({"id": storage, "path": str(root)}) + "\n"


def _read(path: Path) -> tuple[str, Path]:
    """Id, and the path of the storage when the id was made."""
    deadline = time.monotonic() + READ_LIMIT_S
    while not (text := path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        values = json.loads(text)
        return str(values["id"]), Path(values["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}); restore it, or delete it: the storage then counts as a new one in MLflow"
        ) from error


def _create(path: Path, text: str) -> None:
    """Write a file where there is none; one that another process has made stays."""
    partial = _written_beside(path, text)
    try:
        try:
            os.link(partial, path)  # unlike a rename it fails where the file exists
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(text)
    finally:
        partial.unlink(missing_ok=True)


def _written_beside(path: Path, text: str) -> Path:
    """A new file in the same folder that no other process or thread writes."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return partial


def _is_copy(path: Path, found: str, recorded_root: Path) -> bool:
    """Whether the storage that this id was made for is still elsewhere: somebody copied the whole folder."""
    original = recorded_root / ID_NAME
    try:
        return not os.path.samefile(original, path) and _read(original)[0] == found
    except (OSError, ArtefactError):
        return False


# Remote


def _remote_id(file_system: pyarrow.fs.FileSystem, base: str, create: bool) -> str | None:
    folder = f"{base.rstrip('/')}/{ID_NAME}"
    oldest = _oldest(file_system, folder)
    if oldest is not None:
        found, created_at = oldest
        if abs(time.time() - created_at) > SETTLE_S:
            return found
    own = None
    if oldest is None:
        if not create:
            return None
        own = uuid.uuid4().hex
        file_system.create_dir(folder, recursive=True)
        with file_system.open_output_stream(f"{folder}/{own}") as stream:
            stream.write(own.encode())
    time.sleep(SETTLE_S)  # another process may have written one in the same second
    settled = _oldest(file_system, folder)
    if settled is None:
        raise OSError(f"{folder} is empty after an id was written to it")
    if own is not None and settled[0] != own:
        file_system.delete_file(f"{folder}/{own}")
    return settled[0]


def _oldest(file_system: pyarrow.fs.FileSystem, folder: str) -> tuple[str, float] | None:
    """Id and creation time, in seconds, of the oldest object; of equally old ones, the first by name."""
    infos = file_system.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
    if not files:
        return None
    first = min(files, key=lambda info: (info.mtime_ns // 10**9, info.base_name))
    return first.base_name, first.mtime_ns / 1e9
