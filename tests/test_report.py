"""The report of a pipeline: its numbers are the manifests', all text is escaped, and it needs no network."""

import dataclasses
import html.parser
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from kraken.config import RunConfig, to_dict
from kraken.manifest import FileRecord, Manifest, Metric
from kraken.storage import Storage
from pipelines import description, gates
from pipelines.curves import MOST_POINTS, curve, thinned
from pipelines.report.content import build, number, size
from pipelines.report.document import escaped, to_html, to_markdown
from pipelines.report.facts import Facts, StageFacts, read_gates, read_training_history
from pipelines.report.write import FOLDER, report_location, report_name, write
from pipelines.variation import arguments

EVIL = '<script>alert("x")</script> | **bold** [a](javascript:x) & `'

METRICS: dict[str, dict[str, Metric]] = {
    "prepare": {
        "train_documents": Metric(1234, "documents"),
        "train_bytes": Metric(987654, "bytes"),
        "train_tokens": Metric(345678, "tokens"),
        "validation_tokens": Metric(4567, "tokens"),
        "unigram_entropy": Metric(5.4321987, "nats/token"),
        "vocabulary_ids": Metric(301, "ids"),
    },
    "pretrain": {
        "parameters": Metric(23456, "parameters"),
        "train_tokens": Metric(768, "tokens"),
        "final_validation_loss": Metric(5.0123456, "nats/token"),
        "training_seconds": Metric(3600.0, "s"),
        "num_workers": Metric(4, "processes"),
    },
    "convert": {"parameters": Metric(23456, "parameters")},
    "evaluate": {
        "validation_loss": Metric(5.0987654, "nats/token"),
        "validation_perplexity": Metric(163.7, "1"),
        "bits_per_byte": Metric(2.25, "bits/byte"),
        "parity_max_abs_diff": Metric(4.3e-6, "nats"),
        "odd|metric": Metric(1.5, "<unit>"),
    },
    "deploy": {"replicas": Metric(1, "replicas")},
}
PARENTS = {
    "prepare": (),
    "pretrain": ("prepare",),
    "convert": ("prepare", "pretrain"),
    "evaluate": ("prepare", "pretrain", "convert"),
    "deploy": ("convert", "evaluate"),
}


def fingerprint(kind: str) -> str:
    return kind[:1] * 64


def manifest(config: RunConfig, kind: str) -> Manifest:
    return Manifest(
        kind=kind,
        fingerprint=fingerprint(kind),
        config={"data": to_dict(config.data)},
        parents={parent: fingerprint(parent) for parent in PARENTS[kind]},
        metrics=METRICS[kind],
        details={"note": EVIL},
        files=(FileRecord(path="a", num_bytes=1_500_000, sha256="0"),),
        libraries={"torch": "2.13"},
        git_revision="c" * 40,
        seconds=12.5,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_000_000 + 13 * list(PARENTS).index(kind))),
    )


def facts(storage: str = "/storage", until: str = "deploy", error: str = "", **fields: Any) -> Facts:
    """A finished pipeline, or one that failed at the stage after `until`."""
    config = dataclasses.replace(tiny.config(), storage=storage, **fields)
    stages = []
    for kind, parents in PARENTS.items():
        done = list(PARENTS).index(kind) <= list(PARENTS).index(until)
        stage = StageFacts(kind, fingerprint(kind), parents)
        if done:
            state = "reused" if kind == "prepare" else "made"
            stage = dataclasses.replace(stage, state=state, manifest=manifest(config, kind), seconds=13.0)
        elif error and not any(stage.error for stage in stages):
            stage = dataclasses.replace(stage, state="failed", error=error)
        stages.append(stage)
    return Facts(config, tuple(stages), history(), page="http://127.0.0.1:5000/#/experiments/1/runs/abc")


def history() -> list[dict[str, float]]:
    reports = [{"step": float(s), "tokens": 128.0 * s, "loss": 6.0 - s / 10} for s in range(1, 7)]
    reports[2]["validation_loss"], reports[5]["validation_loss"] = 5.8, 5.4
    return reports


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report's folder."""
    storage = str(tmp_path_factory.mktemp("storage"))
    found = facts(storage, name=f"run {EVIL}")
    paths = write(found, Storage(storage), report_name(found.config.name, found.fingerprints()))
    assert {path.name for path in paths} == {"loss.png", "timeline.png", "graph.png", "report.md", "report.html"}
    assert all(path.stat().st_size > 500 for path in paths)
    return paths[0].parent


def test_every_metric_is_in_both_with_its_unit(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    markdown = (written / "report.md").read_text()
    for kind, metrics in METRICS.items():
        for name, metric in metrics.items():
            row = (kind, name, number(metric.value), metric.unit)
            assert "".join(row) in page.words
            assert "| " + " | ".join(map(escaped, row)) + " |" in markdown
    for text in ("4.0000", "1.5 MB", fingerprint("convert")[:16], "c" * 40, "python -m jobs.end_to_end", "345,678"):
        assert text in page.words and text in markdown
    assert "4.0000" in page.words, "four workers for an hour"


def test_the_page_needs_nothing_and_runs_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("svg") == 3
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert EVIL in page.words
    colours = set(re.findall(r"#[0-9a-f]{6}", text[text.index("</style>") :]))
    assert not colours, "colours of the figures that a dark page would not change"
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for name, value in page.attributes if name == "xlink:href"} <= set(identifiers)


