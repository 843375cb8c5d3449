"""Descriptions: the Markdown at the top of a run's page in MLflow. What it is, what came of it, how to repeat it."""

import shlex
from collections.abc import Sequence

from kraken.config import RunConfig
from kraken.manifest import Manifest
from pipelines.report.content import lead, number
from pipelines.report.document import Code, Document, Section, Table, Text, to_markdown
from pipelines.report.facts import Facts
from pipelines.variation import arguments

STAGES = {
    "prepare": "A corpus becomes a tokenizer and token shards.",
    "pretrain": "Ray Train workers train the model on the token shards; checkpoints lie in the artefact's folder.",
    "convert": "The final checkpoint becomes an exchange folder: safetensors, tokenizer, code for Hugging Face.",
    "evaluate": "Perplexity of the converted model through an engine, and the engine's parity with the trainer.",
    "deploy": "The converted model behind an OpenAI-compatible endpoint.",
}
"""Kind -> what the stage does."""
SHOWN = {
    "prepare": ("train_tokens", "validation_tokens", "unigram_entropy"),
    "pretrain": ("parameters", "train_tokens", "final_validation_loss", "mean_tokens_per_second"),
    "convert": ("parameters", "conversion_seconds"),
    "evaluate": ("validation_loss", "validation_perplexity", "bits_per_byte", "parity_max_abs_diff"),
    "deploy": ("replicas",),
}
"""Kind -> the metrics that its description shows."""


def of_pipeline(facts: Facts, report: str = "") -> str:
    """The description of a pipeline's run.

    Args:
        report: link to the report, once it is written.
    """
    rows = [
        (
            stage.kind,
            stage.state,
            f"{stage.work_seconds:,.1f}" if stage.manifest else "",
            "; ".join(_results(stage.manifest)) if stage.manifest else stage.error,
        )
        for stage in facts.stages
    ]
    document = Document(
        title=facts.name,
        lead=lead(facts),
        sections=[
            Section("Stages", [Table(("stage", "state", "seconds of work", "result"), rows, frozenset({2}))]),
            Section("How to reproduce", [Code(command(facts.config, "end_to_end"))]),
        ],
        warning=facts.warning,
    )
    return (f"[Report]({report})\n\n" if report else "") + to_markdown(document).partition("\n\n")[2]


def of_stage(kind: str, config: RunConfig, manifest: Manifest | None = None) -> str:
    """The description of a stage's run.

    Args:
        manifest: of the finished artefact.
    """
    parts = [STAGES.get(kind, "")]
    if manifest is not None:
        parts += ["Result: " + "; ".join(_results(manifest)) + "."]
    document = Document("", parts, [Section("How to reproduce", [Code(command(config, kind)), *_commit(manifest)])])
    return to_markdown(document).partition("\n\n")[2]


def command(config: RunConfig, job: str) -> str:
    """The command line that makes this run again.

    Args:
        job: module of jobs/, which the stages have the names of.
    """
    return shlex.join(["python", "-m", f"jobs.{job}", *arguments(config)])


def _results(manifest: Manifest) -> Sequence[str]:
    shown = ((name, manifest.metrics.get(name)) for name in SHOWN.get(manifest.kind, ()))
    return [f"{name} {number(metric.value)} {metric.unit}" for name, metric in shown if metric]


def _commit(manifest: Manifest | None) -> Sequence[Text]:
    return [Text(f"Made at {manifest.created_at} by commit {manifest.git_revision}.")] if manifest else []
