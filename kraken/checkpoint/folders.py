"""The checkpoint folders of a run: their names, which of them are good, and setting aside those that are not.

step_000000100/            a finished checkpoint, see `reader.py`
.step_000000200.partial/   one that is being written
step_000000200.damaged/    one that failed its checks; readers and retention ignore it
"""

import os
import re
import shutil
import warnings
from pathlib import Path

from kraken.manifest import ArtefactError, Manifest

STEP_FOLDER = re.compile(r"step_(\d{9})")
DAMAGED_SUFFIX = ".damaged"
_DAMAGED_FOLDER = re.compile(STEP_FOLDER.pattern + re.escape(DAMAGED_SUFFIX))


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the finished checkpoint of a step lies."""
    return run_folder / f"step_{step:09d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a finished checkpoint."""
    return STEP_FOLDER.fullmatch(folder.name) is not None


def is_set_aside(folder: Path) -> bool:
    """Whether a folder has the name of a damaged checkpoint that was set aside."""
    return _DAMAGED_FOLDER.fullmatch(folder.name) is not None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Folders with the name of a finished checkpoint, oldest first; their contents are not checked."""
    return sorted(path for path in run_folder.glob("step_*") if is_checkpoint(path))


def list_set_aside(run_folder: Path) -> list[Path]:
    """Damaged checkpoints that were set aside, oldest step first."""
    return sorted(path for path in run_folder.glob("step_*") if is_set_aside(path))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes; damaged ones are passed over with a warning."""
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            Manifest.read(folder).verify(folder)
            return folder
        except ArtefactError as error:
            warnings.warn(f"checkpoint passed over: {reason(error)}", stacklevel=2)
    return None


def reason(error: ArtefactError) -> str:
    """What is wrong with a checkpoint, without the advice that follows: nothing has to be done about it."""
    return str(error).partition(";")[0]


def set_aside_name(folder: Path) -> Path:
    """What a damaged checkpoint's folder is renamed to."""
    return folder.with_name(folder.name + DAMAGED_SUFFIX)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint so that readers and retention ignore it. No-op if another process has done so."""
    target = set_aside_name(folder)
    if not folder.is_dir():
        return
    try:
        shutil.rmtree(target, ignore_errors=True)  # an earlier damaged checkpoint of the same step
        folder.rename(target)
    except FileNotFoundError:
        return


def make_durable(path: Path) -> None:
    """Write a file, or the names in a folder after a renaming, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
