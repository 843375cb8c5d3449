"""Adopting a checkpoint: the first checkpoint of a run that continues another run is a copy of that run's."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from kraken.checkpoint.folders import make_durable, step_folder
from kraken.checkpoint.history import HISTORY_NAME, read_history, write_history
from kraken.manifest import MANIFEST_NAME, ArtefactError, FileRecord, Manifest, sha256_of_file


def adopt(run_folder: Path, step: int, target_folder: Path, fingerprint: str, *, keep_validations: bool) -> None:
    """Copy the checkpoint of a step into another run's folder, with a note of where it is from.

    Args:
        run_folder: of the earlier run, whose `fingerprint` goes into the copy's manifest as its origin.
        target_folder: of the run that continues it.
        keep_validations: whether the history keeps its validation losses; they cannot stand beside those of a run that
            validates on other windows.

    Raises:
        ArtefactError: the checkpoint is missing or damaged.
        OSError: the disk is full.
    """
    source, target = step_folder(run_folder, step), step_folder(target_folder, step)
    partial = target_folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifest = Manifest.read(source)
        partial.mkdir(parents=True)
        for name in [record.path for record in manifest.files] + [MANIFEST_NAME]:
            shutil.copyfile(source / name, partial / name)
    except FileNotFoundError as error:  # deleted meanwhile by a training that still runs
        raise ArtefactError(
            f"{source} was deleted while it was copied; run the same command with --continue-from latest"
        ) from error
    manifest.verify(partial)  # the copies, so that nothing is trusted that was not read
    history = read_history(partial)
    if not keep_validations:
        history = [{k: v for k, v in report.items() if not k.startswith("validation_")} for report in history]
        write_history(partial, history)
    origin: dict[str, Any] = {
        "fingerprint": fingerprint,
        "step": step,
        "skipped_steps": int(history[-1].get("skipped_steps", 0) if history else 0)
        + int(manifest.details["interval"].get("bad", 0)),
    }
    path = partial / HISTORY_NAME
    record = FileRecord(path=HISTORY_NAME, num_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    dataclasses.replace(
        manifest,
        files=tuple(record if other.path == HISTORY_NAME else other for other in manifest.files),
        metrics={k: v for k, v in manifest.metrics.items() if keep_validations or not k.startswith("validation_")},
        details=manifest.details | {"origin": origin},
    ).write(partial)
    for path in partial.iterdir():
        make_durable(path)
    partial.rename(target)
    make_durable(target_folder)
