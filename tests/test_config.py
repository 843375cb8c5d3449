"""The config tree: checks, messages, JSON both ways."""

import dataclasses
import json
import re

import pytest

from kraken.config import ConfigError, ModelConfig, RunConfig, from_dict, to_dict, to_json
from kraken.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    config = PRESETS[name]()
    assert from_dict(RunConfig, json.loads(to_json(config))) == config


def test_unknown_key_is_refused() -> None:
    values = to_dict(PRESETS["quickstart"]())
    values["train"]["stepz"] = 3
    with pytest.raises(ConfigError, match="stepz"):
        from_dict(RunConfig, values)


def test_wrong_type_is_refused() -> None:
    values = to_dict(PRESETS["quickstart"]())
    values["train"]["steps"] = "many"
    with pytest.raises(ConfigError, match="steps"):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (
            "model",
            "num_ways",
            5,
            "model.num_heads=8 is not divisible by model.num_ways=5; choose num_ways from [1, 2, 4, 8]",
        ),
        ("model", "width", 129, "model.width=129 is not divisible by the 2 heads of a way"),
        ("model", "vocab_size", 4100, "model.vocab_size=4100 is not a multiple of 64; choose 4160"),
        ("train", "steps", 0, "train.steps=0 is not positive"),
        ("train", "warmup_steps", 999, "train.warmup_steps=999 is outside 0..train.steps"),
        ("data", "validation_fraction", 0.9, "data.validation_fraction=0.9 is outside 0..0.5"),
        ("serve", "port", 70000, "serve.port=70000 is outside 1..65535"),
        ("cluster", "gpus_per_worker", 2, "cluster.gpus_per_worker=2 is neither 0 nor 1"),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_the_way_out(
    section: str, field: str, value: object, message: str
) -> None:
    config = PRESETS["quickstart"]()
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(getattr(config, section), **{field: value})


def test_model_and_tokens_must_fit() -> None:
    config = PRESETS["quickstart"]()
    with pytest.raises(ConfigError, match="choose model.vocab_size=50304"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="gpt2"))


def test_batch_must_divide_among_workers() -> None:
    config = PRESETS["quickstart"]()
    with pytest.raises(ConfigError, match="train.sequences_per_step=2 is not divisible by the 3 parts"):
        dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, num_workers=3))


def test_derived_shapes_follow_the_published_presets() -> None:
    config = ModelConfig(num_layers=12, width=678, num_heads=12, num_ways=2, context_length=1024, vocab_size=50304)
    assert (config.heads_per_way, config.head_size, config.ffn_size) == (6, 113, 1356)
