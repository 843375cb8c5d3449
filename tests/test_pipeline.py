"""The pipeline on a real Ray cluster with real MLflow and real Serve, on a model of a few thousand parameters."""

import contextlib
import dataclasses
import errno
import json
import shlex
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import tiny

from kraken.config import ConfigError, RunConfig
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest
from kraken.storage import Storage, join, local_artefact
from pipelines import champion, clean, deploy, end_to_end, summary
from pipelines.application import http_address
from pipelines.curves import CURVES
from pipelines.errors import ClusterError
from pipelines.lease import Lease
from pipelines.recorder import HEADLINES
from pipelines.registry import Registry
from pipelines.report.content import number
from pipelines.stage import Stage, fingerprints
from pipelines.tracking import NAME_TAG, NOTE_TAG, Tracker
from pipelines.tracking_server import KIND_TAG
from pipelines.variation import arguments
from serve.api_key import ApiKey

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # the first test waits for a whole pipeline

TESTS = Path(__file__).parent


def run_config(storage: Path | str, port: int, workers: int = 1, **train: Any) -> RunConfig:
    """The embedded corpus with a tokenizer of 300 ids, and the small model of `tiny`."""
    config = dataclasses.replace(tiny.config(**({"precision": "float32"} | train)), storage=str(storage))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation_fraction=0.01),
        serve=dataclasses.replace(config.serve, port=port, model_name="tiny"),
        evaluate=dataclasses.replace(config.evaluate, max_windows=4, parity_windows=2, parity_tokens=4),
        cluster=dataclasses.replace(config.cluster, num_workers=workers),
    )


