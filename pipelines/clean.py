"""Cleaning a storage: artefacts that no run, alias or endpoint refers to, what failures left behind, and their removal.

An artefact is referred to by a run in MLflow (deleting the run there gives it free), by a registered version that has
an alias, by an endpoint that serves it, and by any artefact that is referred to and was made from it.
"""

import json
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kraken.checkpoint.folders import is_set_aside
from kraken.config import ConfigError
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest
from kraken.storage import Storage
from kraken.storage_id import find_storage_id
from pipelines.identity import SECTIONS
from pipelines.outbox import without_password
from pipelines.registry import Registry
from serve.api_key import API_KEY_VARIABLE, api_key

HTTP_TIMEOUT_S = 3.0
PROBES = ".preflight"
"""Folder of the files by which nodes are tested to share a storage."""

What = Literal["unreferenced", "unfinished", "damaged", "temporary"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A folder that could be removed."""

    path: Path
    """Where it lies in the storage, or would in its cache."""
    name: str
    """The same below the storage."""
    what: What
    """`unreferenced`: finished, and nothing refers to it. `unfinished`: an interrupted stage, which the same command
    continues. `damaged`: a checkpoint that was set aside, or an artefact with missing files. `temporary`: left by a
    process that was killed."""
    num_bytes: int
    age_s: float
    """Since its newest file was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What a storage holds."""

    items: list[Item]
    kept: set[str]
    """Artefacts that are referred to, as `KIND/FINGERPRINT`."""
    links: list[str]
    """Folders that are links, or behind one; left alone."""


def references(storage: str, registry: Registry) -> set[str]:
    """What runs, aliases and endpoints refer to, as `KIND/FINGERPRINT`, without what those were made from.

    Raises:
        ConfigError: MLflow knows no run of this storage, so that nothing would be referred to.
    """
    identity = find_storage_id(storage)
    found = set() if identity is None else registry.artefacts(identity)
    if not found and any(folder for kind in SECTIONS for folder in _folders(Storage(storage), kind)):
        raise ConfigError(
            f"MLflow at {without_password(registry.uri)} knows no finished run of storage={storage}, and would leave "
            "nothing of it; set MLFLOW_TRACKING_URI to the server that recorded its runs"
        )
    return found | _served(Storage(storage))


def _served(storage: Storage) -> set[str]:
    """Models behind endpoints that this storage's pipelines deployed, and that answer from here."""
    endpoints = set()
    for folder in _folders(storage, "deploy"):
        text = storage.read_text(folder / MANIFEST_NAME)
        try:
            endpoints.add(str(json.loads(text or "")["details"]["endpoint"]))
        except (ValueError, KeyError, TypeError):
            continue
    return {f"convert/{fingerprint[:16]}" for fingerprint in filter(None, map(_model_behind, endpoints))}


def _model_behind(endpoint: str) -> str | None:
    """Fingerprint of the model that an endpoint serves; None where none of this project answers.

    Raises:
        ConfigError: the endpoint asks for another key than KRAKEN_API_KEY, and tells no stranger what it serves.
    """
    if not endpoint.startswith(("http://", "https://")):
        return None
    url, key = f"{endpoint.removesuffix('/v1')}/health", api_key()
    headers = {} if key is None else {"Authorization": f"Bearer {key.value}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=HTTP_TIMEOUT_S) as response:
            answer = json.load(response)
    except (OSError, ValueError):
        return None
    if not isinstance(answer, dict) or "status" not in answer:
        return None
    if "exchange_fingerprint" not in answer:
        raise ConfigError(
            f"{endpoint} does not say which model it serves, since {API_KEY_VARIABLE} is not its key; set its key, so "
            "that its model is not taken for an unused one"
        )
    found = answer["exchange_fingerprint"]
    return found if isinstance(found, str) else None


def survey(storage: Storage, referred: Iterable[str], now: float | None = None) -> Survey:
    """Look through a storage; changes nothing.

    Args:
        referred: `KIND/FINGERPRINT` of what is referred to; what those were made from is found here.
        now: Unix seconds.
    """
    now = time.time() if now is None else now
    folders = [folder for kind in SECTIONS for folder in _folders(storage, kind)]
    links = [folder for folder in folders if storage.is_behind_link(folder)]
    manifests = {_name(folder): _manifest(storage, folder) for folder in folders if folder not in links}
    kept = _with_origins(set(referred), manifests)
    items = []

    def add(folder: Path, what: What) -> None:
        num_bytes, _, newest = storage.measure(folder)
        name = folder.relative_to(storage.root).as_posix()
        items.append(Item(path=folder, name=name, what=what, num_bytes=num_bytes, age_s=max(0.0, now - newest)))

    for folder in folders:
        name = _name(folder)
        if folder in links:
            continue
        if ".partial" in folder.name:
            add(folder, "temporary")
            continue
        found = manifests[name]
        if isinstance(found, Manifest) and name not in kept:
            add(folder, "unreferenced")
            continue
        if found is None and name not in kept:
            add(folder, "unfinished")
        elif isinstance(found, ArtefactError) and name not in kept:
            add(folder, "damaged")
        for inner in storage.list_folders(folder):
            if storage.is_behind_link(inner):
                links.append(inner)
            elif is_set_aside(inner):
                add(inner, "damaged")
            elif inner.name.endswith(".partial"):
                add(inner, "temporary")
    for folder in storage.list_folders(storage.root / PROBES):
        if not storage.is_behind_link(folder):
            add(folder, "temporary")
    return Survey(items=items, kept=kept & manifests.keys(), links=[str(link) for link in links])


def _folders(storage: Storage, kind: str) -> list[Path]:
    return storage.list_folders(storage.root / kind)


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _manifest(storage: Storage, folder: Path) -> Manifest | ArtefactError | None:
    """The manifest of an artefact, the error of one that is damaged, None of one that was never finished."""
    if storage.read_text(folder / MANIFEST_NAME) is None:
        return None
    try:
        return storage.read_manifest(folder)
    except ArtefactError as error:
        return error


def _with_origins(names: set[str], manifests: dict[str, Any]) -> set[str]:
    """The artefacts, and all that they were made from."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        manifest = manifests.get(name)
        if isinstance(manifest, Manifest):
            origins = {f"{kind}/{fingerprint[:16]}" for kind, fingerprint in manifest.parents.items()}
            names |= origins - found
    return found


def removable(items: Iterable[Item], older_than_s: float, *, unfinished: bool) -> list[Item]:
    """The items that may go: those that nobody has written to for so long; of unfinished stages only if asked for."""
    return [item for item in items if item.age_s >= older_than_s and (unfinished or item.what != "unfinished")]


def remove(storage: Storage, items: Iterable[Item], on_removed: Callable[[Item], None]) -> None:
    """Delete items. What lies inside one that is gone already is passed over.

    Raises:
        ArtefactError: an item is a link, or cannot be deleted; those before it are gone.
    """
    for item in items:
        try:
            storage.delete(item.path)
        except OSError as error:
            raise ArtefactError(
                f"{item.path} cannot be deleted ({error}); mend its rights and run this again"
            ) from error
        on_removed(item)
