"""Settings that follow: a first variation of a preset works, and what is given stays as it is."""

from typing import Any

import pytest

from jobs.command import parse
from kraken.config import ConfigError, RunConfig, TrainConfig


def config(*argv: str) -> RunConfig:
    return parse("x", "", list(argv)).config


def value(run: RunConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(run, section), field)


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        ("quickstart --train.steps 20", "train.num_warmup_steps", 2),
        ("quickstart --train.steps=1", "train.num_warmup_steps", 0),
        ("quickstart --train.steps 20 --train.warmup-steps 15", "train.num_warmup_steps", 15),
        ("kraken_10m_4way --train.steps 20", "train.num_warmup_steps", 2),
        ("kraken_10m_4way --train.steps 5000", "train.num_warmup_steps", 50),
        ("kraken_125m_4way --train.steps 1000", "train.num_warmup_steps", 100),
        ("quickstart --data.tokenizer gpt2", "model.vocab_size", 50304),
        ("quickstart --data.num_trained_ids 300", "model.vocab_size", 320),
        ("kraken_125m_4way --data.tokenizer trained", "model.vocab_size", 4160),
        ("quickstart --data.corpus nanogpt --data.paths /data", "model.vocab_size", 50304),
        ("quickstart --data.corpus nanogpt --data.paths /data", "data.tokenizer", "gpt2"),
        ("quickstart --model.architecture standard", "model.num_ways", 1),
        ("quickstart --train.sequences-per-step 1", "cluster.num_workers", 1),
        ("kraken_125m_4way --train.sequences-per-step 6", "cluster.num_workers", 6),
        ("quickstart --cluster.way-size 4", "cluster.num_workers", 4),
        ("kraken_125m_4way --cluster.way-size 4 --train.sequences-per-step 3", "cluster.num_workers", 4),
        ("quickstart --engine.max-batch-size 1024", "engine.max_step_tokens", 1024),
        ("quickstart --model.context-length 32", "evaluate.parity_tokens", 16),
        ("quickstart --model.context-length 32 --evaluate.parity-tokens 4", "evaluate.parity_tokens", 4),
    ],
)
def test_a_first_variation_works(argv: str, name: str, expected: object) -> None:
    assert value(config(*argv.split()), name) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("quickstart --train.steps 20 --train.warmup-steps 40", "train.warmup_steps=40 is outside"),
        ("quickstart --data.tokenizer gpt2 --model.vocab-size 4160", "choose model.vocab_size=50304"),
        ("quickstart --train.sequences-per-step 1 --cluster.num-workers 2", "is not divisible by the 2 parts"),
        ("quickstart --engine.max-batch-size 1024 --engine.max-step-tokens 512", "engine.max_step_tokens=512 is below"),
        ("quickstart --train.steps many", "invalid literal for int"),
        ("quickstart --train.steps", "--train.steps"),
    ],
)
def test_what_is_given_is_checked_as_it_is(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*argv.split())


def test_a_preset_without_variations_is_as_it_was() -> None:
    from kraken.presets import PRESETS

    for name in ("quickstart", "kraken_10m_2way", "kraken_125m_4way", "parallel_774m"):
        found, expected = config(name), PRESETS[name]()
        assert (found.model, found.train, found.cluster, found.engine, found.evaluate) == (
            *(expected.model, expected.train, expected.cluster, expected.engine, expected.evaluate),
        )


def test_the_library_derives_the_warm_up_too() -> None:
    assert TrainConfig(steps=20, sequences_per_step=1).num_warmup_steps == 2
    assert TrainConfig(steps=10**6, sequences_per_step=1).num_warmup_steps == 2000
