"""The identity of a storage: one for every process that sees it, another for every other storage."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest

from kraken import storage_id as module
from kraken.manifest import ArtefactError
from kraken.storage_id import ID_NAME, find_storage_id, storage_id


def ids_of_threads(uri: str, num_threads: int = 8) -> set[str]:
    """What several threads get that ask at once."""
    start, found = threading.Barrier(num_threads), []

    def ask() -> None:
        start.wait()
        found.append(storage_id(uri))

    threads = [threading.Thread(target=ask) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == num_threads
    return set(found)


def test_a_storage_keeps_its_id_under_every_path(tmp_path: Path) -> None:
    first = storage_id(str(tmp_path / "a"))
    (tmp_path / "mount").symlink_to(tmp_path / "a")
    assert storage_id(str(tmp_path / "a")) == first
    assert storage_id(str(tmp_path / "mount")) == first
    assert storage_id((tmp_path / "a").as_uri()) == first
    assert storage_id(str(tmp_path / "b")) != first


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert find_storage_id(str(tmp_path / "new")) is None
    assert not (tmp_path / "new").exists()
    made = storage_id(str(tmp_path / "new"))
    assert find_storage_id(str(tmp_path / "new")) == made


@pytest.mark.parametrize("has_links", [True, False])
def test_processes_that_ask_first_at_once_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    assert ids_of_threads(str(tmp_path)) == {storage_id(str(tmp_path))}
    assert [path.name for path in tmp_path.iterdir()] == [ID_NAME]


def test_a_copied_storage_is_another_one_and_a_moved_one_is_not(tmp_path: Path) -> None:
    original, copy, moved = (tmp_path / name for name in ("original", "copy", "moved"))
    first = storage_id(str(original))
    shutil.copytree(original, copy)
    expected = find_storage_id(str(copy))
    assert ids_of_threads(str(copy)) == {expected}
    assert expected != first
    assert storage_id(str(original)) == first
    original.rename(moved)
    assert storage_id(str(moved)) == first
    assert storage_id(str(copy)) == expected


def test_a_damaged_id_and_a_storage_that_cannot_hold_one_are_clear_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_LIMIT_S", 0.1)
    for text in ("", "{", "[]"):
        (tmp_path / ID_NAME).write_text(text)
        with pytest.raises(ArtefactError, match="is damaged.*delete it"):
            storage_id(str(tmp_path))
    with pytest.raises(ArtefactError, match="storage=.*make it writable"):
        storage_id(str(tmp_path / ID_NAME / "below a file"))


def test_a_remote_storage_has_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal dates, as of an object store that counts whole seconds: the name decides, for everybody alike."""
    file_system = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    opened = SimpleNamespace(from_uri=lambda uri: (file_system, "bucket/kraken"))
    monkeypatch.setattr(pyarrow.fs, "FileSystem", opened)
    assert find_storage_id("s3://bucket/kraken") is None
    assert ids_of_threads("s3://bucket/kraken") == {storage_id("s3://bucket/kraken")}
    assert len(list((tmp_path / "bucket/kraken" / ID_NAME).iterdir())) == 1
