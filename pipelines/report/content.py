"""What a report says: a pipeline's facts as a document. Every number is one of a manifest, in its unit."""

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from kraken.config import RunConfig, to_dict
from kraken.manifest import Manifest, Metric
from kraken.storage import join
from pipelines.datasets import corpus_name
from pipelines.outbox import without_password
from pipelines.report.document import Block, Code, Document, Picture, Section, Table, Text
from pipelines.report.facts import Facts, StageFacts
from pipelines.variation import arguments

QUALITY = (
    ("evaluate", "validation_loss", "validation loss, through the engine"),
    ("prepare", "unigram_entropy", "unigram entropy of the same tokens"),
    ("evaluate", "validation_perplexity", "perplexity"),
    ("evaluate", "bits_per_byte", "bits per byte"),
    ("evaluate", "scored_tokens", "scored tokens"),
    ("pretrain", "final_validation_loss", "validation loss at the end of training"),
    ("evaluate", "parity_max_abs_diff", "parity: largest difference of trainer and engine"),
    ("evaluate", "parity_tokens", "parity: compared tokens"),
)
"""(stage, metric, words) of the table of results."""
DATA_METRICS = ("documents", "bytes", "tokens")
CAPTIONS = {
    "loss": "Training and validation loss by training tokens.",
    "timeline": "When the stages of this run worked. The gaps are the time of Ray: starting processes and waiting.",
    "graph": "The stages, how each came about in this run, and an arrow for each artefact that a stage reads.",
}


def build(facts: Facts, figures: Mapping[str, Picture]) -> Document:
    """The report on a run of a pipeline.

    Args:
        figures: the drawn figures by name.
    """
    sections = [
        Section("Result", [*_quality(facts), *_pictures(figures, "loss")]),
        Section("Gates", _gates(facts)),
        Section("Stages", [_stages(facts), *_pictures(figures, "graph", "timeline")]),
        Section("Cost", _cost(facts)),
        Section("Data", _data(facts)),
        Section("Settings", [_settings(facts.config)]),
        Section("Sizes", _sizes(facts)),
        Section("Lineage", _lineage(facts)),
        Section("How to reproduce", _reproduce(facts)),
        Section("Every metric", _every_metric(facts)),
    ]
    return Document(
        title=facts.name,
        lead=lead(facts),
        sections=[section for section in sections if section.blocks],
        warning=facts.warning,
    )


def lead(facts: Facts) -> list[str]:
    """What was trained on what, and how good it is; a sentence each, as far as it is known."""
    c = facts.config
    shape = f"{c.model.num_layers} layers, width {c.model.width}, context {c.model.context_length}"
    ways = f" with {c.model.num_ways} ways" if c.model.architecture == "kraken" else ""
    size = _of(facts, "pretrain", "parameters", " and {} parameters")
    lines = [
        f"A {c.model.architecture} model{ways}, {shape}{size}, on {corpus_name(_data_of(facts))}"
        f"{_of(facts, 'pretrain', 'train_tokens', ', trained on {} tokens')}."
    ]
    if facts.metric("evaluate", "validation_loss"):
        names = ("validation_loss", "validation_perplexity", "bits_per_byte")
        loss, perplexity, bits = (_of(facts, "evaluate", name) for name in names)
        lines.append(
            f"Validation loss {loss} nats per token (perplexity {perplexity}, {bits} bits per byte); the unigram "
            f"entropy of the same tokens is {_of(facts, 'prepare', 'unigram_entropy')}."
        )
    return lines


