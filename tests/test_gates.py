"""Gates: judged from figures, each against a number that the test works out itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kraken.config import GATES, ConfigError, GatesConfig
from kraken.manifest import Manifest, Metric
from pipelines import gates
from pipelines.gates import Figures, judge
from pipelines.registry import Lineage, Version

NEW = Lineage(
    exchange="b" * 64,
    storage_id="s",
    location="/storage/convert/bbbbbbbbbbbbbbbb",
    storage="/storage",
    prepare="d" * 64,
    pretrain="t" * 64,
    evaluate="e" * 64,
    checkpoint="step_000000006",
    pipeline="tiny",
    experiment="kraken",
    tokenizer="1" * 64,
    engine="torch",
    parity_max_abs_diff="1e-6",
    validation_loss="4.605",
    perplexity="100.5",
    bits_per_byte="2.0",
    scored_tokens="128",
)


def champion(**fields: str) -> Version:
    lineage = dataclasses.replace(NEW, **{"exchange": "a" * 64, "perplexity": "100.0", **fields})
    return Version("kraken", 3, lineage.tags, ("champion",), "2026-01-01T00:00:00Z", "run")


def evaluation(parity: float = 1e-6, different: int = 0, tolerance: float = 1e-3) -> Manifest:
    metrics = {
        "parity_max_abs_diff": Metric(parity, "nats"),
        "parity_tokens_different": Metric(different, "tokens"),
        "parity_passed": Metric(float(parity <= tolerance and not different), "1 = yes"),
    }
    config = {"evaluate": {"parity_tolerance": tolerance}}
    return Manifest(kind="evaluate", fingerprint="e" * 64, config=config, parents={}, metrics=metrics)


def results(config: GatesConfig, against: Version | None, figures: Figures, **measured: Any) -> dict[str, gates.Result]:
    found = gates.force(judge(config, evaluation(**measured), NEW, against, figures), config.forced)
    assert tuple(result.gate for result in found) == GATES
    return {result.gate: result for result in found}


def test_a_first_deployment_passes_what_needs_a_champion() -> None:
    found = results(GatesConfig(max_latency_increase=0.1), None, Figures())
    states = {gate: result.state for gate, result in found.items()}
    skipped = dict.fromkeys(("tokenizer", "perplexity", "latency"), "skipped")
    assert states == {"fingerprint": "passed", "parity": "passed"} | skipped
    assert "no champion yet" in found["perplexity"].reason
    assert gates.refusal([*found.values()], None) == "" and gates.verdict([*found.values()]) == "passed"


@pytest.mark.parametrize(("perplexity", "state"), [(100.99, "passed"), (101.01, "failed"), (50.0, "passed")])
def test_perplexity_may_be_one_percent_worse(perplexity: float, state: str) -> None:
    found = results(GatesConfig(), champion(), Figures(perplexity=perplexity))["perplexity"]
    assert found.state == state
    assert (found.value, found.champion, found.limit) == (perplexity, 100.0, pytest.approx(101.0))
    assert f"{abs(perplexity / 100 - 1):.2%}" in found.reason and "models:/kraken/3" in found.reason


def test_a_refusal_names_the_figure_the_excess_and_the_way_out() -> None:
    found = [*results(GatesConfig(), champion(), Figures(perplexity=112.0)).values()]
    refusal = gates.refusal(found, champion())
    assert "perplexity is 112, 12.00% above the 100 of the champion models:/kraken/3" in refusal
    assert "stays in production; --force perplexity='REASON'" in refusal
    assert gates.verdict(found) == "failed perplexity"


def test_a_forced_gate_keeps_its_figure_and_its_reason() -> None:
    config = GatesConfig(force=("perplexity=newer text = better",))
    found = results(config, champion(), Figures(perplexity=112.0))
    forced = found["perplexity"]
    assert (
        forced.state == "forced" and forced.value == 112.0 and forced.reason.endswith("; forced: newer text = better")
    )
    assert gates.refusal([*found.values()], champion()) == ""
    assert gates.verdict([*found.values()]) == "forced perplexity"
    worse = results(config, champion(tokenizer="2" * 64), Figures(perplexity=112.0))
    assert worse["tokenizer"].state == "failed", "only the gate that was named is forced"


def test_what_cannot_be_compared_does_not_pass() -> None:
    found = results(GatesConfig(max_latency_increase=0.1), champion(), Figures(obstacle="the data were removed"))
    assert (found["perplexity"].state, found["latency"].state) == ("failed", "failed")
    assert "the data were removed" in found["perplexity"].reason


def test_latency_is_compared_only_where_it_is_asked_for() -> None:
    slow = Figures(perplexity=100.0, latency_ms=12.0, champion_latency_ms=10.0)
    assert results(GatesConfig(), champion(), slow)["latency"].state == "skipped"
    assert results(GatesConfig(max_latency_increase=0.25), champion(), slow)["latency"].state == "passed"
    found = results(GatesConfig(max_latency_increase=0.1), champion(), slow)["latency"]
    assert found.state == "failed" and "12 ms, 20.00% above the 10 ms" in found.reason


def test_parity_damage_and_tokenizer() -> None:
    found = results(GatesConfig(), champion(), Figures(perplexity=100.0), parity=2e-3)
    assert found["parity"].state == "failed" and "parity failed" in found["parity"].reason
    assert results(GatesConfig(), None, Figures(), different=1)["parity"].state == "failed"
    damaged = results(GatesConfig(), None, Figures(damage="model.safetensors does not match its hash"))
    assert damaged["fingerprint"].state == "failed"
    assert "run the stages again" in gates.refusal([*damaged.values()], None)
    other = champion(tokenizer="2" * 64)
    assert results(GatesConfig(), other, Figures(perplexity=1.0))["tokenizer"].state == "failed"
    assert results(GatesConfig(same_tokenizer=False), other, Figures(perplexity=1.0))["tokenizer"].state == "skipped"


def test_the_champion_itself_is_not_compared_with_itself() -> None:
    itself = Version("kraken", 3, NEW.tags, ("champion",), "", "")
    found = results(GatesConfig(), itself, Figures())
    assert found["perplexity"].state == "skipped" and "is the champion" in found["perplexity"].reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"force": ("perplexity",)}, "gates.force=perplexity is no GATE=REASON"),
        ({"force": ("fingerprint=x",)}, "the gates are parity, tokenizer, perplexity, latency"),
        ({"force": ("speed=x",)}, "gates.force=speed=x"),
        ({"max_perplexity_increase": -0.1}, "gates.max_perplexity_increase=-0.1 is negative"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatesConfig(**fields)


def test_the_table_has_a_row_for_each_gate() -> None:
    found = [*results(GatesConfig(), champion(), Figures(perplexity=112.0)).values()]
    lines = gates.table(found).splitlines()
    assert len(lines) == 2 + len(GATES) and lines[5].startswith("| perplexity | failed | 112 | 100 | 101 |")
    assert json.loads(json.dumps([dataclasses.asdict(result) for result in found]))[3]["state"] == "failed"


def test_force_is_short_for_the_setting(tmp_path: Path) -> None:
    from jobs.command import parse

    argv = ["quickstart", "--storage", str(tmp_path), "--force", "perplexity=newer text", "parity=bfloat16"]
    assert parse("x", "", argv).config.gates.forced == {"perplexity": "newer text", "parity": "bfloat16"}
