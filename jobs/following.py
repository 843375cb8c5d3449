"""Settings that follow from others: what a preset chose for its own values must not stand in the way of new ones.

`--data.tokenizer gpt2` needs another vocabulary, `--train.steps 20` a shorter warm-up. A setting that is given on the
command line stays as it is, and is refused where it does not fit.
"""

import contextlib
import re

from kraken.config import GPT2_NUM_IDS, RunConfig, pad_vocab


def follow(preset: RunConfig, overrides: list[str]) -> list[str]:
    """The overrides, and after them those that follow.

    Args:
        overrides: of a command line, as `--train.steps 20` or `--train.steps=20`.
    """
    given = read(overrides)
    following: dict[str, int | str] = {}
    for rule in (_tokenizer, _warmup_steps, _num_ways, _num_workers, _max_step_tokens, _parity_tokens):
        with contextlib.suppress(ValueError):  # the parser says what is wrong with it
            following |= rule(preset, given)
    return [*overrides, *(word for name, value in following.items() for word in (f"--{name}", str(value)))]


def read(overrides: list[str]) -> dict[str, str]:
    """Name, with hyphens -> the first word of its value."""
    given: dict[str, str] = {}
    for index, word in enumerate(overrides):
        if match := re.fullmatch(r"--([\w.-]+)(?:=(.*))?", word, re.DOTALL):
            following = overrides[index + 1] if index + 1 < len(overrides) else ""
            given[match[1].replace("_", "-")] = following if match[2] is None else match[2]
    return given


def _tokenizer(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """nanoGPT's files are GPT-2's ids, and the vocabulary is the tokenizer's."""
    following: dict[str, int | str] = {}
    tokenizer = given.get("data.tokenizer", preset.data.tokenizer)
    if given.get("data.corpus") == "nanogpt" and "data.tokenizer" not in given:
        following["data.tokenizer"] = tokenizer = "gpt2"
    num_trained_ids = int(given.get("data.num-trained-ids", preset.data.num_trained_ids))
    vocab_size = pad_vocab(GPT2_NUM_IDS if tokenizer == "gpt2" else num_trained_ids + 1)
    if "model.vocab-size" not in given and vocab_size != preset.model.vocab_size:
        following["model.vocab-size"] = vocab_size
    return following


def _warmup_steps(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """A tenth of fewer steps, where a preset has a warm-up of its own."""
    if preset.train.warmup_steps is None or "train.warmup-steps" in given or "train.steps" not in given:
        return {}
    return {"train.warmup-steps": min(preset.train.warmup_steps, max(0, int(given["train.steps"])) // 10)}


def _num_ways(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """The baselines have one way."""
    architecture = given.get("model.architecture", preset.model.architecture)
    if "model.num-ways" in given or architecture not in ("standard", "parallel"):
        return {}
    return {"model.num-ways": 1} if preset.model.num_ways != 1 else {}


def _num_workers(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """As many workers as the preset has, or fewer that the batch can be divided among; at least one model's."""
    if "cluster.num-workers" in given:
        return {}
    way_size = int(given.get("cluster.way-size", preset.cluster.way_size))
    group = way_size * int(given.get("cluster.shard-size", preset.cluster.shard_size))
    sequences = int(given.get("train.sequences-per-step", preset.train.sequences_per_step))
    if group < 1 or sequences < 1:
        return {}
    most = max(preset.cluster.num_workers, group)
    fitting = (n for n in range(most, 0, -1) if n % group == 0 and sequences % (n // way_size) == 0)
    chosen = next(fitting, preset.cluster.num_workers)
    return {"cluster.num-workers": chosen} if chosen != preset.cluster.num_workers else {}


def _max_step_tokens(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """A step has room for a token of every request."""
    batch_size = int(given.get("engine.max-batch-size", preset.engine.max_batch_size))
    if "engine.max-step-tokens" in given or batch_size <= preset.engine.max_step_tokens:
        return {}
    return {"engine.max-step-tokens": batch_size}


def _parity_tokens(preset: RunConfig, given: dict[str, str]) -> dict[str, int | str]:
    """Parity decodes at most half of the context, since a prompt comes before."""
    context_length = int(given.get("model.context-length", preset.model.context_length))
    if "evaluate.parity-tokens" in given or context_length < 2 or preset.evaluate.parity_tokens <= context_length // 2:
        return {}
    return {"evaluate.parity-tokens": context_length // 2}
