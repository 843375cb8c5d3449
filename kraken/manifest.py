"""Manifests: what an artefact is, came from and holds; written last, so that a half-written folder has none.

A fingerprint is the hash of everything that determines a stage's output: its kind, its config section and its parents'
fingerprints. It is known before the stage runs, which is how a finished stage is found again and a dry run is possible.
"""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import dacite

MANIFEST_NAME = "manifest.json"
RECORDED_LIBRARIES = ("torch", "numpy", "tiktoken", "rustbpe", "safetensors", "ray", "mlflow")


class ArtefactError(RuntimeError):
    """An artefact is missing, half-written, damaged or does not fit; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its unit, for example `Metric(4.2, "nats/token")`."""

    value: int | float
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of an artefact, by its path inside the folder."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The record of one finished stage."""

    kind: str
    fingerprint: str
    config: dict[str, Any]
    """The config section that determined the output."""
    parents: dict[str, str]
    """Kind of each parent stage -> its fingerprint."""
    metrics: dict[str, Metric]
    details: dict[str, Any] = field(default_factory=dict)
    """Facts that are not numbers: names, hashes, URLs."""
    files: tuple[FileRecord, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    seconds: float = 0.0
    created_at: str = ""

    def value(self, name: str) -> float:
        """A metric's number."""
        return self.metrics[name].value

    def write(self, folder: Path) -> None:
        """Make the artefact exist for readers: one rename, after everything else is on disk."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)
        write_atomically(folder / MANIFEST_NAME, text)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a finished artefact and check that its files are there with the recorded sizes.

        Raises:
            ArtefactError: no manifest, one that cannot be read, or a missing or truncated file.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ArtefactError(_why_no_manifest(folder))
        manifest = cls.parse(path.read_text(errors="replace"), path)
        for record in manifest.files:
            file = folder / record.path
            num_bytes = file.stat().st_size if file.is_file() else None
            if num_bytes != record.num_bytes:
                found = "missing" if num_bytes is None else f"{num_bytes} bytes long"
                raise ArtefactError(
                    f"{file} is {found}, its manifest says {record.num_bytes} bytes; "
                    f"delete {path} and run the stage again"
                )
        return manifest

    @classmethod
    def parse(cls, text: str, path: Path) -> "Manifest":
        """A manifest from the text of its file.

        Raises:
            ArtefactError: it is none; `path` says in the message where it lies.
        """
        try:
            return dacite.from_dict(cls, json.loads(text), config=dacite.Config(strict=True, cast=[tuple]))
        except (ValueError, KeyError, TypeError, dacite.DaciteError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); delete this file and run the stage again") from error

    def verify(self, folder: Path) -> None:
        """Compare every file's hash with the record; reads the whole artefact.

        Raises:
            ArtefactError: names the first file that differs.
        """
        for record in self.files:
            if sha256_of_file(folder / record.path) != record.sha256:
                raise ArtefactError(
                    f"{folder / record.path} does not match its hash; delete {folder / MANIFEST_NAME} and run the "
                    "stage again"
                )


def _why_no_manifest(folder: Path) -> str:
    """What a folder without a manifest is, and what to do with it."""
    try:
        is_model = json.loads((folder / "config.json").read_text()).get("model_type") == "kraken"
    except (OSError, ValueError, AttributeError):
        is_model = False
    if is_model:
        return (
            f"{folder} holds a model but no {MANIFEST_NAME}: if transformers saved it, import it with `python -m "
            f"jobs.convert --from-huggingface {folder} --out FOLDER`; if a conversion never finished there, run it "
            "again"
        )
    return f"{folder} holds no {MANIFEST_NAME}: the stage never finished there; run it again"


def make_fingerprint(kind: str, section: Any, parents: Mapping[str, str]) -> str:
    """Hash what determines a stage's output; `section` is anything JSON can hold."""
    text = json.dumps({"kind": kind, "config": section, "parents": dict(parents)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finish_artefact(folder: Path, *, started_at: float, **fields: Any) -> Manifest:
    """Record every file below `folder`, then write its manifest.

    Args:
        started_at: `time.monotonic()` at the start of the stage.
        fields: the Manifest's kind, fingerprint, config, parents, metrics and details.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    manifest = Manifest(
        **fields,
        files=tuple(
            FileRecord(
                path=path.relative_to(folder).as_posix(), num_bytes=path.stat().st_size, sha256=sha256_of_file(path)
            )
            for path in paths
        ),
        libraries=library_versions(),
        git_revision=git_revision(),
        seconds=round(time.monotonic() - started_at, 3),
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    manifest.write(folder)
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, rename over it: readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file of any size, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result, Python's among them."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str | None:
    """Revision of the checkout this code runs from; KRAKEN_GIT_REVISION where it travelled without its history."""
    if revision := os.environ.get("KRAKEN_GIT_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