def number(value: int | float) -> str:
    """A number for people; six digits of one that is not whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def size(num_bytes: int) -> str:
    """Bytes for people."""
    amount, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:,.0f} {units[0]}" if units[0] == "B" else f"{amount:,.1f} {units[0]}"


def _of(facts: Facts, kind: str, name: str, words: str = "{}") -> str:
    """A metric in words; empty where there is none."""
    metric = facts.metric(kind, name)
    return words.format(number(metric.value)) if metric else ""


def _data_of(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest("prepare")
    found: dict[str, Any] = manifest.config["data"] if manifest else to_dict(facts.config.data)
    return found


def _quality(facts: Facts) -> list[Block]:
    found = ((words, facts.metric(kind, name)) for kind, name, words in QUALITY)
    rows = [(words, number(metric.value), metric.unit) for words, metric in found if metric]
    if rows and facts.manifest("evaluate"):
        rows.append(("parity: tolerance", number(facts.config.evaluate.parity_tolerance), "nats"))
    return [Table(("", "value", "unit"), rows, frozenset({1}))] if rows else []


def _gates(facts: Facts) -> list[Block]:
    """What the model had to pass before it was deployed, and the version that it became."""
    if not facts.gates:
        return []
    rows = [
        (
            str(result["gate"]),
            str(result["state"]),
            *("" if (value := result.get(name)) is None else number(value) for name in ("value", "champion", "limit")),
            str(result.get("unit", "")),
            str(result["reason"]),
        )
        for result in facts.gates
    ]
    blocks: list[Block] = [
        Table(("gate", "state", "value", "champion's", "limit", "unit", "why"), rows, frozenset({2, 3, 4}))
    ]
    deployed = facts.manifest("deploy")
    if deployed and "version" in deployed.details:
        blocks.append(Text(f"Registered as {deployed.details['version']}."))
    return blocks


def _pictures(figures: Mapping[str, Picture], *names: str) -> list[Block]:
    return [figures[name] for name in names if name in figures]


def _stages(facts: Facts) -> Table:
    rows = [
        (
            stage.kind,
            stage.state,
            f"{stage.work_seconds:,.1f}" if stage.manifest else "",
            f"{stage.seconds:,.1f}" if stage.state in ("made", "reused") else "",
            stage.manifest.created_at if stage.manifest else "",
            stage.fingerprint[:16],
        )
        for stage in facts.stages
    ]
    head = ("stage", "in this run", "seconds of work", "seconds in this run", "made at", "fingerprint")
    return Table(head, rows, frozenset({2, 3}))


def _cost(facts: Facts) -> list[Block]:
    """Device-hours: of training the time on its workers, of other stages the work on one device or process."""
    rows = []
    for stage, manifest in facts.finished():
        num_devices, seconds = 1, manifest.seconds
        if stage.kind == "pretrain":
            num_devices, seconds = int(manifest.value("num_workers")), manifest.value("training_seconds")
        rows.append(
            (stage.kind, number(num_devices), f"{seconds:,.1f}", f"{num_devices * seconds / 3600:,.4f}", stage.state)
        )
    if not rows:
        return []
    table = Table(("stage", "devices", "seconds", "device-hours", "in this run"), rows, frozenset({1, 2, 3}))
    device = "GPU" if facts.config.cluster.gpus_per_worker else "CPU worker"
    return [
        table,
        Text(
            f"A device is a {device} of training; other stages count as one. What is reused was paid for by an earlier "
            "run. Restarts and waiting are not counted."
        ),
    ]


def _data(facts: Facts) -> list[Block]:
    manifest = facts.manifest("prepare")
    if manifest is None:
        return []
    rows = [
        (split, *(_metric(manifest, f"{split}_{name}") for name in DATA_METRICS)) for split in ("train", "validation")
    ]
    data = manifest.config["data"]
    tokenizer = f"{data['tokenizer']} tokenizer with {_metric(manifest, 'vocabulary_ids')} ids"
    name = corpus_name(data)
    corpus = name if name == data["corpus"] else f"{name} ({data['corpus']})"
    return [Table(("split", *DATA_METRICS), rows, frozenset({1, 2, 3})), Text(f"Corpus {corpus}, {tokenizer}.")]


def _metric(manifest: Manifest, name: str) -> str:
    metric: Metric | None = manifest.metrics.get(name)
    return number(metric.value) if metric else ""


def _settings(config: RunConfig) -> Table:
    c, t = config.model, config.train
    rows = [
        ("architecture", c.architecture),
        ("layers, width, heads, ways", f"{c.num_layers}, {c.width}, {c.num_heads}, {c.num_ways}"),
        ("context, vocabulary", f"{c.context_length}, {c.vocab_size}"),
        ("positions, activation", f"{c.positions}, {c.activation}"),
        ("steps, sequences per step", f"{t.steps}, {t.sequences_per_step}"),
        ("optimizer, peak learning rate, warm-up steps", f"{t.optimizer}, {t.learning_rate:g}, {t.num_warmup_steps}"),
        ("precision, seed", f"{t.precision}, {t.seed}"),
    ]
    if config.continue_from:
        rows.append(("continued from", config.continue_from))
    return Table(("setting", "value"), rows)


def _sizes(facts: Facts) -> list[Block]:
    rows = [(stage.kind, str(len(manifest.files)), size(stage.num_bytes)) for stage, manifest in facts.finished()]
    return [Table(("artefact", "files", "size"), rows, frozenset({1, 2}))] if rows else []


def _lineage(facts: Facts) -> list[Block]:
    rows = [
        (
            stage.kind,
            stage.fingerprint[:16],
            ", ".join(f"{kind} {found[:8]}" for kind, found in manifest.parents.items()) or "-",
            without_password(join(facts.config.storage, stage.kind, stage.fingerprint[:16])),
            (manifest.git_revision or "unknown")[:12],
        )
        for stage, manifest in facts.finished()
    ]
    if not rows:
        return []
    blocks: list[Block] = [Table(("artefact", "fingerprint", "made from", "lies in", "commit"), rows)]
    newest = list(facts.finished())[-1][1]
    blocks.append(Text("Libraries: " + ", ".join(f"{name} {version}" for name, version in newest.libraries.items())))
    return blocks


def _reproduce(facts: Facts) -> list[Block]:
    """The commands that make the same artefacts again, or find them."""
    commits = [manifest.git_revision for _, manifest in facts.finished() if manifest.git_revision]
    lines = [f"git checkout {commits[-1]}"] if commits else []
    command = shlex.join(["python", "-m", "jobs.end_to_end", *arguments(facts.config)])
    where = f"Run in MLflow: {facts.page}" if facts.page else ""
    return [Code("\n".join([*lines, command])), *([Text(where)] if where else [])]


def _every_metric(facts: Facts) -> list[Block]:
    rows: list[tuple[str, str, str, str]] = []
    for stage, manifest in facts.finished():
        rows += [(stage.kind, name, number(m.value), m.unit) for name, m in sorted(manifest.metrics.items())]
        rows += _details(stage, manifest.details)
    return [Table(("stage", "metric", "value", "unit"), rows, frozenset({2}))] if rows else []


def _details(stage: StageFacts, details: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """Facts of a manifest that are not numbers, where they are short."""
    for name, value in sorted(details.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) <= 200:
            yield stage.kind, name, text, ""
