"""Gates between evaluation and deployment: what a model must pass, judged from figures alone.

The figures are the model's own manifests, and what `champion.py` measures where the champion was evaluated on other
data. A gate that fails stops the deployment, unless `gates.force` names it; the champion stays in production.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kraken.config import GatesConfig
from kraken.manifest import Manifest
from pipelines.registry import Lineage, Version

NAME = "gates.json"
"""File of the deploy stage's artefact, and of its MLflow run."""
GATES_TAG = "kraken.gates"
"""On the stage's run and on the version: `passed`, or the gates that failed or were forced."""

State = Literal["passed", "failed", "forced", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The judgement of one gate."""

    gate: str
    state: State
    reason: str
    """A sentence with the figures."""
    value: float | None = None
    """What was measured of this model."""
    champion: float | None = None
    """The same of the champion."""
    limit: float | None = None
    """Largest value that passes."""
    unit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What is known of a model and of the champion when the gates are judged."""

    damage: str = ""
    """What is wrong with the model's files or with what was evaluated; empty if nothing is."""
    perplexity: float | None = None
    """Of this model on the champion's validation data; None where that was not measured."""
    obstacle: str = ""
    """Why it could not be measured."""
    latency_ms: float | None = None
    champion_latency_ms: float | None = None
    """Median milliseconds of a completion; None where that was not measured."""


def judge(
    config: GatesConfig, evaluation: Manifest, own: Lineage, champion: Version | None, f: Figures
) -> list[Result]:
    """Every gate's result, in the order of `kraken.config.GATES`; forced ones are not yet marked.

    Args:
        evaluation: manifest of the model's evaluation.
        champion: None where there is none yet.
    """
    if champion is None:
        why = "no champion yet: this is the first deployment under this registered name"
    elif is_same(own, champion):
        why = "this model is the champion"
    else:
        why = ""
    return [
        _fingerprint(own, f),
        _parity(evaluation),
        _tokenizer(config, own, champion, why),
        _perplexity(config, own, champion, why, f),
        _latency(config, champion, why, f),
    ]


def is_same(own: Lineage, version: Version) -> bool:
    """Whether a version is this very model."""
    return (own.exchange, own.storage_id) == (version.lineage.exchange, version.lineage.storage_id)


def _fingerprint(own: Lineage, f: Figures) -> Result:
    if f.damage:
        return Result(gate="fingerprint", state="failed", reason=f.damage)
    return Result(
        gate="fingerprint",
        state="passed",
        reason=f"every file matches its hash, and the evaluation is of this model ({own.exchange[:16]})",
    )


def _parity(evaluation: Manifest) -> Result:
    found, limit = evaluation.value("parity_max_abs_diff"), evaluation.config["evaluate"]["parity_tolerance"]
    num_different = int(evaluation.value("parity_tokens_different"))
    passed = evaluation.value("parity_passed") == 1.0
    reason = (
        f"the engine's log-probabilities differ from the trainer's by {found:.2e}, limit {limit:.2e}, and "
        f"{num_different} greedy tokens differ"
    )
    if not passed:
        reason = (
            f"parity failed, {reason}; raise evaluate.parity_tolerance only if the engine computes in a lower precision"
        )
    return Result(
        gate="parity", state="passed" if passed else "failed", reason=reason, value=found, limit=limit, unit="nats"
    )


def _tokenizer(config: GatesConfig, own: Lineage, champion: Version | None, why: str) -> Result:
    if champion is None or why:
        return Result(gate="tokenizer", state="skipped", reason=why)
    theirs = champion.lineage.tokenizer
    if theirs == own.tokenizer:
        return Result(gate="tokenizer", state="passed", reason=f"the champion's ({theirs[:16]})")
    reason = f"the tokenizer is {own.tokenizer[:16]}, that of the champion {champion.uri} is {theirs[:16]}"
    if not config.same_tokenizer:
        return Result(gate="tokenizer", state="skipped", reason=f"{reason}; gates.same_tokenizer=False")
    return Result(gate="tokenizer", state="failed", reason=f"{reason}: clients that send or keep token ids would break")


def _perplexity(config: GatesConfig, own: Lineage, champion: Version | None, why: str, f: Figures) -> Result:
    limit = config.max_perplexity_increase
    if champion is None or why:
        return Result(gate="perplexity", state="skipped", reason=why)
    if limit is None:
        return Result(gate="perplexity", state="skipped", reason="gates.max_perplexity_increase=None")
    theirs = float(champion.lineage.perplexity)
    if f.perplexity is None:
        return Result(
            gate="perplexity",
            state="failed",
            champion=theirs,
            reason=f"perplexity cannot be compared with the champion's, {champion.uri}: {f.obstacle or 'not measured'}",
        )
    return _no_worse("perplexity", f.perplexity, theirs, limit, champion, "1", "gates.max_perplexity_increase")


def _latency(config: GatesConfig, champion: Version | None, why: str, f: Figures) -> Result:
    limit = config.max_latency_increase
    if limit is None:
        return Result(gate="latency", state="skipped", reason="gates.max_latency_increase=None")
    if champion is None or why:
        return Result(gate="latency", state="skipped", reason=why)
    if f.latency_ms is None or f.champion_latency_ms is None:
        return Result(
            gate="latency",
            state="failed",
            reason=f"latency cannot be compared with the champion's, {champion.uri}: {f.obstacle or 'not measured'}",
        )
    return _no_worse(
        "latency", f.latency_ms, f.champion_latency_ms, limit, champion, "ms", "gates.max_latency_increase"
    )


def _no_worse(
    gate: str, value: float, theirs: float, limit: float, champion: Version, unit: str, setting: str
) -> Result:
    """Compare with the champion: pass up to `limit`, a fraction of the champion's figure."""
    increase = value / theirs - 1
    suffix = "" if unit == "1" else f" {unit}"
    reason = (
        f"{gate} is {value:.4g}{suffix}, {abs(increase):.2%} {'above' if increase > 0 else 'below'} the "
        f"{theirs:.4g}{suffix} of the champion {champion.uri} on the same data; {setting}={limit:g} allows {limit:.2%}"
    )
    return Result(
        gate=gate,
        state="passed" if increase <= limit else "failed",
        reason=reason,
        value=value,
        champion=theirs,
        limit=theirs * (1 + limit),
        unit=unit,
    )


def force(results: list[Result], forced: Mapping[str, str]) -> list[Result]:
    """Turn failures that are forced into `forced`, with the reason that was given."""
    return [
        Result(
            gate=r.gate,
            state="forced",
            reason=f"{r.reason}; forced: {forced[r.gate]}",
            value=r.value,
            champion=r.champion,
            limit=r.limit,
            unit=r.unit,
        )
        if r.state == "failed" and r.gate in forced
        else r
        for r in results
    ]


def verdict(results: list[Result]) -> str:
    """A line for a tag: `passed`, or what failed or was forced."""
    parts = [f"{r.state} {r.gate}" for r in results if r.state in ("failed", "forced")]
    return ", ".join(parts) or "passed"


def refusal(results: list[Result], champion: Version | None) -> str:
    """Why nothing is deployed, and the way out; empty where every gate lets the model through."""
    failed = [r for r in results if r.state == "failed"]
    if not failed:
        return ""
    stays = f"; the champion {champion.uri} stays in production" if champion else ""
    if failed[0].gate == "fingerprint":  # the other figures are of damaged files, and nothing can be forced
        failed, way_out = failed[:1], "delete the manifest of the damaged artefact and run the stages again"
    else:
        way_out = " ".join(f"--force {r.gate}='REASON'" for r in failed) + " deploys it all the same"
    return f"deployment is refused: {'; and '.join(r.reason for r in failed)}{stays}; {way_out}"


def table(results: list[Result]) -> str:
    """A Markdown table, for logs, reports and MLflow."""

    def number(value: float | None, unit: str) -> str:
        return "" if value is None else f"{value:.4g}" + ("" if unit in ("", "1") else f" {unit}")

    rows = [
        f"| {r.gate} | {r.state} | {number(r.value, r.unit)} | {number(r.champion, r.unit)} | "
        f"{number(r.limit, r.unit)} | {r.reason} |"
        for r in results
    ]
    return "\n".join(["| gate | result | this model | champion | limit | |", "|---|---|---|---|---|---|", *rows])
