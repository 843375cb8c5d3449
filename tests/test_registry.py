"""The registry and the gates with real models, MLflow and engines, in one process: everything of a pipeline but Ray."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs import registry as command_line
from kraken.config import ConfigError, RunConfig, to_dict
from kraken.manifest import ArtefactError, Manifest, finish_artefact
from kraken.storage import Storage
from kraken.training.train import train
from pipelines import clean, convert, deploy, end_to_end, evaluate, gates, lineage, registered
from pipelines.approval import Approval, approve
from pipelines.registry import Lineage, Reference, Registry, Version
from pipelines.stage import Work, fingerprints
from pipelines.tracking import PipelineRun, Tracker

DATA = "d" * 64
"""Fingerprint of the prepared data."""


def run_config(storage: Path, **train: Any) -> RunConfig:
    config = dataclasses.replace(tiny.config(**({"precision": "float32"} | train)), storage=str(storage))
    settings = {"max_windows": 4, "parity_windows": 2, "parity_tokens": 4}
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **settings))


class Pipeline:
    """A pipeline up to evaluation, its stages' work done here, and the approval with which deployment begins."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.found = fingerprints(end_to_end.STAGES, config, {"prepare": DATA})
        self.manifests: dict[str, Manifest] = {}
        with self._run() as run:
            self._prepare()
            self._pretrain()
            for stage in (convert.STAGE, evaluate.STAGE):
                parents = {kind: self.manifests[kind] for kind in stage.parents}
                self.manifests[stage.kind] = stage.run(config, self.found[stage.kind], parents, run.ref)

    @contextmanager
    def _run(self) -> Iterator[PipelineRun]:
        tracker = Tracker(self.config.storage, self.config.experiment)
        with tracker.pipeline(tracker.key("pipeline", "tiny", self.found), "tiny", {}) as run:
            yield run

    def _prepare(self) -> None:
        folder = Storage(self.config.storage).folder("prepare", DATA)
        if not (folder / "manifest.json").is_file():
            manifest = tiny.prepared(folder, self.config)
            section = {"data": to_dict(self.config.data)}
            dataclasses.replace(manifest, fingerprint=DATA, config=section).write(folder)
        self.manifests["prepare"] = Manifest.read(folder)

    def _pretrain(self) -> None:
        storage = Storage(self.config.storage)
        folder = storage.folder("pretrain", self.found["pretrain"])
        metrics = train(self.config, storage.folder("prepare", DATA), folder)
        self.manifests["pretrain"] = finish_artefact(
            folder,
            started_at=0.0,
            kind="pretrain",
            fingerprint=self.found["pretrain"],
            config=lineage.section(self.config),
            parents={"prepare": DATA},
            metrics=metrics,
        )

    def approve(self, **fields: Any) -> Approval:
        """Judge the gates, and make the model the champion if it passes.

        Args:
            fields: of `GatesConfig`.
        """
        config = dataclasses.replace(self.config, gates=dataclasses.replace(self.config.gates, **fields))
        storage = Storage(config.storage)
        folder = storage.folder("deploy", self.found["deploy"])
        parents = {kind: self.manifests[kind] for kind in deploy.STAGE.parents}
        with self._run() as run, run.ref.stage("deploy", "deploy", {}) as stage:
            work = Work(config, self.found["deploy"], storage, folder, parents, stage)
            approval = approve(work, lambda function, question: function(question))
            approval.promote(work, "http://127.0.0.1:1/v1")
        return approval


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def good(storage: Path) -> Pipeline:
    """The first model, and champion."""
    pipeline = Pipeline(run_config(storage, steps=12))
    pipeline.approve()
    return pipeline


@pytest.fixture(scope="module")
def bad(good: Pipeline, storage: Path) -> Pipeline:
    """A model of the same data that has hardly learnt anything."""
    return Pipeline(run_config(storage, steps=1, learning_rate=1e-6, warmup_steps=0))


def version(storage: Path, number: int) -> Version:
    return Registry(str(storage)).resolve(f"models:/kraken/{number}")


def perplexity(pipeline: Pipeline) -> float:
    return pipeline.manifests["evaluate"].value("validation_perplexity")


