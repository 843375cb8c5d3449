"""Storage: one folder per finished stage, under a local path or any URI that `pyarrow.fs` opens.

Stages read and write plain local folders. For a local storage these are the artefacts themselves; for a remote one they
are a cache, and `publish` and `fetch` copy whole artefacts, the manifest last.
"""

import getpass
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow.fs

from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest


def is_remote(uri: str) -> bool:
    """Whether a storage setting is a URI rather than a path of this machine."""
    return "://" in uri


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
        if is_remote(uri):
            try:
                self._remote = pyarrow.fs.FileSystem.from_uri(uri)
            except (OSError, ValueError, ImportError) as error:
                raise ArtefactError(
                    f"storage={uri} cannot be opened ({error}); give a path or a reachable URI"
                ) from error
            digest = hashlib.sha256(uri.encode()).hexdigest()[:12]
            self.root = cache or Path(tempfile.gettempdir()) / f"kraken-{getpass.getuser()}" / digest
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

    def find(self, kind: str, fingerprint: str) -> Manifest | None:
        """The manifest of a finished stage, or None. A damaged artefact counts as none, so that it is made again."""
        try:
            self.fetch(kind, fingerprint)
            manifest = Manifest.read(self.root / kind / fingerprint[:16])
        except ArtefactError:
            return None
        return manifest if manifest.fingerprint == fingerprint else None

    def publish(self, folder: Path) -> None:
        """Copy a finished local folder to a remote storage, its manifest last; nothing to do for a local one."""
        if self._remote is None:
            return
        file_system, base = self._remote
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(paths, key=lambda path: path.name == MANIFEST_NAME):
            target = f"{base}/{path.relative_to(self.root).as_posix()}"
            file_system.create_dir(target.rsplit("/", 1)[0], recursive=True)
            pyarrow.fs.copy_files(
                str(path), target, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=file_system
            )

    def fetch(self, kind: str, fingerprint: str) -> None:
        """Bring a remote artefact into the cache unless a finished copy is there; nothing to do for a local storage."""
        folder = self.root / kind / fingerprint[:16]
        if self._remote is None or (folder / MANIFEST_NAME).is_file():
            return
        file_system, base = self._remote
        self._download(file_system, f"{base}/{kind}/{fingerprint[:16]}", folder)

    def fetch_checkpoints(self, run_folder: Path) -> None:
        """Bring the newest finished checkpoint of a remote, unfinished run into the cache."""
        if self._remote is None:
            return
        file_system, base = self._remote
        source = f"{base}/{run_folder.relative_to(self.root).as_posix()}"
        selector = pyarrow.fs.FileSelector(source, allow_not_found=True)
        names = sorted(
            info.base_name for info in file_system.get_file_info(selector) if info.base_name.startswith("step_")
        )
        for name in reversed(names):
            if self._download(file_system, f"{source}/{name}", run_folder / name):
                return

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
