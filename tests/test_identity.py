"""Identity: every setting is decided on, and what does not change a result does not change a fingerprint."""

import dataclasses
from typing import Any

import pytest
import tiny

from kraken.config import RunConfig
from kraken.presets import PRESETS
from pipelines import identity, lineage
from pipelines.end_to_end import KINDS, STAGES
from pipelines.stage import Stage, fingerprints

OTHER: dict[str, Any] = {
    "train.precision": "float32",
    "train.compile": "off",
    "train.on_bad_step": "skip",
    "train.optimizer": "muon",
    "train.final_learning_rate_fraction": 0.5,
    "train.beta1": 0.5,
    "train.beta2": 0.5,
    "engine.kind": "torch",
    "engine.device": "cpu",
    "engine.dtype": "float32",
    "engine.quantization": "fp8",
    "engine.overlap": "blocking",
    "engine.all_reduce": "nccl",
    "engine.cuda_graph_sizes": (8,),
    "engine.max_batch_size": 8,
    "gates.force": ("perplexity=because",),
    "serve.registered_name": "other",
    "gates.reason": "because",
}
"""Another value of the fields whose type does not suggest one."""


def fields_of(config: RunConfig, kind: str) -> set[str]:
    """Dotted names of everything that a stage reads of the config."""
    return {
        f"{name}.{field.name}"
        for name in identity.SECTIONS[kind]
        for field in dataclasses.fields(getattr(config, name))
    }


def stages() -> tuple[Stage, ...]:
    """The pipeline's, with a corpus that need not be read."""
    prepare = dataclasses.replace(STAGES[0], section=lambda run: {"data": dataclasses.asdict(run.data)})
    return (prepare, *STAGES[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_decided_on(kind: str) -> None:
    """A new setting needs a line in `pipelines/identity.py`: does it determine the result?"""
    determining, others = identity.DETERMINING[kind], identity.NOT_DETERMINING[kind]
    assert determining | others == fields_of(tiny.config(), kind)
    assert not determining & others


def test_every_section_belongs_to_a_stage_or_to_none() -> None:
    sections = {name for names in identity.SECTIONS.values() for name in names}
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert sections | identity.OF_NO_STAGE | {"continue_from"} == names


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_exactly_what_determines_the_result(kind: str) -> None:
    config = PRESETS["quickstart"]()
    before = fingerprints(stages(), config)[kind]
    for name in fields_of(config, kind):
        if name.startswith(("model.", "data.")):
            continue  # their values depend on each other
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        changed = OTHER.get(name, not value if isinstance(value, bool) else None)
        if changed is None:
            changed = "other" if isinstance(value, str) else (value or 1) * 2
        if name == "engine.all_reduce":
            continue  # only with several devices
        other = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: changed})}
        )
        after = fingerprints(stages(), other)[kind]
        assert (after != before) == (name in identity.DETERMINING[kind]), f"{name}: {value} -> {changed}"


@pytest.mark.parametrize("name", ["quickstart", "kraken_10m_4way", "kraken_125m_4way"])
def test_a_derived_setting_and_the_same_one_given_are_one_identity(name: str) -> None:
    config = PRESETS[name]()
    given = dataclasses.replace(
        config, train=dataclasses.replace(config.train, warmup_steps=config.train.num_warmup_steps)
    )
    assert fingerprints(stages(), config) == fingerprints(stages(), given)
    assert lineage.section(config)["train"]["warmup_steps"] == config.train.num_warmup_steps
    assert config.train.num_warmup_steps == {"quickstart": 40, "kraken_10m_4way": 50, "kraken_125m_4way": 2000}[name]