def mlflow_runs(storage: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("kraken")
    return client.search_runs([experiment.experiment_id])


def points_of(client: Any, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def config(storage: Path, free_port: Callable[[], int]) -> RunConfig:
    return run_config(storage, free_port())


@pytest.fixture(scope="module")
def finished(ray_cluster: str, config: RunConfig) -> Iterator[dict[str, end_to_end.StageResult]]:
    from ray import serve as ray_serve

    yield end_to_end.run(config)
    ray_serve.shutdown()


def test_every_stage_leaves_an_artefact_and_a_run(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    assert tuple(finished) == end_to_end.KINDS
    assert not any(result.reused for result in finished.values())
    for kind, result in finished.items():
        folder = storage / kind / result.manifest.fingerprint[:16]
        assert json.loads((folder / MANIFEST_NAME).read_text())["kind"] == kind
        result.manifest.verify(folder)
    runs = mlflow_runs(storage)
    assert {run.info.status for run in runs} == {"FINISHED"}
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert set(children) == set(end_to_end.KINDS)
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values())
    assert parent.data.params["train.steps"] == "6"
    assert parent.data.metrics["perplexity"] == finished["evaluate"].manifest.value("validation_perplexity")
    assert children["pretrain"].data.metrics["parameters"] == parent.data.metrics["parameters"]
    assert float(children["evaluate"].data.metrics["parity_max_abs_diff"]) < 1e-3
    headlines = {name for names in HEADLINES.values() for name in names.values()}
    assert set(parent.data.metrics) == headlines | set(CURVES)


def test_a_person_can_tell_what_a_run_is(finished: dict[str, end_to_end.StageResult], config: RunConfig) -> None:
    runs = mlflow_runs(Path(config.storage))
    [parent] = [run for run in runs if run.data.tags.get(KIND_TAG) == "pipeline"]
    assert (parent.info.run_name, parent.data.tags[NAME_TAG]) == ("tiny", "tiny")
    for run in runs:
        note, job = run.data.tags[NOTE_TAG], run.info.run_name if run is not parent else "end_to_end"
        line = next(line for line in note.splitlines() if line.startswith("python -m jobs."))
        assert line == f"python -m jobs.{job} {shlex.join(arguments(config))}"
        assert all(run.data.tags[f"mlflow.source.{name}"] for name in ("name", "type", "git.commit"))
    evaluated = finished["evaluate"].manifest
    assert f"validation_perplexity {number(evaluated.value('validation_perplexity'))}" in parent.data.tags[NOTE_TAG]
    prepared = finished["prepare"].manifest
    data = [
        ("embedded/train", prepared.fingerprint[:16], "training", prepared.value("train_tokens")),
        ("embedded/validation", prepared.fingerprint[:16], "validation", prepared.value("validation_tokens")),
    ]
    for run in runs:
        inputs = [
            (i.dataset.name, i.dataset.digest, i.tags[0].value, json.loads(i.dataset.profile)["num_elements"])
            for i in run.inputs.dataset_inputs
        ]
        assert sorted(inputs) == (data if run.info.run_name in ("tiny", "prepare", "pretrain") else [])


def test_the_report_shows_what_the_manifests_and_mlflow_have(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    [parent] = [run for run in mlflow_runs(storage) if run.data.tags.get(KIND_TAG) == "pipeline"]
    report = Path(summary.summarise(config, finished)["report"])
    page, markdown = report.read_text(), (report.parent / "report.md").read_text()
    for kind, result in finished.items():
        assert result.manifest.fingerprint[:16] in page
        for name, metric in result.manifest.metrics.items():
            assert f"<td>{kind}</td><td>{name}</td>" in page
            assert f"| {kind} | {name} | {number(metric.value)} | " in markdown
    for name in ("bits_per_byte", "perplexity", "parity_max_abs_diff"):
        assert f'class="number">{number(parent.data.metrics[name])}</td>' in page
    names = {"report.html", "report.md", "loss.png", "timeline.png", "graph.png"}
    assert names <= {item.path for item in client.list_artifacts(parent.info.run_id)}
    stored = client.download_artifacts(parent.info.run_id, "report.html")
    assert Path(stored).read_text() == page
    assert parent.data.tags[NOTE_TAG].startswith(f"[Report](#/experiments/{parent.info.experiment_id}/runs/")


def test_a_deployed_model_is_the_champion_of_the_registry(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    registry = Registry(config.storage)
    [version] = registry.versions("kraken")
    assert (version.number, version.aliases) == (1, ("candidate", "champion"))
    manifests = {kind: result.manifest for kind, result in finished.items()}
    lineage, evaluation = version.lineage, manifests["evaluate"]
    assert [lineage.prepare, lineage.pretrain, lineage.exchange, lineage.evaluate] == [
        manifests[kind].fingerprint for kind in ("prepare", "pretrain", "convert", "evaluate")
    ]
    assert float(lineage.perplexity) == evaluation.value("validation_perplexity")
    assert version.folder() == storage / "convert" / manifests["convert"].fingerprint[:16]
    [event] = registry.history("kraken")
    assert (event.action, event.version, event.previous, event.why) == ("promotion", 1, None, "gates: passed")
    assert event.where == manifests["deploy"].details["endpoint"]
    states = {row["gate"]: row["state"] for row in manifests["deploy"].details["gates"]}
    assert states == {"fingerprint": "passed", "parity": "passed"} | dict.fromkeys(
        ("tokenizer", "perplexity", "latency"), "skipped"
    )
    [run] = [run for run in mlflow_runs(storage) if run.info.run_name == "deploy"]
    assert (run.data.tags["kraken.gates"], run.data.tags["kraken.version"]) == ("passed", "models:/kraken/1")
    assert version.run_id == run.data.tags["mlflow.parentRunId"]


def test_the_registered_model_answers_as_the_endpoint_does(
    finished: dict[str, end_to_end.StageResult],
    config: RunConfig,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Greedily, through MLflow's own loader and through the command line."""
    import mlflow

    from jobs import generate

    prompt = "import os"
    endpoint = finished["deploy"].manifest.details["endpoint"]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = deploy.complete(endpoint, body)
    greedy = ["--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--num-threads", "1"]
    generate.main(["models:/kraken@champion", "--storage", str(storage), "--prompt", prompt, *greedy])
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/kraken@champion", suppress_warnings=True)
    [answer] = model.predict([prompt], params={"max_tokens": 8, "temperature": 0.0})
    assert answer and expected.startswith(answer), "this one ends at the end of a text"


def test_perplexity_on_the_champions_data_is_the_one_that_evaluation_measured(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path, tmp_path: Path
) -> None:
    """As the gate measures it where the data differ, and through another tokenizer over the very same text."""
    from kraken.data.shards import TokenShards
    from kraken.tokenizer import Tokenizer

    lineage = Registry(config.storage).versions("kraken")[0].lineage
    data = storage / "prepare" / lineage.prepare[:16]
    question = champion.Question(
        exchange=lineage.location,
        champion_exchange=lineage.location,
        champion_data=str(data),
        scored_tokens=int(lineage.scored_tokens),
        engine=config.engine,
        wants_perplexity=True,
        wants_latency=False,
    )
    measured = champion.measure(question)["perplexity"]
    assert measured == pytest.approx(finished["evaluate"].manifest.value("validation_perplexity"), rel=1e-6)

    own, num_tokens = Tokenizer.load(data), int(lineage.scored_tokens) + 1
    other = Tokenizer.train([(TESTS / name).read_text() for name in ("tiny.py", "conftest.py")], 280)
    source, _ = champion.validation_tokens(data, other, num_tokens - 1)
    ids = TokenShards(data, "validation", own.num_ids).read(0, num_tokens).tolist()
    assert other.fingerprint != own.fingerprint
    assert other.decode(source.read(0, source.num_tokens).tolist()) == own.decode(ids)
    with pytest.raises(ArtefactError, match="validation tokens, fewer than the 1000000000 scored"):
        champion.validation_tokens(data, own, 10**9)


def test_nothing_of_a_recorded_pipeline_is_cleaned(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    referred = clean.references(config.storage, Registry(config.storage))
    made = {f"{kind}/{result.manifest.fingerprint[:16]}" for kind, result in finished.items()}
    assert made <= referred
    assert not clean.survey(Storage(config.storage), referred).items
    assert clean._served(Storage(config.storage)) == {f"convert/{finished['convert'].manifest.fingerprint[:16]}"}


def test_training_metrics_are_logged_once_per_step(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = {run.info.run_name: run.info.run_id for run in mlflow_runs(storage)}
    assert [point.step for point in client.get_metric_history(runs["pretrain"], "loss")] == [2, 3, 4, 6]
    assert [point.step for point in client.get_metric_history(runs["pretrain"], "validation_loss")] == [3, 6]
    for name in CURVES:
        points, of_pipeline = (points_of(client, runs[run], name) for run in ("pretrain", "tiny"))
        assert points and points == of_pipeline


def test_the_summary_holds_what_it_promises(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    facts = summary.summarise(config, finished)
    summary.write(config, facts)
    written = json.loads((storage / "summary.json").read_text())
    assert written == facts
    promised = "stages parameters train_tokens validation_loss validation_perplexity bits_per_byte unigram_entropy"
    assert {*promised.split(), "parity_max_abs_diff", "endpoint", "completion"} <= written.keys()
    assert all({"seconds", "reused"} <= stage.keys() for stage in written["stages"].values())
    text = summary.render(config, facts)
    assert "curl" in text and facts["endpoint"] in text and "mlflow" in text
    assert deploy.health(config.serve)["exchange_fingerprint"] == finished["convert"].manifest.fingerprint


def test_the_proxy_knows_how_many_replicas_run(finished: dict[str, end_to_end.StageResult], config: RunConfig) -> None:
    from serve.unavailable import running_replicas

    assert running_replicas() == {"/": 1}


def test_a_second_run_reuses_everything(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    assert all(planned.manifest is not None for planned in end_to_end.plan(config))
    again = end_to_end.run(config)
    assert all(result.reused for result in again.values())
    runs = mlflow_runs(storage)
    assert len(runs) == 6 and {run.info.status for run in runs} == {"FINISHED"}
    assert {len(run.inputs.dataset_inputs) for run in runs} == {0, 2}, "a data set is recorded once"
    assert len(Registry(config.storage).versions("kraken")) == len(Registry(config.storage).history("kraken")) == 1


def test_changing_a_setting_reruns_only_what_depends_on_it(
    finished: dict[str, end_to_end.StageResult], config: RunConfig
) -> None:
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    plan = end_to_end.plan(longer)
    assert [planned.manifest is None for planned in plan] == [False, True, True, True, True]
    described = end_to_end.describe(plan)
    assert "pretrain" in described and described.count("would be") == 1 and described.count(" run") == 4
    origin = finished["pretrain"].manifest.fingerprint[:12]
    assert described.splitlines()[-1] == (
        f"pretrain: starts at step 0; training {origin} (train.steps=6) has a checkpoint of step 6 to go on from: "
        f"--continue-from {origin}"
    )
    other_port = dataclasses.replace(config, serve=dataclasses.replace(config.serve, model_name="other"))
    assert [planned.manifest is None for planned in end_to_end.plan(other_port)] == [False] * 4 + [True]


def test_changing_how_a_stage_works_reruns_nothing(
    finished: dict[str, end_to_end.StageResult], config: RunConfig
) -> None:
    """Only the endpoint, which is its settings, is made anew."""
    operation: dict[str, Any] = {
        "log_every": 1,
        "checkpoint_every": 5,
        "keep_checkpoints": 1,
        "sequences_per_microbatch": 1,
        "on_bad_step": "skip",
    }
    quieter = dataclasses.replace(config, train=dataclasses.replace(config.train, **operation))
    assert all(planned.manifest is not None for planned in end_to_end.plan(quieter))
    longer_queue = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_queued_requests=7))
    assert [planned.manifest is None for planned in end_to_end.plan(longer_queue)] == [False] * 4 + [True]


@pytest.mark.slow
def test_more_steps_continue_an_earlier_training(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path
) -> None:
    longer = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=8), continue_from="latest", name="longer"
    )
    plan = end_to_end.plan(longer)
    assert (plan[1].first_step, "continue at step 6" in end_to_end.describe(plan)) == (6, True)
    manifest = end_to_end.run(longer, until="pretrain")["pretrain"].manifest
    origin = f"{finished['pretrain'].manifest.fingerprint}@6"
    assert manifest.config["continue_from"] == origin and manifest.value("steps") == 8
    [run] = [run for run in mlflow_runs(storage) if run.data.tags.get("kraken.continued_from") == origin]
    assert (run.info.run_name, run.info.status) == ("pretrain", "FINISHED")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    whole = points_of(client, run.info.run_id, "loss")
    assert [step for step, _ in whole] == [2, 3, 4, 6, 8]
    assert points_of(client, run.data.tags["mlflow.parentRunId"], "loss") == whole
    assert end_to_end.run(longer, until="pretrain")["pretrain"].reused


def test_failed_parity_refuses_deployment_and_loses_nothing(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[ray.ObjectRef] = []  # all stages have ended; Ray may die of the cancellation of one that has
    monkeypatch.setattr(ray, "cancel", lambda reference, **options: cancelled.append(reference))
    strict = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, parity_tolerance=1e-30))
    with pytest.raises(ArtefactError, match="deployment is refused: parity failed"):
        end_to_end.run(strict)
    assert not cancelled
    runs = mlflow_runs(storage)
    states = {(run.info.run_name, run.info.status) for run in runs}
    assert ("deploy", "FAILED") in states and ("evaluate", "FINISHED") in states
    assert not [state for state in states if state[1] == "RUNNING"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    pipelines = [run for run in runs if run.data.tags.get(NAME_TAG) == "tiny"]
    [failed] = [run for run in pipelines if run.info.status == "FAILED"]
    assert "deploy failed: ArtefactError: deployment is refused" in failed.data.tags[NOTE_TAG]
    assert failed.data.metrics["perplexity"] == finished["evaluate"].manifest.value("validation_perplexity")
    assert "| deploy | failed |" in Path(client.download_artifacts(failed.info.run_id, "report.md")).read_text()
    of_reused, *others = (points_of(client, run.info.run_id, "validation_loss") for run in (failed, *pipelines))
    assert of_reused and all(points == of_reused for points in others), "reused training shows its curve, too"
    [version] = Registry(config.storage).versions("kraken")
    assert (version.tags["kraken.gates"], version.aliases) == ("failed parity", ("candidate", "champion"))
    assert deploy.is_serving(config, finished["deploy"].manifest)


@pytest.mark.slow
def test_two_storages_of_one_server_have_a_run_each(
    finished: dict[str, end_to_end.StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/server.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    configs = [run_config(tmp_path / name, 8000) for name in ("a", "b")]
    for config in (*configs, configs[0]):  # the last is a resumption
        end_to_end.run(config, "prepare")
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("kraken").experiment_id])
    pipelines = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.params["storage"] for run in pipelines} == {config.storage for config in configs}
    assert sorted(run.data.tags["kraken.attempts"] for run in pipelines) == ["1", "2"]
    for run in pipelines:
        children = [child for child in found if child.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        assert [child.data.tags["kraken.artefact"].rsplit("/", 2)[0] for child in children] == [
            run.data.params["storage"]
        ]


def test_the_same_pipeline_twice_at_once_is_recorded_on_the_second_only(
    finished: dict[str, end_to_end.StageResult], config: RunConfig, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {run.info.run_id: run for run in mlflow_runs(storage)}
    tracker = Tracker(config.storage, config.experiment)
    key = tracker.key("pipeline", config.name, fingerprints(end_to_end.STAGES, config))
    monkeypatch.setenv("KRAKEN_SUBMISSION", "job-1")
    with Lease(f"pipeline/{key}"), pytest.raises(ClusterError, match="ray job logs job-1 --follow.*ray job stop job-1"):
        end_to_end.run(config)
    after = {run.info.run_id: run for run in mlflow_runs(storage)}
    for run_id, run in before.items():
        assert after[run_id].info.status == run.info.status
        assert after[run_id].data.tags == run.data.tags
    [refused] = [run for run_id, run in after.items() if run_id not in before]
    assert (refused.info.run_name, refused.info.status) == (f"{config.name} (refused)", "FAILED")
    assert "ray job logs job-1" in refused.data.tags["kraken.error"]


def status_of(config: RunConfig, key: str | None) -> int | None:
    return deploy.status_of_models(config.serve, None if key is None else ApiKey(key))


@pytest.mark.parametrize(
    "num_changes", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["a_first_key", "then_another_and_other_settings"]
)
def test_a_new_key_or_another_deployment_is_never_reused(
    finished: dict[str, end_to_end.StageResult],
    config: RunConfig,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_changes: int,
) -> None:
    """The cluster's processes do not have the key in their environment: it was set after they started."""

    def is_reused(config: RunConfig) -> bool:
        return end_to_end.plan(config)[-1].manifest is not None

    varied = dataclasses.replace(config, serve=dataclasses.replace(config.serve, cpus_per_replica=0.01))
    end_to_end.run(config)  # open, whatever was deployed before
    assert is_reused(config)
    changes = ((varied, "first-key", (None, "wrong")), (config, "second-key", (None, "first-key")))
    for changed, key, others in changes[:num_changes]:
        monkeypatch.setenv("KRAKEN_API_KEY", key)
        assert not is_reused(config)
        results = end_to_end.run(changed)
        assert not results["deploy"].reused and results["evaluate"].reused
        assert [status_of(config, shown) for shown in (*others, key)] == [401, 401, 200]
        assert is_reused(changed)
    other = config if changed is varied else varied
    assert not is_reused(other), "its manifest is there, but the endpoint has the other settings"
    assert "Bearer $KRAKEN_API_KEY" in summary.render(config, summary.summarise(changed, results))
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "code_digest", lambda: "of other code")
        assert not is_reused(changed)
    monkeypatch.delenv("KRAKEN_API_KEY")
    assert not is_reused(changed), "the endpoint asks for a key, and none is configured"

    secrets = [word.encode() for key in ("first-key", "second-key") for word in (key, sha256(key.encode()).hexdigest())]
    for path in storage.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path


def named(config: RunConfig, **fields: Any) -> RunConfig:
    """The same pipeline under another name, with other settings of `serve`."""
    return dataclasses.replace(config, name="other", serve=dataclasses.replace(config.serve, **fields))


def deployed(config: RunConfig) -> Any:
    """The digest that the endpoint shows to those who have the key of the test above."""
    answers = [deploy.health(config.serve, ApiKey(key)) for key in ("first-key", "second-key")]
    return next(answer["deployment"] for answer in answers if answer and "deployment" in answer)


def test_a_name_belongs_to_the_pipeline_that_deployed_under_it(
    finished: dict[str, end_to_end.StageResult], config: RunConfig
) -> None:
    before = deployed(config)
    refused = f"serve.name=kraken belongs to run {config.name} of experiment kraken in storage {config.storage}"
    with pytest.raises(ConfigError, match=rf"{refused}.*--serve.name other.*--serve.replace"):
        end_to_end.run(named(config))
    assert deployed(config) == before


@pytest.mark.slow
def test_another_name_serves_beside_it_and_replacing_takes_the_name(
    finished: dict[str, end_to_end.StageResult], config: RunConfig
) -> None:
    end_to_end.run(config)
    before = deployed(config)
    beside = end_to_end.run(named(config, name="beside"))["deploy"].manifest
    assert beside.details["endpoint"] == f"http://127.0.0.1:{config.serve.port}/beside/v1"
    assert deploy.complete(beside.details["endpoint"], summary.request_body(config))
    assert deploy.is_serving(named(config, name="beside"), beside)
    assert deployed(config) == before

    taken_over = end_to_end.run(named(config, replace=True))["deploy"].manifest
    assert deploy.is_serving(named(config), taken_over)
    assert status_of(config, None) == 200
    with pytest.raises(ConfigError, match="serve.name=kraken belongs to run other"):
        end_to_end.run(config)


@pytest.mark.slow
def test_another_host_restarts_serve_and_a_strange_application_is_not_ended(
    finished: dict[str, end_to_end.StageResult], config: RunConfig
) -> None:
    from ray import serve as ray_serve

    from serve.app import ServeArgs, build

    ray_serve.shutdown()
    end_to_end.run(config)
    host = dataclasses.replace(config, serve=dataclasses.replace(config.serve, host="localhost"))
    args = ServeArgs(exchange=Path(config.storage) / "convert" / finished["convert"].manifest.fingerprint[:16])
    ray_serve.run(build(args), name="strange", route_prefix="/strange")
    with pytest.raises(ConfigError, match="serve.host=localhost.*would end the application strange"):
        end_to_end.run(host)
    ray_serve.delete("strange")
    end_to_end.run(host)
    assert http_address() == ("localhost", config.serve.port)
    end_to_end.run(config)
    assert http_address() == ("127.0.0.1", config.serve.port)


def test_a_port_in_use_is_a_clear_error(finished: dict[str, end_to_end.StageResult], config: RunConfig) -> None:
    elsewhere = dataclasses.replace(config.serve, port=config.serve.port + 1, name="of-nobody")
    busy = dataclasses.replace(config, serve=elsewhere)
    with pytest.raises(ConfigError, match="serve.port"):
        end_to_end.run(busy)


def test_a_port_of_another_program_is_a_clear_error(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    from ray import serve as ray_serve

    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(proxies={}))  # Serve does not run yet
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"serve.port={port} on serve.host=127.0.0.1 cannot be used.*choose another"
        ):
            deploy.require_free_port(dataclasses.replace(config.serve, port=port))
    deploy.require_free_port(dataclasses.replace(config.serve, port=free_port()))


def test_what_deploy_would_refuse_is_said_before_any_work(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, 8000)
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, name="of-nobody"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        busy = dataclasses.replace(config.serve, port=other.getsockname()[1])
        with pytest.raises(ConfigError, match="serve.port"):
            end_to_end.run(dataclasses.replace(config, serve=busy))
    assert not list(tmp_path.glob("prepare/*"))

    def refused(message: str, **sections: dict[str, Any]) -> None:
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
        with pytest.raises(ConfigError, match=message):
            deploy.require_possible(dataclasses.replace(config, **changed))

    monkeypatch.setattr(deploy, "require_free_port", lambda serve: None)
    deploy.require_possible(config)
    need = "serve.num_replicas=2 with serve.cpus_per_replica=2 need more than the cluster has .* room for 1 replicas"
    refused(need, serve={"num_replicas": 2, "cpus_per_replica": 2.0})
    refused("serve.num_replicas=1 with serve.gpus_per_replica=1 need more", serve={"gpus_per_replica": 1.0})
    refused("engine.device=cuda needs a GPU", engine={"device": "cuda"})
    refused("engine.kind=tensorrt_llm is not possible here", engine={"kind": "tensorrt_llm"})
    monkeypatch.setenv("KRAKEN_API_KEY", " ")
    refused("KRAKEN_API_KEY is set but empty")


def test_an_endpoint_needs_a_cluster_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="the endpoint needs a cluster that outlives this command"):
        end_to_end.run(run_config(tmp_path, 8000))


def test_a_full_disk_is_a_clear_error_and_leaves_no_artefact(tmp_path: Path) -> None:
    class Pipeline:
        """Stands for the reference to an MLflow run, of which a stage that fails asks to be described and ended."""

        @contextlib.contextmanager
        def stage(self, *args: object) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(describe=lambda markdown: None)

    def full(work: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = Stage("prepare", parents=(), section=lambda config: {}, work=full)
    config = run_config(tmp_path, 8000)
    with pytest.raises(ArtefactError, match="has no space left for prepare; free some"):
        stage.run(config, "f" * 64, {}, Pipeline())  # type: ignore[arg-type]
    assert stage.find(config, "f" * 64) is None


class TestStorage:
    def test_a_remote_storage_gets_whole_artefacts(self, tmp_path: Path) -> None:
        uri = (tmp_path / "remote").as_uri()
        writer = Storage(uri, cache=tmp_path / "writer")
        folder = writer.folder("prepare", "tiny")
        tiny.prepared(folder)
        reader = Storage(uri, cache=tmp_path / "reader")
        assert reader.find("prepare", "tiny") is None
        writer.publish(folder)
        manifest = reader.find("prepare", "tiny")
        assert manifest is not None
        manifest.verify(reader.folder("prepare", "tiny"))

    def test_an_upload_that_ends_anywhere_leaves_no_artefact(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither a new one nor one in the place of an earlier copy, after however many files."""
        uri = (tmp_path / "remote").as_uri()
        writer = Storage(uri, cache=tmp_path / "writer")
        folder = writer.folder("prepare", "tiny")
        tiny.prepared(folder)
        num_files = sum(path.is_file() for path in folder.rglob("*"))
        publish_as, left = Storage.publish_as, 0

        def killed(self: Storage, path: Path, target: Path) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            publish_as(self, path, target)

        def find() -> Manifest | None:
            reader = Storage(uri, cache=tmp_path / f"reader_{len([*tmp_path.iterdir()])}")
            reader.folder("prepare", "other")
            return reader.find("prepare", "tiny")

        monkeypatch.setattr(Storage, "publish_as", killed)
        for _ in range(2):
            for num_uploaded in range(num_files):
                left = num_uploaded
                with pytest.raises(KeyboardInterrupt):
                    Storage(uri, cache=tmp_path / "writer").publish(folder)
                assert find() is None, num_uploaded
            left = num_files
            Storage(uri, cache=tmp_path / "writer").publish(folder)
            assert find() is not None

    def test_an_artefact_is_opened_by_its_location(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        uri = (tmp_path / "remote").as_uri()
        writer = Storage(uri, cache=tmp_path / "writer")
        folder = writer.folder("convert", "tiny")
        tiny.prepared(folder)
        with pytest.raises(ArtefactError, match="holds no finished artefact"):
            local_artefact(writer.location("convert", "tiny"))
        writer.publish(folder)
        local = local_artefact(writer.location("convert", "tiny"))
        Manifest.read(local).verify(local)
        assert local == Storage(uri).root / "convert" / "tiny"
        assert local_artefact(str(folder)) == folder
        for uri in ("s3://bucket", "s3://bucket/convert", "s3://"):
            with pytest.raises(ArtefactError, match="is no artefact"):
                local_artefact(uri)

    def test_a_copy_that_lost_files_is_fetched_again(self, tmp_path: Path) -> None:
        uri = (tmp_path / "remote").as_uri()
        writer = Storage(uri, cache=tmp_path / "writer")
        tiny.prepared(writer.folder("prepare", "tiny"))
        writer.publish(writer.folder("prepare", "tiny"))
        reader = Storage(uri, cache=tmp_path / "reader")
        reader.fetch("prepare", "tiny")
        folder = reader.folder("prepare", "tiny")
        next(folder.glob("train_*.bin")).unlink()
        reader.fetch("prepare", "tiny")
        Manifest.read(folder).verify(folder)

    def test_the_query_of_a_uri_stays_at_its_end(self) -> None:
        uri = "s3://bucket/prefix?endpoint_override=http://minio:9000"
        assert join(uri, "convert", "x") == "s3://bucket/prefix/convert/x?endpoint_override=http://minio:9000"
        assert join("/data/kraken", "convert") == "/data/kraken/convert"

    def test_a_storage_that_does_not_answer_is_not_an_empty_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = Storage((tmp_path / "remote").as_uri(), cache=tmp_path / "cache")

        def away(*arguments: object) -> bool:
            raise OSError("Couldn't connect to server")

        monkeypatch.setattr(storage, "_download", away)
        with pytest.raises(ArtefactError, match="check that this node reaches the storage"):
            storage.find("prepare", "f" * 64)

    def test_the_newest_remote_checkpoint_is_fetched(self, tmp_path: Path) -> None:
        from kraken.checkpoint.reader import newest_checkpoint
        from kraken.training.train import train

        uri = (tmp_path / "remote").as_uri()
        writer = Storage(uri, cache=tmp_path / "writer")
        tiny.prepared(tmp_path / "data")
        run_folder = writer.folder("pretrain", "f" * 64)
        train(tiny.config(steps=4), tmp_path / "data", run_folder)
        for checkpoint in run_folder.glob("step_*"):
            writer.publish(checkpoint)
        reader = Storage(uri, cache=tmp_path / "reader")
        fetched = reader.folder("pretrain", "f" * 64)
        reader.fetch_checkpoints(fetched)
        newest = newest_checkpoint(fetched)
        assert newest is not None and newest.name == "step_000000004"

    def test_a_relative_or_unknown_storage_is_refused(self) -> None:
        with pytest.raises(ArtefactError, match="is relative"):
            Storage("storage")
        with pytest.raises(ArtefactError, match="cannot be opened"):
            Storage("nosuch://bucket")

    def test_a_half_written_artefact_does_not_exist(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        folder = storage.folder("prepare", "tiny")
        tiny.prepared(folder)
        assert storage.find("prepare", "tiny") is not None
        shard = next(folder.glob("train_*.bin"))
        shard.write_bytes(shard.read_bytes()[:-2])
        assert storage.find("prepare", "tiny") is None
        (folder / MANIFEST_NAME).write_text("{")
        assert storage.find("prepare", "tiny") is None
        (folder / MANIFEST_NAME).unlink()
        assert storage.find("prepare", "tiny") is None