def test_a_version_leads_back_to_its_data(good: Pipeline, storage: Path) -> None:
    found = version(storage, 1)
    assert found.aliases == ("candidate", "champion")
    assert (found.lineage.prepare, found.lineage.pretrain, found.lineage.exchange, found.lineage.evaluate) == tuple(
        good.found[kind] for kind in ("prepare", "pretrain", "convert", "evaluate")
    )
    assert float(found.lineage.perplexity) == perplexity(good)
    assert found.folder() == storage / "convert" / good.found["convert"][:16]


def test_a_version_is_the_run_that_made_it(good: Pipeline, storage: Path) -> None:
    """Its settings, read back from manifests and tags, have the very fingerprints."""
    opened = registered.open_version("models:/kraken@champion", str(storage))
    assert opened.identify(opened.config) == good.found
    assert (opened.config.model, opened.config.engine) == (good.config.model, good.config.engine)
    other = dataclasses.replace(opened.config, train=dataclasses.replace(opened.config.train, steps=9))
    with pytest.raises(ConfigError, match="train differs from that of models:/kraken/1"):
        opened.identify(other)
    float32 = dataclasses.replace(opened.config, engine=dataclasses.replace(opened.config.engine, dtype="float32"))
    found = opened.identify(float32)
    assert [kind for kind in end_to_end.KINDS if found[kind] != good.found[kind]] == ["evaluate", "deploy"]
    planned = end_to_end.plan(float32, "evaluate", found)
    assert [p.stage.kind for p in planned if p.manifest is None] == ["evaluate"], "nothing is trained"


def test_the_same_model_again_makes_no_second_version(good: Pipeline, storage: Path) -> None:
    registry = Registry(str(storage))
    before = registry.history("kraken")
    results = good.approve().results
    assert {r.gate: r.reason for r in results}["perplexity"] == "this model is the champion"
    assert [v.number for v in registry.versions("kraken")] == [1]
    assert registry.history("kraken") == before
    assert [(event.action, event.version, event.why) for event in before] == [("promotion", 1, "gates: passed")]


def test_a_worse_model_is_refused_forced_and_replaced(
    good: Pipeline, bad: Pipeline, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, increase = Registry(str(storage)), perplexity(bad) / perplexity(good) - 1
    assert increase > 0.02
    with pytest.raises(ArtefactError) as refused:
        bad.approve()
    assert f"{increase:.2%} above" in str(refused.value) and "models:/kraken/1 stays in production" in str(
        refused.value
    )
    assert [v.number for v in registry.versions("kraken")] == [1]
    assert "failed perplexity" in {run.data.tags.get(gates.GATES_TAG) for run in runs(storage)}

    bad.approve(force=("perplexity=a drill",), reason="to see what happens")
    forced = version(storage, 2)
    assert forced.aliases == ("candidate", "champion") and forced.tags[gates.GATES_TAG] == "forced perplexity"
    good.approve(max_perplexity_increase=0.0, reason="the drill is over")  # a better one passes
    assert [(e.action, e.version, e.previous, e.why) for e in registry.history("kraken")] == [
        ("promotion", 1, None, "gates: passed"),
        ("promotion", 2, 1, "to see what happens (gates: forced perplexity)"),
        ("rollback", 1, 2, "the drill is over"),
    ]
    capsys.readouterr()
    command_line.main(["list", "--storage", str(storage)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["version", "alias"], ["2", "-"], ["1", "candidate,champion"]]
    command_line.main(["history", "--storage", str(storage)])
    assert "the drill is over" in capsys.readouterr().out.splitlines()[3]
    assert command_line._before(registry, "kraken") == "models:/kraken/2"


def runs(storage: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("kraken").experiment_id]))


