"""Storage: one folder per finished stage, under a local path or any URI that `pyarrow.fs` opens.

Stages read and write plain local folders. For a local storage these are the artefacts themselves; for a remote one they
are a cache, and `publish` and `fetch` copy whole artefacts, the manifest last.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import pyarrow.fs

from kraken.checkpoint.folders import is_checkpoint, reason
from kraken.environment import user_name
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest


def is_remote(uri: str) -> bool:
    """Whether a storage setting is a URI rather than a path of this machine."""
    return "://" in uri


def join(uri: str, *parts: str) -> str:
    """A path or URI below another; the query of a URI (`?endpoint_override=...`) stays at its end."""
    base, mark, query = uri.partition("?") if is_remote(uri) else (uri, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def local_artefact(location: str) -> Path:
    """The local folder of a finished artefact; a remote one is fetched into this machine's cache first.

    Args:
        location: a folder's path, returned as it is, or a URI as `Storage.location` makes it:
            `s3://bucket/prefix/convert/0123456789abcdef`.

    Raises:
        ArtefactError: the URI cannot be opened, is no artefact's, or holds no finished artefact.
    """
    if not is_remote(location):
        return Path(location)
    base, mark, query = location.partition("?")
    *above, kind, name = ["", "", *base.rstrip("/").rsplit("/", 2)]
    uri = above[-1]
    if not (kind and name and is_remote(uri)):
        raise ArtefactError(f"{location} is no artefact; give STORAGE/convert/FINGERPRINT, as the convert stage prints")
    storage = Storage(uri + mark + query)
    storage.fetch(kind, name)
    folder = storage.root / kind / name
    if not (folder / MANIFEST_NAME).is_file():
        raise ArtefactError(
            f"{location} holds no finished artefact ({MANIFEST_NAME} is missing); check the URI, or run the stage again"
        )
    return folder


class Storage:
    """The artefacts of a project.

    Args:
        uri: absolute local path, or a URI such as `s3://bucket/prefix`.
        cache: local folder for a remote storage's copies; the default lies in the machine's temporary folder.

    Raises:
        ArtefactError: the path is relative, or the URI's file system cannot be opened.
    """

    def __init__(self, uri: str, cache: Path | None = None):
        self.uri = uri
        self._remote: tuple[pyarrow.fs.FileSystem, str] | None = None
        self._same: dict[Path, tuple[int, int]] = {}  # files of the cache whose very version is in the remote storage
        if is_remote(uri):
            try:
                self._remote = pyarrow.fs.FileSystem.from_uri(uri)
            except (OSError, ValueError, ImportError) as error:
                raise ArtefactError(
                    f"storage={uri} cannot be opened ({error}); give a path or a reachable URI"
                ) from error
            digest = hashlib.sha256(uri.encode()).hexdigest()[:12]
            self.root = cache or Path(tempfile.gettempdir()) / f"kraken-{user_name()}" / digest
        elif not os.path.isabs(uri):
            raise ArtefactError(f"storage={uri} is relative, and workers run in other folders; give an absolute path")
        else:
            self.root = Path(uri)

    def folder(self, kind: str, fingerprint: str) -> Path:
        """Local folder of a stage's artefact; it exists afterwards, perhaps empty."""
        folder = self.root / kind / fingerprint[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"storage={self.uri} cannot be written ({error}); choose another --storage") from error
        return folder

    def location(self, kind: str, fingerprint: str) -> str:
        """Path or URI of a stage's artefact, the same on every node; `local_artefact` opens it."""
        return join(self.uri, kind, fingerprint[:16])

    def find(self, kind: str, fingerprint: str) -> Manifest | None:
        """The manifest of a finished stage, or None. A damaged artefact counts as none, so that it is made again.

        Raises:
            ArtefactError: the remote storage does not answer, so that nothing is known.
        """
        self.fetch(kind, fingerprint)
        try:
            manifest = Manifest.read(self.root / kind / fingerprint[:16])
        except ArtefactError:
            return None
        return manifest if manifest.fingerprint == fingerprint else None

    def publish(self, folder: Path) -> None:
        """Copy a finished local folder to a remote storage, its manifest last; nothing to do for a local one."""
        if self._remote is None:
            return
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        paths.sort(key=lambda path: path.name == MANIFEST_NAME)
        changed = [path for path in paths if self._same.get(path) != _version(path)]
        if changed:  # an earlier copy must not count as finished while its files are replaced
            self._delete_remote_file(folder / MANIFEST_NAME)
        self.publish_files(changed)

    def _delete_remote_file(self, path: Path) -> None:
        """Delete a remote file, given by where it lies in the cache; no-op where there is none."""
        if self._remote is None:
            return
        file_system, base = self._remote
        place = f"{base}/{path.relative_to(self.root).as_posix()}"
        if file_system.get_file_info(place).type == pyarrow.fs.FileType.File:
            file_system.delete_file(place)

    def publish_files(self, paths: Iterable[Path]) -> None:
        """Copy files of an unfinished artefact to a remote storage, in this order; nothing to do for a local one."""
        for path in paths:
            self.publish_as(path, path)
            if self._remote is not None:
                self._same[path] = _version(path)

    def publish_as(self, path: Path, target: Path) -> None:
        """Copy one file to where `target` of the cache has its place; nothing to do for a local storage."""
        if self._remote is None:
            return
        file_system, base = self._remote
        destination = f"{base}/{target.relative_to(self.root).as_posix()}"
        file_system.create_dir(destination.rsplit("/", 1)[0], recursive=True)
        pyarrow.fs.copy_files(
            str(path), destination, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=file_system
        )

    def move_remote(self, folder: Path, target: Path) -> None:
        """Give a remote folder another name, its manifest first; nothing to do for a local storage.

        A folder whose files the storage cannot move, as S3 cannot beyond 5 GB, is deleted with a warning.

        Args:
            folder, target: where both lie in the cache; what is at `target` already is deleted.
        """
        if self._remote is None:
            return
        file_system, base = self._remote
        self.delete_remote(target)
        for path in sorted(self.remote_files(folder), key=lambda path: path.name != MANIFEST_NAME):
            source, destination = (
                f"{base}/{place.relative_to(self.root).as_posix()}"
                for place in (path, target / path.relative_to(folder))
            )
            try:
                file_system.create_dir(destination.rsplit("/", 1)[0], recursive=True)
                file_system.move(source, destination)
            except OSError as error:
                warnings.warn(f"{source} cannot be moved to {destination} ({error}) and is deleted", stacklevel=2)
        self.delete_remote(folder)

    def delete_remote(self, folder: Path) -> None:
        """Delete a remote folder, its manifest first; nothing to do for a local storage, or one that is not there."""
        if self._remote is None:
            return
        file_system, base = self._remote
        files = self.remote_files(folder)
        for path in sorted(files, key=lambda path: path.name != MANIFEST_NAME):
            file_system.delete_file(f"{base}/{path.relative_to(self.root).as_posix()}")
        directory = f"{base}/{folder.relative_to(self.root).as_posix()}"
        if files or file_system.get_file_info(directory).type == pyarrow.fs.FileType.Directory:
            file_system.delete_dir(directory)

    def fetch_files(self, paths: Iterable[Path]) -> None:
        """Bring files of an unfinished remote artefact into the cache, those that another process here has published
        excepted; `publish` will not copy them again. Nothing to do for a local storage.
        """
        if self._remote is None:
            return
        file_system, base = self._remote
        for path in paths:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.{os.getpid()}")
                pyarrow.fs.copy_files(
                    f"{base}/{path.relative_to(self.root).as_posix()}",
                    str(partial),
                    source_filesystem=file_system,
                    destination_filesystem=pyarrow.fs.LocalFileSystem(),
                )
                partial.replace(path)
            self._same[path] = _version(path)

    def remote_files(self, folder: Path) -> list[Path]:
        """Where the files of a remote artefact, finished or not, lie in the cache; none for a local storage."""
        return list(self._remote_sizes(folder))

    def _remote_sizes(self, folder: Path) -> dict[Path, int]:
        """Where the files of a remote artefact lie in the cache -> their remote sizes in bytes."""
        if self._remote is None:
            return {}
        file_system, base = self._remote
        selector = pyarrow.fs.FileSelector(
            f"{base}/{folder.relative_to(self.root).as_posix()}", recursive=True, allow_not_found=True
        )
        infos = file_system.get_file_info(selector)
        return {
            self.root / info.path[len(base) + 1 :]: info.size for info in infos if info.type == pyarrow.fs.FileType.File
        }

    @property
    def _local_root(self) -> Path | None:
        """The storage's own folder on this machine, also that of a `file://` URI; None for an object store."""
        if self._remote is None:
            return self.root
        file_system, base = self._remote
        return Path(base) if isinstance(file_system, pyarrow.fs.LocalFileSystem) else None

    def measure(self, folder: Path) -> tuple[int, int, float]:
        """Bytes, number of files and newest modification (Unix seconds; 0 without files) of what lies below a folder.

        Wherever the storage is; links are not followed.

        Args:
            folder: where it lies, or would lie in the cache.
        """
        sizes, newest, root = [], 0.0, self._local_root
        if root is None:
            assert self._remote is not None
            file_system, base = self._remote
            selector = pyarrow.fs.FileSelector(
                f"{base}/{folder.relative_to(self.root).as_posix()}", recursive=True, allow_not_found=True
            )
            infos = [i for i in file_system.get_file_info(selector) if i.type == pyarrow.fs.FileType.File]
            return sum(i.size for i in infos), len(infos), max((i.mtime_ns / 1e9 for i in infos), default=0.0)
        for parent, folders, names in os.walk(root / folder.relative_to(self.root), followlinks=False):
            for name in [*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    status = os.lstat(os.path.join(parent, name))
                    sizes.append(status.st_size)
                    newest = max(newest, status.st_mtime)
        return sum(sizes), len(sizes), newest

    def is_behind_link(self, folder: Path) -> bool:
        """Whether a folder is a link, or lies behind one, so that it may be outside of the storage."""
        root = self._local_root
        if root is None:
            return False
        place = root / folder.relative_to(self.root)
        return any(path.is_symlink() for path in [place, *place.parents] if path.is_relative_to(root) and path != root)

    def delete(self, folder: Path) -> None:
        """Delete a folder of the storage, its manifest first, and its copy in the cache. Links below it are deleted,
        not followed.

        Raises:
            ArtefactError: it is a link, or lies behind one.
        """
        relative = folder.relative_to(self.root)
        assert relative.parts and ".." not in relative.parts, folder
        if self.is_behind_link(folder):
            raise ArtefactError(f"{folder} is a link or behind one, which is not followed; delete it yourself")
        root = self._local_root
        if root is None:
            self.delete_remote(folder)
        for place in {folder} if root is None else {root / relative, folder}:
            (place / MANIFEST_NAME).unlink(missing_ok=True)
            if place.is_dir():
                shutil.rmtree(place)

    def remote_folders(self, folder: Path) -> list[Path]:
        """Where the folders right below a remote one lie in the cache; none for a local storage."""
        if self._remote is None:
            return []
        file_system, base = self._remote
        selector = pyarrow.fs.FileSelector(f"{base}/{folder.relative_to(self.root).as_posix()}", allow_not_found=True)
        return [
            folder / i.base_name for i in file_system.get_file_info(selector) if i.type == pyarrow.fs.FileType.Directory
        ]

    def list_folders(self, folder: Path) -> list[Path]:
        """The folders right below one, wherever the storage is; a remote one's by where they lie in the cache."""
        if self._remote is not None:
            return sorted(self.remote_folders(folder))
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def read_text(self, path: Path) -> str | None:
        """A small file's text, wherever the storage is; None where there is no such file. Leaves the cache alone."""
        try:
            if self._remote is None:
                return path.read_text(errors="replace")
            file_system, base = self._remote
            with file_system.open_input_file(f"{base}/{path.relative_to(self.root).as_posix()}") as file:
                return bytes(file.read()).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_manifest(self, folder: Path) -> Manifest:
        """The manifest of a folder, wherever the storage is, whose files are there with the recorded sizes.

        Raises:
            ArtefactError: as `Manifest.read`.
        """
        if self._remote is None:
            return Manifest.read(folder)
        text = self.read_text(folder / MANIFEST_NAME)
        if text is None:
            raise ArtefactError(f"{folder.name} in storage={self.uri} holds no {MANIFEST_NAME}")
        manifest = Manifest.parse(text, folder / MANIFEST_NAME)
        sizes = self._remote_sizes(folder)
        for record in manifest.files:
            num_bytes = sizes.get(folder / record.path)
            if num_bytes != record.num_bytes:
                raise ArtefactError(
                    f"{folder.name}/{record.path} in storage={self.uri} has {num_bytes or 0} bytes, its manifest says "
                    f"{record.num_bytes}"
                )
        return manifest

    def prune(self, folder: Path) -> None:
        """Delete a remote artefact's files that are no longer in the cache; nothing to do for a local storage."""
        for path in self.remote_files(folder):
            if not path.is_file() and self._remote is not None:
                file_system, base = self._remote
                file_system.delete_file(f"{base}/{path.relative_to(self.root).as_posix()}")

    def fetch(self, kind: str, fingerprint: str) -> None:
        """Bring a remote artefact into the cache unless a whole copy is there; nothing to do for a local storage.

        Of the processes of one machine that want it, one downloads. A copy that lost files, as a temporary folder
        does, is fetched again.

        Raises:
            ArtefactError: the remote storage does not answer, or the cache cannot be written.
        """
        folder = self.root / kind / fingerprint[:16]
        if self._remote is None or _is_whole(folder):
            return
        file_system, base = self._remote
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (folder.parent / f".{folder.name}.fetching").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, however the process ends
                if not _is_whole(folder):
                    for leftover in folder.parent.glob(f"{folder.name}.partial*"):  # of a process that was killed
                        shutil.rmtree(leftover, ignore_errors=True)
                    self._download(file_system, f"{base}/{kind}/{fingerprint[:16]}", folder)
        except OSError as error:
            raise ArtefactError(
                f"storage={self.uri}: {kind}/{fingerprint[:16]} cannot be fetched into {folder} ({error}); check that "
                "this node reaches the storage and has disk space"
            ) from error

    def fetch_checkpoints(self, run_folder: Path, thorough: bool = True) -> None:
        """Bring the newest good checkpoint of a remote, unfinished run into the cache.

        Of the processes of one machine that want it, one downloads. A copy in the cache that is damaged is downloaded
        again; one that is damaged in the storage stays in the cache, where training passes it over and sets it aside.

        Args:
            thorough: compare the hashes of a copy that is in the cache already, not only its sizes; one process of a
                machine is enough.
        """
        if self._remote is None:
            return
        file_system, base = self._remote
        source = f"{base}/{run_folder.relative_to(self.root).as_posix()}"
        names = sorted(path.name for path in self.remote_folders(run_folder) if is_checkpoint(path))
        run_folder.mkdir(parents=True, exist_ok=True)
        with (run_folder / ".fetching").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, however the process ends
            for name in reversed(names):
                folder = run_folder / name
                if (folder / MANIFEST_NAME).is_file():
                    if _is_whole(folder, thorough):
                        return
                    shutil.rmtree(folder)
                if self._download(file_system, f"{source}/{name}", folder):
                    try:
                        Manifest.read(folder).verify(folder)
                        return
                    except ArtefactError as error:
                        warnings.warn(f"remote checkpoint passed over: {reason(error)}", stacklevel=2)

    def _download(self, file_system: pyarrow.fs.FileSystem, source: str, folder: Path) -> bool:
        """Copy a finished remote folder; False when it has no manifest."""
        if file_system.get_file_info(f"{source}/{MANIFEST_NAME}").type != pyarrow.fs.FileType.File:
            return False
        partial = folder.with_name(folder.name + f".partial{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        pyarrow.fs.copy_files(
            source, str(partial), source_filesystem=file_system, destination_filesystem=pyarrow.fs.LocalFileSystem()
        )
        try:
            partial.rename(folder)
        except OSError:  # the folder exists: an unfinished copy, or another process that was faster
            for path in partial.rglob("*"):
                if path.is_file():
                    target = folder / path.relative_to(partial)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
            shutil.rmtree(partial, ignore_errors=True)
        return True


def _is_whole(folder: Path, thorough: bool = False) -> bool:
    """Whether a folder holds a finished artefact with all of its files; `thorough` compares their hashes too."""
    try:
        manifest = Manifest.read(folder)
        if thorough:
            manifest.verify(folder)
    except ArtefactError:
        return False
    return True


def _version(path: Path) -> tuple[int, int]:
    """Changes when a local file does."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
