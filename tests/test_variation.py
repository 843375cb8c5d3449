"""Names and commands of runs: a person can tell runs apart, and the command makes the same run again."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs.command import parse
from kraken.config import RunConfig
from kraken.presets import PRESETS
from pipelines.variation import MAX_NAMED, arguments, run_name


def parsed(*words: str) -> RunConfig:
    return parse("test", "", list(words)).config.resolved()


def varied(name: str = "quickstart", **sections: dict[str, Any]) -> RunConfig:
    preset = PRESETS[name]()
    parts = {part: dataclasses.replace(getattr(preset, part), **fields) for part, fields in sections.items()}
    return dataclasses.replace(preset, **parts)


LONG_PATHS = {"corpus": "files", "paths": ("/a/very/long/folder/of/texts/*.jsonl",)}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (varied(), "quickstart"),
        (varied(train={"steps": 300, "learning_rate": 3e-3}), "quickstart steps=300 learning_rate=0.003"),
        (varied(train={"log_every": 1, "validate_every": 7}, cluster={"num_workers": 2}), "quickstart"),
        (varied(model={"architecture": "standard", "num_ways": 1}), "quickstart architecture=standard"),
        (varied(data=LONG_PATHS), "quickstart corpus=files paths=...lder/of/texts/*.jsonl"),
        (varied(engine={"kind": "torch"}, serve={"name": "x"}), "quickstart engine.kind=torch serve.name=x"),
        (dataclasses.replace(varied(train={"steps": 300}), name="mine"), "mine"),
        (varied("kraken_125m_4way", train={"steps": 20}), "kraken_125m_4way steps=20"),
        (varied("kraken_125m_4way", train={"warmup_steps": 20}), "kraken_125m_4way warmup_steps=20"),
        (varied(model={"bias": True}), "quickstart bias=true"),
    ],
)
def test_a_name_says_what_changes_the_result(config: RunConfig, name: str) -> None:
    assert run_name(config) == run_name(config.resolved()) == name


def test_a_name_is_short() -> None:
    config = varied(train={"steps": 1, "seed": 2, "beta1": 0.5, "beta2": 0.5, "clip_norm": 2.0}, model={"bias": True})
    assert run_name(config).endswith(" +2") and run_name(config).count("=") == MAX_NAMED
    config = dataclasses.replace(varied(), continue_from=f"{'f' * 64}@12")
    assert run_name(config) == "quickstart continue_from=ffffffff@12"


def test_the_command_of_a_preset_is_its_name() -> None:
    for name, preset in PRESETS.items():
        assert arguments(preset()) == [name, "--storage", "storage"]


@pytest.mark.parametrize(
    "words",
    [
        "quickstart --train.steps 300 --train.learning-rate 3e-3 --train.recompute-activations",
        "quickstart --name mine --experiment other --model.architecture parallel --engine.no-prefix-reuse",
        "quickstart --data.corpus files --data.paths /a/b.jsonl /c/*.txt --data.on-bad-document skip",
        "quickstart --data.tokenizer gpt2 --engine.max-batch-size 1000 --engine.cuda-graph-sizes 1 2",
        "kraken_125m_4way --train.steps 20 --train.warmup-steps 20 --cluster.way-size 4 --cluster.no-overlap",
        "kraken_10m_2way --train.steps 100 --train.warmup-steps 50 --model.context-length 16",
        "quickstart --continue-from 0123abcd@7 --serve.name x --convert.tensorrt-llm",
    ],
)
def test_the_command_makes_the_same_run(words: str) -> None:
    config = parsed(*words.split())
    assert parsed(*arguments(config)) == config


def test_the_command_of_a_run_of_no_preset_makes_it_too(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny.config(), storage=str(tmp_path)).resolved()
    assert run_name(config) == "tiny"
    assert parsed(*arguments(config)) == config


def test_no_password_is_shown() -> None:
    config = dataclasses.replace(PRESETS["quickstart"](), storage="s3://key:secret@bucket/kraken")
    assert "secret" not in " ".join(arguments(config))
