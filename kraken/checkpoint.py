"""Checkpoints: weights, optimizer state, position and history, as safetensors and JSON; whole or not there at all."""

import errno
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken.config import ModelConfig, from_dict, to_dict
from kraken.history import History, read_history, write_history
from kraken.manifest import ArtefactError, Manifest, Metric, finish_artefact
from kraken.model import Kraken, fill, part_of, whole_shapes
from kraken.optim import Optimizer
from kraken.tokenizer import require_same_tokenizer

MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STEP_FOLDER = re.compile(r"step_(\d{9})")


def save_checkpoint(
    run_folder: Path,
    step: int,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    history: History,
    *,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    keep: int,
) -> Path:
    """Write the state after `step` optimizer steps, then delete all but the newest `keep` checkpoints.

    The loader's position is the step itself. Everything is written to a folder of another name, which is renamed.

    Args:
        weights: every parameter, whole.
        moments: the optimizer's state, whole, as `Optimizer.state` names it.

    Raises:
        ArtefactError: the disk is full; the checkpoint before this one stays.
    """
    started_at = time.monotonic()
    folder = run_folder / f"step_{step:09d}"
    partial = run_folder / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: x.contiguous() for name, x in weights.items()}, partial / MODEL_NAME)
        save_file({name: x.contiguous() for name, x in moments.items()}, partial / OPTIMIZER_NAME)
        write_history(partial, history)
        finish_artefact(
            partial,
            started_at=started_at,
            kind="checkpoint",
            fingerprint=folder.name,
            config=to_dict(config),
            parents={"prepare": data_fingerprint},
            metrics={"step": Metric(step, "optimizer steps")},
            details={"tokenizer_fingerprint": tokenizer_fingerprint},
        )
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        cause = "the disk is full" if full else str(error)
        raise ArtefactError(
            f"checkpoint of step {step} could not be written to {run_folder} ({cause}); free space and run again: "
            "training continues from the checkpoint before"
        ) from error
    for old in list_checkpoints(run_folder)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in run_folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes; damaged ones are passed over with a warning."""
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            Manifest.read(folder).verify(folder)
            return folder
        except ArtefactError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    return None


def load_checkpoint(
    folder: Path, model: Kraken, optimizer: Optimizer, *, data_fingerprint: str, tokenizer_fingerprint: str
) -> tuple[int, History]:
    """Fill model and optimizer from a checkpoint.

    Returns:
        The number of optimizer steps it was written after, and the reports until then.
    Raises:
        ArtefactError: it belongs to another model, another optimizer, other data or another tokenizer.
    """
    manifest = Manifest.read(folder)
    _require_equal(folder, "model shape", manifest.config, to_dict(model.config))
    _require_equal(folder, "data", manifest.parents["prepare"], data_fingerprint)
    require_same_tokenizer(manifest.details["tokenizer_fingerprint"], tokenizer_fingerprint, str(folder), "the data")
    load_weights(folder / MODEL_NAME, model)
    step = int(manifest.value("step"))
    try:
        optimizer.load_state(load_file(folder / OPTIMIZER_NAME), step)
    except KeyError as error:
        raise ArtefactError(
            f"{folder} was written by another train.optimizer: it lacks {error}; choose another run"
        ) from error
    return step, read_history(folder)


@torch.no_grad()
def load_weights(path: Path, model: Kraken) -> None:
    """Copy a file's tensors into a model's parameters, name by name; of each, the part that this process holds.

    Raises:
        ArtefactError: the file's names or shapes are not the model's.
    """
    shapes = whole_shapes(model.config)
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != shapes.keys():
            missing, unexpected = sorted(shapes.keys() - names), sorted(names - shapes.keys())
            raise ArtefactError(f"{path} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for name, parameter in model.named_parameters():
            whole = file.get_tensor(name)
            if whole.shape != shapes[name]:
                raise ArtefactError(f"{path}: {name} is {list(whole.shape)}, the model's is {list(shapes[name])}")
            fill(parameter, part_of(name, whole, model.config, model.ways))


def load_model(folder: Path) -> tuple[Kraken, Manifest]:
    """The model of a checkpoint, in the type it was written in, on the CPU."""
    manifest = Manifest.read(folder)
    model = Kraken(from_dict(ModelConfig, manifest.config))
    with safetensors.safe_open(folder / MODEL_NAME, framework="pt") as file:
        model.to(file.get_tensor("ln_f.weight").dtype)
    load_weights(folder / MODEL_NAME, model)
    return model, manifest


def _require_equal(folder: Path, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ArtefactError(
            f"{folder} was written for another {what}: {found} instead of {expected}; choose another run"
        )