def test_mlflow_loads_a_version_and_answers_as_the_engine_does(
    good: Pipeline, storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedily, so that MLflow's loader and `jobs.generate` give one text."""
    import mlflow

    from jobs import generate

    greedy = ["--max-tokens", "8", "--temperature", "0", "--num-threads", "1"]
    generate.main(["models:/kraken/1", "--storage", str(storage), "--prompt", "import os", *greedy])
    expected = capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/kraken@champion", suppress_warnings=True)
    params = {"max_tokens": 8, "temperature": 0.0}
    assert model.predict(["import os", "def main"], params=params)[0] == expected
    [cut] = model.predict(["import os"], params=params | {"stop": [expected[2:]]})
    assert cut == expected[: expected.find(expected[2:])]


def test_two_writers_make_one_version_and_lose_no_event(good: Pipeline, storage: Path) -> None:
    from mlflow.exceptions import MlflowException

    found = version(storage, 1)
    first, second = (dataclasses.replace(found.lineage, exchange=digit * 64) for digit in "12")

    def register(lineage: Lineage) -> Version:
        settings = {"dtype": "auto", "quantization": "none"}
        return Registry(str(storage)).register("twice", lineage, settings, found.run_id)

    with ThreadPoolExecutor(2) as pool:
        made = [*pool.map(register, (first, first))]
        assert [version.number for version in made] == [1, 1]
        versions = [made[0], register(second)]
        [*pool.map(lambda version: Registry(str(storage)).promote(version, "a race"), versions)]
    registry = Registry(str(storage))
    assert {(event.version, event.why) for event in registry.history("twice")} == {(1, "a race"), (2, "a race")}
    current = registry.champion("twice")
    assert current is not None and registry.resolve("models:/twice@champion") == current
    # chance decides whether the two collide at the alias: what the second is told then
    client, refusals = registry._client, [False, True]
    set_alias = client.set_registered_model_alias

    def refused_once(*args: str) -> None:
        if refusals.pop():
            raise MlflowException("UNIQUE constraint failed: registered_model_aliases.alias")
        set_alias(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "set_registered_model_alias", refused_once)
        registry.promote(versions[0], "after a refusal")
    champion = registry.champion("twice")
    assert champion is not None and champion.number == 1
    with pytest.raises(ArtefactError, match=f"models:/twice/1 is the model {'1' * 16}, and .* holds"):
        versions[0].folder()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:/kraken", "models:/kraken names no model; write models:/NAME/VERSION or models:/NAME@champion"),
        ("models:/kraken/9", "models:/kraken/9: kraken has no version 9; its newest versions are .*, its aliases"),
        ("models:/kraken@best", "kraken has no alias best; its newest versions are .* champion \\(version"),
        ("models:/nosuch/1", "models:/nosuch/1: no model is registered as nosuch at .*; the names there are: kraken"),
    ],
)
def test_what_is_not_registered_is_refused_with_what_is(good: Pipeline, storage: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Registry(str(storage)).resolve(text)


def test_a_reference_has_a_version_or_an_alias() -> None:
    assert Reference.parse("models:/kraken/7") == Reference("kraken", 7, None)
    assert Reference.parse("models:/kraken-2.b@champion") == Reference("kraken-2.b", None, "champion")


def test_damaged_weights_are_never_deployed(good: Pipeline, storage: Path) -> None:
    [weights] = (storage / "convert" / good.found["convert"][:16]).glob("model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(ArtefactError, match="model.safetensors does not match its hash.*run the stages again"):
            good.approve(force=("perplexity=a drill", "parity=a drill"))
    finally:
        weights.write_bytes(content)


def test_what_runs_and_aliases_refer_to_is_not_cleaned(good: Pipeline, bad: Pipeline, storage: Path) -> None:
    """The last of these tests: it deletes the runs, and then what only they referred to."""
    from mlflow import MlflowClient

    registry, client = Registry(str(storage)), MlflowClient(f"sqlite:///{storage}/mlflow.db")
    if len(registry.versions("kraken")) == 1:
        bad.approve(force=("perplexity=a drill",))
        good.approve()
    survey = clean.survey(Storage(str(storage)), clean.references(str(storage), registry))
    made = {f"{kind}/{p.found[kind][:16]}" for p in (good, bad) for kind in ("prepare", "pretrain", "convert")}
    assert made <= survey.kept and not [item for item in survey.items if item.what == "unreferenced"]
    for run in runs(storage):
        client.delete_run(run.info.run_id)
    survey = clean.survey(Storage(str(storage)), clean.references(str(storage), registry))
    gone = {item.name for item in survey.items if item.what == "unreferenced"}
    assert gone == {f"{kind}/{bad.found[kind][:16]}" for kind in ("pretrain", "convert", "evaluate")}
    clean.remove(Storage(str(storage)), survey.items, lambda item: None)
    assert version(storage, 1).folder().is_dir()
    with pytest.raises(ArtefactError, match="models:/kraken/2 is registered, but its model was removed from"):
        version(storage, 2).folder()
    assert "removed from" in command_line.state(version(storage, 2))
