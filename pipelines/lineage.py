"""Lineage: which earlier trainings are in the storage, and which of them a new one can continue from.

Every training writes `run.json` into its folder before its first step, so that one that never finished can be
recognised, too. Two trainings are the same when their fingerprints are. One that differs in its schedule only (more
steps, another rate) can start from the other's newest good checkpoint when it is asked to: `--continue-from`.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dacite

from kraken.checkpoint.folders import is_checkpoint, step_of
from kraken.config import ConfigError, RunConfig, to_dict
from kraken.manifest import ArtefactError, Manifest, write_atomically
from kraken.storage import Storage, is_remote
from pipelines.identity import determining

KIND = "pretrain"
RUN_NAME = "run.json"
LATEST = "latest"
CONTINUED_FROM_TAG = "kraken.continued_from"
"""Of a training's MLflow run: `FINGERPRINT@STEP` of the checkpoint that it began with."""

MUST_BE_EQUAL = ("train.sequences_per_step", "train.seed", "train.optimizer")
"""Settings that give a position in the data and an optimizer state their meaning, besides model and data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The settings with which a training was started. The record is written before the first step."""

    fingerprint: str
    section: dict[str, Any]
    """What pretrain records of the config."""
    prepare: str
    """Fingerprint of the data."""
    data: dict[str, Any]
    """What prepare recorded of the config."""
    created_at: str

    def write(self, folder: Path) -> Path:
        """Write it into a run's folder; returns the file."""
        path = folder / RUN_NAME
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True))
        return path

    @property
    def origin(self) -> str | None:
        """`FINGERPRINT@STEP` of the checkpoint that it began with, if it was another run's."""
        origin: str | None = self.section["continue_from"]
        return origin

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted name -> value of the settings that determine the result, without the origin."""
        return _settings(self.section)


def section(config: RunConfig) -> dict[str, Any]:
    """The config section that pretrain records; `continue_from` must name a fingerprint and a step."""
    config = config.resolved()
    origin = config.continue_from
    assert origin is None or "@" in origin, f"continue_from={origin} is resolved first"
    return {"model": to_dict(config.model), "train": to_dict(config.train), "continue_from": origin}


def split_origin(origin: str) -> tuple[str, int | None]:
    """`FINGERPRINT@STEP` or `FINGERPRINT` -> its parts."""
    fingerprint, _, step = origin.partition("@")
    return fingerprint, int(step) if step else None


def read_records(storage: Storage) -> list[RunRecord]:
    """Every training in a storage that can be recognised, the newest first."""
    records = []
    for folder in storage.list_folders(storage.root / KIND):
        text = storage.read_text(folder / RUN_NAME)
        try:
            record = dacite.from_dict(RunRecord, json.loads(text or ""), config=dacite.Config(strict=True))
        except (ValueError, dacite.DaciteError):
            continue  # damaged, or of an earlier version
        records.append(record)
    return sorted(records, key=lambda record: record.created_at, reverse=True)


def checkpoints(storage: Storage, fingerprint: str, thorough: bool = True) -> Iterator[tuple[int, Manifest]]:
    """The good checkpoints of a training, the newest first.

    Args:
        thorough: compare hashes as well as sizes, which reads the whole checkpoint. Of a remote storage only sizes are
            compared: its checkpoints would have to be downloaded.
    """
    folder = storage.root / KIND / fingerprint[:16]
    for path in reversed([path for path in storage.list_folders(folder) if is_checkpoint(path)]):
        try:
            manifest = storage.read_manifest(path)
            if thorough and not is_remote(storage.uri):
                manifest.verify(path)
        except (ArtefactError, FileNotFoundError):  # damaged, or just deleted by a training that runs
            continue
        yield step_of(path), manifest


def newest_step(storage: Storage, fingerprint: str) -> int:
    """The step at which a training would continue; 0 where it has no good checkpoint."""
    return next((step for step, _ in checkpoints(storage, fingerprint)), 0)


def resolve(config: RunConfig, prepare: str) -> RunConfig:
    """The config with an exact `continue_from`: `FINGERPRINT@STEP`, which is part of the identity.

    A training that began this way already is found again, so that the same command continues it, whatever `latest`
    and the earlier run's newest checkpoint are by then.

    Args:
        prepare: fingerprint of the data.

    Raises:
        ConfigError: no run is meant, several are, or the one that is meant does not fit; says which setting differs.
    """
    given = config.continue_from
    if given is None:
        return config
    storage = Storage(config.storage)
    records = read_records(storage)
    settings = _settings(section(dataclasses.replace(config, continue_from=None)))
    same = [record for record in records if (record.settings, record.prepare) == (settings, prepare)]
    prefix, step = split_origin(given)
    for record in same:
        if record.origin is not None:
            fingerprint, began_at = split_origin(record.origin)
            if given == LATEST or (fingerprint.startswith(prefix) and step in (None, began_at)):
                return dataclasses.replace(config, continue_from=record.origin)
    for record in same:
        # one that was ended before its first checkpoint, for example to add --continue-from, is in nobody's way
        if record.fingerprint.startswith(prefix) or (given == LATEST and newest_step(storage, record.fingerprint)):
            way_out = f"give --continue-from {record.origin}" if record.origin else "leave --continue-from out"
            raise ConfigError(
                f"continue_from={given}: training {short(record.fingerprint)} has these very settings; {way_out}, and "
                "the same command continues it"
            )
    record = _choose(storage, config, prepare, records, given)
    good = (found for found, _ in checkpoints(storage, record.fingerprint) if step in (None, found))
    found = next(good, None)
    if found is None:
        at_step = "" if step is None else f" of step {step}"
        raise ConfigError(
            f"continue_from={given}: training {short(record.fingerprint)} has no good checkpoint{at_step}; choose "
            "another training, or leave --continue-from out to train from the start"
        )
    _require_steps_left(config, record, found, given)
    return dataclasses.replace(config, continue_from=f"{record.fingerprint}@{found}")


def _choose(storage: Storage, config: RunConfig, prepare: str, records: list[RunRecord], given: str) -> RunRecord:
    """The run that `continue_from` means.

    Raises:
        ConfigError: as `resolve`.
    """
    prefix, _ = split_origin(given)
    meant = [r for r in records if given == LATEST or r.fingerprint.startswith(prefix)]
    known = ", ".join(short(record.fingerprint) for record in records[:5]) or "none"
    if not meant:
        raise ConfigError(
            f"continue_from={given} names no training in {config.storage}/{KIND}; the newest there are: {known}"
        )
    if given != LATEST and len(meant) > 1:
        matching = ", ".join(record.fingerprint[:16] for record in meant)
        raise ConfigError(f"continue_from={given} names several trainings; give more characters of one of: {matching}")
    if given == LATEST:
        # the newest that fits, since a storage may hold trainings of many models
        fitting = [r for r in meant if difference(config, prepare, r) is None]
        with_checkpoint = (r for r in fitting if newest_step(storage, r.fingerprint))
        meant = [next(with_checkpoint, (fitting or meant)[0])]
    chosen = meant[0]
    if different := difference(config, prepare, chosen):
        raise ConfigError(
            f"continue_from={given}: training {short(chosen.fingerprint)} has {different}; give the earlier value, "
            "or leave --continue-from out to train from the start"
        )
    return chosen


def _require_steps_left(config: RunConfig, record: RunRecord, step: int, given: str) -> None:
    """Refuse a checkpoint that is past the end, or at it with another schedule than the one asked for."""
    steps = config.train.steps
    if step < steps or (step == steps and _changed(config, record) <= {"train.validation_windows"}):
        return
    raise ConfigError(
        f"continue_from={given}: training {short(record.fingerprint)} is at step {step} already, and "
        f"train.steps={steps} leaves nothing to train; give --train.steps above {step}"
    )


def suggest(config: RunConfig, prepare: str, own: str) -> str:
    """A line that says which earlier run this one could continue from, and how; empty where there is none.

    Args:
        prepare, own: fingerprints of the data and of this training, which would start at step 0.
    """
    storage, steps = Storage(config.storage), config.train.steps
    candidates: list[tuple[int, RunRecord]] = []
    for record in read_records(storage):
        if record.fingerprint == own or difference(config, prepare, record) is not None:
            continue
        found = (step for step, _ in checkpoints(storage, record.fingerprint, thorough=False) if step <= steps)
        step = next(found, 0)
        if 0 < step < steps or (step and _changed(config, record) <= {"train.validation_windows"}):
            candidates.append((step, record))
    for _, record in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
        for index, (step, _) in enumerate(checkpoints(storage, record.fingerprint)):
            if step <= steps:
                return _advice(config, record, step, is_newest=index == 0)
    return ""


def _advice(config: RunConfig, record: RunRecord, step: int, is_newest: bool) -> str:
    changed = ", ".join(f"{name}={record.settings.get(name)}" for name in sorted(_changed(config, record)))
    origin = short(record.fingerprint) + ("" if is_newest else f"@{step}")
    if not changed and record.origin is not None:  # this very training, begun with --continue-from
        origin = record.origin
    return (
        f"starts at step 0; training {short(record.fingerprint)} ({changed or 'the same settings'}) has a checkpoint "
        f"of step {step} to go on from: --continue-from {origin}"
    )


def difference(config: RunConfig, prepare: str, record: RunRecord) -> str | None:
    """The first setting that keeps a run from being continued with this config, with both values; None: it can be."""
    settings = _settings(section(dataclasses.replace(config, continue_from=None)))
    for name, value in settings.items():
        theirs = record.settings.get(name)
        if theirs != value and (name.startswith("model.") or name in MUST_BE_EQUAL):
            return f"{name}={theirs}, this one {name}={value}"
    if record.prepare == prepare:
        return None
    ours = determining("prepare", {"data": to_dict(config.data)})["data"]
    theirs_data = record.data.get("data", {})
    for field, value in ours.items():
        if json.dumps(theirs_data.get(field)) != json.dumps(value):
            return f"data.{field}={theirs_data.get(field)}, this one data.{field}={value}"
    return (
        f"data {short(record.prepare)}, this one data {short(prepare)} (the same settings, but the corpus has changed)"
    )


def short(fingerprint: str) -> str:
    """Enough of a fingerprint to name a run."""
    return fingerprint[:12]


def _changed(config: RunConfig, record: RunRecord) -> set[str]:
    """The settings that determine the result and differ."""
    settings = _settings(section(dataclasses.replace(config, continue_from=None)))
    theirs = record.settings
    return {name for name in settings.keys() | theirs.keys() if settings.get(name) != theirs.get(name)}


def _settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of what determines the result, without the origin."""
    parts = determining(KIND, {name: recorded[name] for name in ("model", "train")})
    return {f"{name}.{field}": value for name, part in parts.items() for field, value in part.items()}
