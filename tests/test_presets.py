"""The presets: sizes to the last digit printed, budgets matched, and nothing but the shape different."""

import dataclasses
import re

import pytest

from kraken.config import ModelConfig
from kraken.plan import cost as plan
from kraken.plan.cost import num_parameters
from kraken.presets import PRESETS

MILLIONS = {
    "kraken_125m_2way": 124.01,
    "kraken_125m_4way": 124.48,
    "kraken_125m_6way": 123.21,
    "kraken_350m_2way": 350.04,
    "kraken_350m_4way": 353.36,
    "kraken_760m_4way": 760.94,
    "kraken_125m_2way_aligned": 124.39,
    "kraken_125m_4way_aligned": 124.14,
    "kraken_125m_6way_aligned": 122.29,
    "kraken_350m_2way_aligned": 348.30,
    "kraken_350m_4way_aligned": 353.34,
    "kraken_760m_4way_aligned": 760.94,
    "gpt2_124m": 124.37,
    "gpt2_355m": 354.60,
    "gpt2_774m": 773.58,
    "parallel_124m": 124.36,
    "parallel_355m": 354.58,
    "parallel_774m": 773.54,
    "kraken_10m_2way": 10.85,
    "kraken_10m_4way": 10.78,
    "standard_10m": 10.83,
    "parallel_10m": 10.83,
    "kraken_delayed_10m_4way": 10.77,
    "kraken_delayed_125m_2way": 124.37,
    "kraken_delayed_125m_4way": 124.13,
}
TEN_M = ("kraken_10m_2way", "kraken_10m_4way", "standard_10m", "parallel_10m")
MATCHES = {
    f"{prefix}_{size}": f"kraken_{budget}_4way"
    for prefix in ("gpt2", "parallel")
    for size, budget in (("124m", "125m"), ("355m", "350m"), ("774m", "760m"))
}
"""Baseline -> the Kraken preset whose budget it matches."""
ALIGNED = [name for name in PRESETS if name.endswith("_aligned")]


def model(name: str) -> ModelConfig:
    return PRESETS[name]().model


def size(name: str) -> int:
    return num_parameters(model(name))


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_what_the_docstring_says(name: str) -> None:
    assert f"{size(name) / 1e6:.2f}" == f"{MILLIONS[name]:.2f}"
    text = PRESETS[name].__doc__ or ""
    assert f"{MILLIONS[name]:.2f} M parameters" in text
    for head_size in re.findall(r"head size (\d+)", text):
        assert int(head_size) == model(name).head_size


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_called_as_its_function(name: str) -> None:
    assert PRESETS[name]().name == name


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_presets_keep_the_published_budget(name: str) -> None:
    published = name.removesuffix("_aligned")
    assert model(name).width % 64 == 0
    assert model(name).head_size in (64, 128)
    assert abs(size(name) / size(published) - 1) < 0.01
    assert plan.reshaped(model(published), size(published))[0] == model(name)
    change = re.search(r"\(([+-][\d.]+) %\)", PRESETS[name].__doc__ or "")
    if change:
        assert f"{size(name) / size(published) - 1:+.2%}" == f"{change[1]}%"


def test_every_published_preset_has_an_aligned_one() -> None:
    published = [name for name in MILLIONS if re.fullmatch(r"kraken_(125|350|760)m_\dway", name)]
    assert [f"{name}_aligned" for name in published] == ALIGNED


@pytest.mark.parametrize(("baseline", "kraken"), MATCHES.items())
def test_baselines_match_a_budget(baseline: str, kraken: str) -> None:
    ratio = size(baseline) / size(kraken)
    assert abs(ratio - 1) < 0.03
    assert f"{ratio:.3f} of {kraken}" in (PRESETS[baseline].__doc__ or "")


def test_the_two_core_models_are_of_one_size() -> None:
    sizes = [size(name) for name in TEN_M]
    assert max(sizes) / min(sizes) < 1.01
    assert {model(name).num_layers for name in TEN_M} == {6}
    assert f"{max(sizes) / min(sizes) - 1:.2%}".replace("%", " %") in (PRESETS[TEN_M[0]].__doc__ or "")
    assert all(model(name).width % 8 == model(name).head_size % 8 == 0 for name in TEN_M)
    assert {model(name).positions for name in TEN_M} == {"rope"}
    for baseline in TEN_M[2:]:
        for kraken in TEN_M[:2]:
            assert f"{size(baseline) / size(kraken):.4f} of {kraken}" in (PRESETS[baseline].__doc__ or "")


@pytest.mark.parametrize(
    ("first", "second"),
    [*MATCHES.items(), *((name, name.removesuffix("_aligned")) for name in ALIGNED), *((TEN_M[0], x) for x in TEN_M)],
)
def test_what_is_compared_differs_in_nothing_but_shape(first: str, second: str) -> None:
    one, other = PRESETS[first](), PRESETS[second]()
    assert dataclasses.replace(one, name=other.name, model=other.model) == other