def test_a_failed_run_says_where_and_why() -> None:
    failed = facts(until="convert", error="ArtefactError: parity <failed>")
    document = build(failed, {})
    page, markdown = Page(to_html(document)), to_markdown(document)
    assert "evaluate failed: ArtefactError: parity <failed>" in page.words
    assert "**evaluate failed: ArtefactError: parity \\<failed\\>**" in markdown
    assert "not run" in page.words and "163.7" not in page.words
    described = description.of_pipeline(failed)
    assert "evaluate failed" in described and "| deploy | not run |" in described


def test_the_gates_are_shown_of_a_deployment_and_of_a_refusal(tmp_path: Path) -> None:
    result = gates.Result(
        gate="perplexity", state="failed", reason="3 % <worse>", value=103.5, champion=100.0, limit=101
    )
    results = [dataclasses.asdict(result)]
    storage = Storage(str(tmp_path))
    refused = dataclasses.replace(facts(until="evaluate", error="x").stages[-1], state="failed")
    assert read_gates(storage, refused) == ()
    (storage.folder("deploy", refused.fingerprint) / gates.NAME).write_text(json.dumps(results))
    assert read_gates(storage, refused) == results
    assert read_gates(storage, dataclasses.replace(refused, state="not run")) == ()
    made = facts().stages[-1]
    assert made.manifest is not None
    details = {"gates": results, "version": "models:/kraken/7"}
    made = dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, details=details))
    assert read_gates(storage, made) == results
    shown = dataclasses.replace(facts(), stages=(*facts().stages[:-1], made), gates=results)
    markdown = to_markdown(build(shown, {}))
    assert "| perplexity | failed | 103.5 | 100 | 101 |  | 3 % \\<worse\\> |" in markdown
    assert "Registered as models:/kraken/7." in markdown


def test_a_run_that_has_made_nothing_has_a_report(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny.config(), storage=str(tmp_path))
    stages = tuple(StageFacts(kind, fingerprint(kind), parents) for kind, parents in PARENTS.items())
    paths = write(Facts(config, stages), Storage(str(tmp_path)), "f" * 16)
    assert [path.name for path in paths] == ["graph.png", "report.md", "report.html"]
    assert str(paths[-1]) == report_location(str(tmp_path), "f" * 16)


def test_a_remote_storage_gets_the_report(tmp_path: Path) -> None:
    uri = (tmp_path / "remote").as_uri()
    found = facts(uri)
    write(found, Storage(uri, cache=tmp_path / "cache"), "f" * 16)
    names = {path.name for path in (tmp_path / "remote" / FOLDER / ("f" * 16)).iterdir()}
    assert {"report.html", "report.md", "loss.png"} <= names


def test_descriptions_show_the_result_and_the_command() -> None:
    found = facts()
    described = description.of_pipeline(found, "#/link")
    assert described.startswith("[Report](#/link)\n")
    assert "validation\\_loss" not in described and f"validation_perplexity {number(163.7)}" in described
    command = description.command(found.config, "evaluate")
    assert command.startswith("python -m jobs.evaluate ") and command.endswith(arguments(found.config)[-1])
    of_stage = description.of_stage("evaluate", found.config, found.manifest("evaluate"))
    assert command in of_stage and "bits_per_byte 2.25 bits/byte" in of_stage


def test_numbers_and_sizes() -> None:
    assert [number(v) for v in (1234567, 0.000123456789, 4.3e-6, 12345.678)] == [
        "1,234,567",
        "0.000123457",
        "4.3e-06",
        "12,345.7",
    ]
    assert [size(n) for n in (0, 999, 1000, 2_345_000, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.3 MB",
        "5,000.0 TB",
    ]


def test_a_long_history_is_thinned_and_keeps_its_validations() -> None:
    reports = [{"step": float(step), "loss": 1.0} for step in range(1, 10 * MOST_POINTS)]
    reports[12344]["validation_loss"] = 2.0
    found = thinned(reports)
    assert len(found) <= MOST_POINTS + 2
    assert [found[0], found[-1]] == [reports[0], reports[-1]] and reports[12344] in found
    assert thinned(reports[:7]) == reports[:7]
    assert curve({"step": 3.0, "loss": 1.0, "grad_norm": 2.0, "mfu": 0.5}) == {"loss": 1.0, "mfu": 0.5}


def test_the_history_of_an_unfinished_training_is_its_newest_checkpoints(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_training_history(storage, "f" * 64) == []
    folder = storage.folder("pretrain", "f" * 64)
    for step in (2, 4):
        (folder / f"step_{step:09d}").mkdir()
        (folder / f"step_{step:09d}" / "history.jsonl").write_text(f'{{"step": {step}}}\n')
    assert read_training_history(storage, "f" * 64) == [{"step": 4}]
    (folder / "history.jsonl").write_text("{damaged")
    assert read_training_history(storage, "f" * 64) == [{"step": 4}]
