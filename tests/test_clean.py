"""Cleaning: what is in use stays, what nothing refers to goes, and nothing outside of the storage is touched."""

import json
import os
import time
from pathlib import Path

import pytest
from test_api import echo_model, listening

from kraken.config import ConfigError
from kraken.manifest import MANIFEST_NAME, ArtefactError, finish_artefact
from kraken.storage import Storage
from kraken.tokenizer import Tokenizer
from pipelines import clean
from serve.api_key import API_KEY_VARIABLE, ApiKey, ApiKeyDigest, KeyRing

HOUR_S = 3600.0


def artefact(root: Path, kind: str, name: str, **parents: str) -> Path:
    """A finished artefact with one file of 1000 bytes; `name` is a digit, of which the fingerprint consists."""
    folder = root / kind / (name * 16)
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(bytes(1000))
    finish_artefact(
        folder,
        started_at=time.monotonic(),
        kind=kind,
        fingerprint=name * 64,
        config={},
        parents={parent: fingerprint * 64 for parent, fingerprint in parents.items()},
        metrics={},
    )
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two chains of artefacts, and what failures leave behind."""
    root = tmp_path / "storage"
    for digit in "12":
        artefact(root, "prepare", digit)
        artefact(root, "pretrain", digit, prepare=digit)
        artefact(root, "convert", digit, prepare=digit, pretrain=digit)
    (root / "pretrain" / ("1" * 16) / "step_000000004.damaged").mkdir()
    (root / "pretrain" / ("1" * 16) / ".step_000000008.partial").mkdir()
    (root / "pretrain" / ("3" * 16)).mkdir()
    (root / "pretrain" / ("3" * 16) / "run.json").write_text("{}")
    (root / "convert" / ("1" * 16 + ".partial77")).mkdir()
    (root / ".preflight" / "abc").mkdir(parents=True)
    (root / "mlflow.db").write_text("not ours to remove")
    return root


def found(root: Path, *referred: str) -> dict[str, str]:
    return {item.name: item.what for item in clean.survey(Storage(str(root)), referred).items}


LEFTOVERS = {
    "pretrain/" + "1" * 16 + "/step_000000004.damaged": "damaged",
    "pretrain/" + "1" * 16 + "/.step_000000008.partial": "temporary",
    "convert/" + "1" * 16 + ".partial77": "temporary",
    "pretrain/" + "3" * 16: "unfinished",
    ".preflight/abc": "temporary",
}


def test_what_is_referred_to_stays_with_all_it_was_made_from(root: Path) -> None:
    unused = dict.fromkeys((f"{kind}/{'2' * 16}" for kind in ("prepare", "pretrain", "convert")), "unreferenced")
    assert found(root, f"convert/{'1' * 16}") == LEFTOVERS | unused
    del unused[f"prepare/{'2' * 16}"]
    assert found(root, f"convert/{'1' * 16}", f"prepare/{'2' * 16}") == LEFTOVERS | unused


def test_only_old_items_go_and_unfinished_ones_when_asked_for(root: Path) -> None:
    storage = Storage(str(root))
    items = clean.survey(storage, [f"convert/{'1' * 16}"], now=time.time() + 5 * HOUR_S).items
    ages = {item.name: item.age_s / HOUR_S for item in items if item.num_bytes}
    assert ages and all(age == pytest.approx(5, abs=0.1) for age in ages.values())
    assert not [item for item in clean.removable(items, 6 * HOUR_S, unfinished=True) if item.num_bytes]
    chosen = clean.removable(items, 4 * HOUR_S, unfinished=False)
    assert {item.what for item in chosen} == {"unreferenced", "damaged", "temporary"}
    removed: list[clean.Item] = []
    clean.remove(storage, chosen, removed.append)
    assert removed == chosen
    left = {path.relative_to(root).as_posix() for path in root.glob("*/*")}
    assert left == {*(f"{kind}/{'1' * 16}" for kind in ("prepare", "pretrain", "convert")), f"pretrain/{'3' * 16}"}
    assert (root / "mlflow.db").read_text() == "not ours to remove"
    assert (root / "convert" / ("1" * 16) / "data.bin").stat().st_size == 1000


def test_a_size_counts_every_file(root: Path) -> None:
    item = next(item for item in clean.survey(Storage(str(root)), []).items if item.name == f"convert/{'2' * 16}")
    manifest = (root / item.name / MANIFEST_NAME).stat().st_size
    assert item.num_bytes == 1000 + manifest


@pytest.mark.parametrize("as_uri", [False, True])
def test_links_are_not_followed(root: Path, tmp_path: Path, as_uri: bool) -> None:
    """Neither a folder that is a link, nor one inside a folder that is removed."""
    outside = artefact(tmp_path / "elsewhere", "convert", "9")
    os.symlink(outside, root / "convert" / ("9" * 16))
    os.symlink(outside, root / "convert" / ("2" * 16) / "link")
    storage = Storage(root.as_uri() if as_uri else str(root), cache=tmp_path / "cache" if as_uri else None)
    survey = clean.survey(storage, [f"convert/{'1' * 16}"])
    assert [Path(link).name for link in survey.links] == ["9" * 16]
    assert f"convert/{'9' * 16}" not in {item.name for item in survey.items}
    clean.remove(storage, survey.items, lambda item: None)
    assert not (root / "convert" / ("2" * 16)).exists()
    assert (outside / "data.bin").stat().st_size == 1000
    with pytest.raises(ArtefactError, match="is a link or behind one"):
        storage.delete(storage.root / "convert" / ("9" * 16))


def test_an_artefact_with_missing_files_is_damaged_unless_it_is_in_use(root: Path) -> None:
    for digit in "12":
        (root / "convert" / (digit * 16) / "data.bin").unlink()
    items = found(root, f"convert/{'1' * 16}")
    assert items[f"convert/{'2' * 16}"] == "damaged" and f"convert/{'1' * 16}" not in items


def test_an_object_store_is_cleaned_the_same(root: Path, tmp_path: Path) -> None:
    """A `file://` storage goes the way of `s3://`, through pyarrow and a cache."""
    storage = Storage(root.as_uri(), cache=tmp_path / "cache")
    local = {(item.name, item.what, item.num_bytes) for item in clean.survey(Storage(str(root)), []).items}
    survey = clean.survey(storage, [])
    assert {(item.name, item.what, item.num_bytes) for item in survey.items} == local
    storage.fetch("convert", "2" * 64)
    assert (tmp_path / "cache" / "convert" / ("2" * 16)).is_dir()
    clean.remove(storage, survey.items, lambda item: None)
    assert not [*root.glob("*/*/*")] and not [*(tmp_path / "cache").glob("*/*/*")]


def test_without_a_run_nothing_is_said_to_be_unused(root: Path) -> None:
    from kraken.config import ConfigError

    class Empty:
        """A registry of another server, which knows nothing of this storage."""

        uri = "http://user:secret@elsewhere:5000"

        def artefacts(self, storage_id: str) -> set[str]:
            return set()

    (root / "storage_id").write_text(json.dumps({"id": "a" * 32, "path": str(root)}))
    with pytest.raises(ConfigError, match=r"MLflow at http://\*\*\*@elsewhere:5000 knows no finished run"):
        clean.references(str(root), Empty())  # type: ignore[arg-type]


def test_an_endpoint_that_asks_for_another_key_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 260)
    with listening(echo_model(tokenizer), keys=KeyRing(ApiKeyDigest.of(ApiKey("right")))) as url:
        for key in (None, "wrong"):
            monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
            if key is not None:
                monkeypatch.setenv(API_KEY_VARIABLE, key)
            with pytest.raises(ConfigError, match="does not say which model it serves.*set its key"):
                clean._model_behind(f"{url}/v1")
        monkeypatch.setenv(API_KEY_VARIABLE, "right")
        assert clean._model_behind(f"{url}/v1") == "f"
    assert clean._model_behind(f"{url}/v1") is None
