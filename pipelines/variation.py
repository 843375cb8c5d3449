"""Variations: what a run changes of its preset. They give the run its name, and the command that repeats it."""

import dataclasses
from typing import Any

from kraken.config import RunConfig, to_dict
from kraken.presets import PRESETS
from pipelines.identity import DETERMINING
from pipelines.outbox import without_password

MAX_NAMED = 4
"""Most settings in a run's name."""
MAX_VALUE_LENGTH = 24
"""Longest value in a run's name, in characters."""

FOLLOWING = {
    "train.steps": ("train.warmup_steps",),
    "train.sequences_per_step": ("cluster.num_workers",),
    "cluster.way_size": ("cluster.num_workers",),
    "cluster.shard_size": ("cluster.num_workers",),
    "engine.max_batch_size": ("engine.max_step_tokens",),
    "model.context_length": ("evaluate.parity_tokens",),
}
"""Setting -> the settings that the command line derives from it unless they are given, as `jobs/following.py` does."""


def run_name(config: RunConfig) -> str:
    """The name of a pipeline's run: its preset, and the settings of it that change a result.

    `quickstart learning_rate=0.003 steps=300`. A run with a name of its own (`--name`) has that name. Settings that
    change no result are left out, since runs that differ in them only are one run in MLflow.
    """
    if config.name not in PRESETS:
        return config.name
    changed = _differences(PRESETS[config.name](), config)
    order = [name for kind in ("pretrain", "prepare", "convert", "evaluate", "deploy") for name in _fields(kind)]
    named = [name for name in dict.fromkeys(order) if name in changed]
    words = [f"{_short(name, order)}={_value(changed[name])}" for name in named]
    if config.continue_from is not None:
        words.append(f"continue_from={_origin(config.continue_from)}")
    left_out = len(words) - MAX_NAMED
    return " ".join([config.name, *words[:MAX_NAMED], *([f"+{left_out}"] if left_out > 0 else [])])


def arguments(config: RunConfig) -> list[str]:
    """The arguments of a command line that make this run: `["quickstart", "--train.steps", "300", ...]`.

    A preset is found for a run with a name of its own: the one that the run differs from least. Passwords are hidden.
    """
    preset = PRESETS.get(config.name) or min(
        (make for make in PRESETS.values()), key=lambda make: len(_differences(make(), config))
    )
    base = preset()
    changed = _differences(base, config)
    values = _flat(config)
    for name in list(changed):
        for following in FOLLOWING.get(name, ()):
            if following != "train.warmup_steps" or base.train.warmup_steps is not None:
                changed.setdefault(following, values[following])
    words = [preset.__name__]
    if config.name != base.name:
        words += ["--name", config.name]
    for name, value in changed.items():
        words += _option(name, value)
    if config.continue_from is not None:
        words += ["--continue-from", config.continue_from]
    words += ["--storage", config.storage]
    if config.experiment != base.experiment:
        words += ["--experiment", config.experiment]
    return [without_password(word) for word in words]


def _differences(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of the settings in sections that differ, without those that follow from others."""
    ours, theirs = _flat(config), _flat(base)
    changed = {name: value for name, value in ours.items() if value != theirs[name]}
    changed.pop("model.vocab_size", None)  # the tokenizer's
    if config.model.architecture != "kraken":
        changed.pop("model.num_ways", None)  # has one way
    derived = dataclasses.replace(config.train, warmup_steps=None).num_warmup_steps
    if base.train.warmup_steps is None and config.train.num_warmup_steps == derived:
        changed.pop("train.warmup_steps", None)
    return changed


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of every setting in a section."""
    sections = ((name, part) for name, part in to_dict(config.resolved()).items() if isinstance(part, dict))
    return {f"{name}.{field}": value for name, part in sections for field, value in part.items()}


def _fields(kind: str) -> list[str]:
    """The settings that determine a stage's result, in the order of the config."""
    names = dict.fromkeys(name for preset in (PRESETS["quickstart"](),) for name in _flat(preset))
    return [name for name in names if name in DETERMINING[kind]]


def _short(name: str, others: list[str]) -> str:
    """A setting's name without its section, where no other section has that name."""
    field = name.partition(".")[2]
    is_shared = sum(other.partition(".")[2] == field for other in dict.fromkeys(others)) > 1
    return name if is_shared or field in ("name", "kind") else field


def _value(value: Any) -> str:
    """A value in a run's name."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, tuple | list):
        text = ",".join(map(str, value))
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    text = "_".join(without_password(text).split())
    return text if len(text) <= MAX_VALUE_LENGTH else f"...{text[3 - MAX_VALUE_LENGTH :]}"


def _origin(origin: str) -> str:
    fingerprint, at, step = origin.partition("@")
    return fingerprint[:8] + at + step


def _option(name: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    section, _, field = name.partition(".")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{field.replace('_', '-')}"]
    option = f"--{section}.{field.replace('_', '-')}"
    return [option, *map(str, value)] if isinstance(value, tuple | list) else [option, str(value)]
