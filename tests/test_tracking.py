"""Tracking against the real MLflow: one sqlite database for the module, and one real server."""

import asyncio
import concurrent.futures
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest

from kraken.config import ConfigError
from pipelines import outbox, summary, tracking, tracking_server
from pipelines.tracking import RunRef, StageRun, Tracker, end_status
from pipelines.tracking_server import tracking_uri, ui_command

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("a storage"))  # a space in a path must do no harm


@pytest.fixture(scope="module")
def tracker(storage: str) -> Tracker:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracker(storage, submission="raysubmit_1")


@pytest.fixture(scope="module")
def client(tracker: Tracker) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracker.tracking_uri)


@pytest.fixture
def ref(tracker: Tracker, request: pytest.FixtureRequest) -> Iterator[RunRef]:
    """The pipeline of one test, running."""
    with tracker.pipeline(request.node.nodeid, "pipeline") as run:
        yield run.ref


def runs_where(tracker: Tracker, client: "MlflowClient", condition: str) -> "list[Run]":
    return list(client.search_runs([tracker.experiment_id], condition))


def left_running(tracker: Tracker, key: str, tags: dict[str, str], parent: str | None = None) -> str:
    """A run whose process was gone before it could end the run."""
    tags = tags | ({tracking.PARENT_TAG: parent} if parent else {})
    run = StageRun(tracker.tracking_uri, tracker.experiment_id, key, "crashed", {}, tags)
    assert run.flush()
    run.abandon()
    return run.run_id


def steps(client: "MlflowClient", run_id: str, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, metric)]


def test_import_is_cheap() -> None:
    code = "import sys, pipelines.tracking; print([m for m in ('mlflow', 'ray', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_pipeline_is_a_tree_of_runs(tracker: Tracker, client: "MlflowClient", tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    with tracker.pipeline("tree", "quickstart", {"model": {"width": 64, "bias": False}}) as run:
        with run.stage("prepare", "prepare") as prepare:
            prepare.log_manifest(manifest, artefact="s3://bucket/tokens/1", reused=True)
        with pickle.loads(pickle.dumps(run.ref)).stage("pretrain", "pretrain") as pretrain:
            pretrain.log_metrics({"loss": 2.5}, step=10)
            pretrain.log_text("hello", "notes/hello.txt")
            assert pretrain.flush()
            assert client.get_run(pretrain.run_id).info.status == "RUNNING"
        assert client.get_run(run.run_id).info.status == "RUNNING"

    parent = client.get_run(run.run_id)
    assert (parent.info.run_name, parent.info.status) == ("quickstart", "FINISHED")
    assert parent.data.params == {"model.width": "64", "model.bias": "false"}
    assert parent.data.tags[tracking.SUBMISSION_TAG] == "raysubmit_1"
    children = runs_where(tracker, client, f"tags.`{tracking.PARENT_TAG}` = '{run.run_id}'")
    assert {child.info.run_name: child.info.status for child in children} == dict.fromkeys(
        ("prepare", "pretrain"), "FINISHED"
    )
    tags = client.get_run(prepare.run_id).data.tags
    assert (tags[tracking.ARTEFACT_TAG], tags[tracking.REUSED_TAG]) == ("s3://bucket/tokens/1", "true")
    assert [item.path for item in client.list_artifacts(prepare.run_id)] == ["manifest.json"]
    assert [item.path for item in client.list_artifacts(pretrain.run_id, "notes")] == ["notes/hello.txt"]
    assert client.get_run(pretrain.run_id).data.metrics == {"loss": 2.5}


def test_a_key_has_one_run_however_often_it_is_opened(tracker: Tracker, client: "MlflowClient") -> None:
    opened = []
    for attempt in ("1", "2"):
        with tracker.pipeline("again", "pipeline") as run, run.stage("s", "stage") as stage:
            assert stage.flush()
            opened.append((run.run_id, stage.run_id))
            for run_id in opened[-1]:
                assert client.get_run(run_id).info.status == "RUNNING"
                assert client.get_run(run_id).data.tags[tracking.ATTEMPTS_TAG] == attempt
    with tracker.pipeline("another", "pipeline") as other, other.stage("s", "stage") as theirs:
        pass
    assert opened[0] == opened[1]
    assert {other.run_id, theirs.run_id}.isdisjoint(opened[0])


def test_a_key_has_one_run_when_two_open_it_at_once(ref: RunRef, tracker: Tracker, client: "MlflowClient") -> None:
    start = threading.Barrier(4)
    run_ids = []

    def open_stage() -> None:
        start.wait()
        with ref.stage("same", "stage") as stage:
            stage.flush()
            run_ids.append(stage.run_id)

    threads = [threading.Thread(target=open_stage) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run_ids) == 4
    assert len(set(run_ids)) == 1
    assert len(runs_where(tracker, client, f"tags.`{tracking.PARENT_TAG}` = '{ref.run_id}'")) == 1


def test_a_twin_made_by_another_machine_is_removed(
    ref: RunRef, client: "MlflowClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock reaches another machine: it makes the same run between the look-up and the creation."""
    twins = []
    create_run = type(client).create_run

    def create_twice(self: "MlflowClient", *args: object, **kwargs: object) -> "Run":
        twins.append(create_run(self, *args, **kwargs))  # type: ignore[arg-type]
        time.sleep(0.002)  # MLflow's times are milliseconds
        return create_run(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(client), "create_run", create_twice)
    with ref.stage("twin", "stage") as stage:
        pass
    assert stage.run_id == twins[0].info.run_id
    key = client.get_run(stage.run_id).data.tags[tracking.KEY_TAG]
    assert len(client.search_runs([ref.experiment_id], f"tags.`{tracking.KEY_TAG}` = '{key}'")) == 1


def test_cancellations_are_told_from_errors() -> None:
    from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError

    in_a_task = RayTaskError("f", "a traceback", TaskCancelledError())
    killed = (KeyboardInterrupt(), SystemExit(1), asyncio.CancelledError(), concurrent.futures.CancelledError())
    for error in (*killed, TaskCancelledError(), in_a_task, in_a_task.as_instanceof_cause()):
        assert end_status(error) == "KILLED", error
    for error in (ValueError(), WorkerCrashedError(), RayTaskError("f", "a traceback", ValueError())):
        assert end_status(error) == "FAILED", error


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("loss is nan\nat step 3"), "FAILED", "ValueError: loss is nan"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
    ],
)
def test_a_run_ends_as_its_block_ends(
    tracker: Tracker, client: "MlflowClient", error: BaseException, status: str, reason: str
) -> None:
    key = f"ends {status}"
    with pytest.raises(type(error)), tracker.pipeline(key, "pipeline") as run:
        with run.stage("before", "stage") as before:
            pass
        crashed = left_running(tracker, "crashed", run.ref.tags, parent=run.run_id)
        with run.stage("failing", "stage") as failing:
            failing.log_metrics({"loss": 1.0}, step=1)
            raise error
    ends = {name: client.get_run(r.run_id) for name, r in {"run": run, "before": before, "failing": failing}.items()}
    assert {name: end.info.status for name, end in ends.items()} == {
        "run": status,
        "before": "FINISHED",
        "failing": status,
    }
    assert client.get_run(crashed).info.status == status
    assert ends["run"].data.tags[tracking.ERROR_TAG] == ends["failing"].data.tags[tracking.ERROR_TAG] == reason
    assert steps(client, failing.run_id, "loss") == [1]

    with tracker.pipeline(key, "pipeline") as run:
        pass
    end = client.get_run(run.run_id)
    assert end.info.status == "FINISHED"
    assert tracking.ERROR_TAG not in end.data.tags


def test_a_process_that_gets_sigterm_leaves_its_stage_killed(ref: RunRef, client: "MlflowClient") -> None:
    code = """
import pickle, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray's drivers do
with pickle.loads(bytes.fromhex(sys.argv[1])).stage("sigterm", "stage") as stage:
    stage.log_metrics({"loss": 1.0}, step=1)
    print(stage.run_id, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, pickle.dumps(ref).hex()], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.terminate()
    assert process.wait(30) == 15
    assert client.get_run(run_id).info.status == "KILLED"
    assert steps(client, run_id, "loss") == [1]


def test_reconcile_ends_what_dead_submissions_left_running(
    tracker: Tracker, client: "MlflowClient", storage: str
) -> None:
    left = {}
    for submission in ("alive", "stopped", "broken"):
        tags = {tracking.SUBMISSION_TAG: submission}
        run_id = left_running(tracker, f"of {submission}", tags)
        left[submission] = (run_id, left_running(tracker, f"stage of {submission}", tags, parent=run_id))
    ends: dict[str, tracking.EndStatus] = {"stopped": "KILLED", "broken": "FAILED"}
    assert set(tracker.reconcile(ends.get)) == {*left["stopped"], *left["broken"]}
    for submission, status in {"alive": "RUNNING", **ends}.items():
        assert [client.get_run(run_id).info.status for run_id in left[submission]] == [status] * 2
    assert tracker.reconcile(ends.get) == []
    with Tracker(storage, submission="alive").pipeline("of alive", "pipeline"):
        pass
    assert [client.get_run(run_id).info.status for run_id in left["alive"]] == ["FINISHED"] * 2


def test_users_and_storages_of_one_server_have_runs_of_their_own(
    client: "MlflowClient", tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.tracking_uri)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    found: dict[tuple[str, str], str] = {}
    for attempt in range(2):  # the second time is a resumption
        for user in ("ada", "grace"):
            for name in ("a", "b"):
                monkeypatch.setenv("KRAKEN_USER", user)
                theirs = Tracker(str(tmp_path / name))
                key = theirs.key("pipeline", "quickstart", {"prepare": "f" * 64})
                with theirs.pipeline(key, "quickstart") as run, run.stage("s", "stage") as stage:
                    stage.log_metrics({"loss": float(attempt)}, step=attempt)
                assert found.setdefault((user, name), run.run_id) == run.run_id
                assert steps(client, stage.run_id, "loss") == list(range(attempt + 1))
                for run_id in (run.run_id, stage.run_id):
                    logged = client.get_run(run_id)
                    assert logged.data.tags[tracking.STORAGE_TAG] == str(tmp_path / name)
                    assert logged.data.tags[tracking.USER_TAG] == logged.info.user_id == user
                    assert logged.data.tags[tracking.SOURCE_NAME_TAG]
    assert len(set(found.values())) == 4


def test_the_user_is_the_one_who_submits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KRAKEN_USER", "MLFLOW_TRACKING_USERNAME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value, user in (
        ("LOGNAME", "account", "account"),
        ("MLFLOW_TRACKING_URI", "http://of-the-uri:secret@host:5000", "of-the-uri"),
        ("MLFLOW_TRACKING_USERNAME", "of-mlflow", "of-mlflow"),
        ("KRAKEN_USER", "ada", "ada"),
    ):
        monkeypatch.setenv(name, value)
        assert tracking.submitter() == user


def test_reconcile_leaves_other_storages_alone(
    tracker: Tracker, client: "MlflowClient", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their submissions are of clusters that this one knows nothing of."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.tracking_uri)
    other = Tracker(str(tmp_path), submission="elsewhere")
    with other.pipeline("elsewhere", "pipeline") as run:
        assert tracker.reconcile({"elsewhere": "FAILED"}.get) == []  # type: ignore[arg-type]
        assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_process_that_was_replaced_does_not_end_the_run(tracker: Tracker, client: "MlflowClient") -> None:
    """It stood still until another attempt took its run over, and fails when it wakes up."""
    tags = {tracking.SUBMISSION_TAG: "first"}
    first = tracking.PipelineRun(tracker.tracking_uri, tracker.experiment_id, "replaced", "pipeline", {}, tags)
    assert first.flush()
    with tracker.pipeline("replaced", "pipeline") as second, second.stage("s", "stage") as stage:
        first.end("FAILED", "the workers are gone")
        for run in (second, stage):
            logged = client.get_run(run.run_id)
            assert logged.info.status == "RUNNING"
            assert tracking.ERROR_TAG not in logged.data.tags
    assert second.run_id == first.run_id
    assert client.get_run(second.run_id).info.status == "FINISHED"


def test_a_description_that_a_person_has_edited_stays(tracker: Tracker, client: "MlflowClient") -> None:
    with tracker.pipeline("described", "pipeline") as run:
        for text, edited, shown in (("a", None, "a"), ("b", None, "b"), ("c", "mine", "mine"), ("d", None, "mine")):
            if edited:
                client.set_tag(run.run_id, tracking.NOTE_TAG, edited)
            run.describe(text)
            assert run.flush()
            assert client.get_run(run.run_id).data.tags[tracking.NOTE_TAG] == shown


def test_a_data_set_is_recorded_once_and_can_be_found_again(
    tracker: Tracker, client: "MlflowClient", tmp_path: Path
) -> None:
    import mlflow.data

    record = tracking.DatasetRecord("corpus/train", "f" * 16, str(tmp_path), "training", {"num_rows": 3})
    for _ in range(2):
        with tracker.pipeline("data", "pipeline") as run:
            run.log_datasets([record])
    [found] = client.get_run(run.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.dataset.profile) == (
        record.name,
        "f" * 16,
        '{"num_rows": 3}',
    )
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]
    assert mlflow.data.get_source(found.dataset).uri == str(tmp_path)


def test_the_link_to_the_runs_opens_a_list_that_the_experiment_holds(tracker: Tracker, client: "MlflowClient") -> None:
    """Of the UI only this is known here: where it looks for the view, and the names of columns."""
    page = tracking_server.runs_page("http://ada:secret@host:5000/", tracker.experiment_id)
    key = page.partition("viewStateShareKey=")[2].partition("&")[0]
    assert page.startswith(f"http://***@host:5000/#/experiments/{tracker.experiment_id}/runs?")
    state = client.get_experiment(tracker.experiment_id).tags[f"mlflow.sharedViewState.{key}"]
    view = json.loads(state)
    assert len(state) < 5000
    with tracker.pipeline("listed", "listed") as run:
        run.set_tags({tracking_server.KIND_TAG: "pipeline"})
    assert [found.info.run_id for found in runs_where(tracker, client, view["searchFilter"])] == [run.run_id]
    client.set_experiment_tag(tracker.experiment_id, tracking_server.VIEW_TAG, "of an earlier version")
    server = tracking_server.TrackingServer(tracker._server._storage)
    assert server.experiment_id("kraken") == tracker.experiment_id
    assert json.loads(client.get_experiment(tracker.experiment_id).tags[tracking_server.VIEW_TAG]) == view
    assert ("kraken", tracker.experiment_id) in server.experiments()


def test_a_finished_run_has_no_error(tracker: Tracker, client: "MlflowClient") -> None:
    with tracker.pipeline("mended", "pipeline") as run:
        client.set_tag(run.run_id, tracking.ERROR_TAG, "of another process")
    logged = client.get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert tracking.ERROR_TAG not in logged.data.tags


def test_no_metric_has_a_step_twice(ref: RunRef, client: "MlflowClient") -> None:
    with ref.stage("steps", "stage") as stage:
        for step in (10, 20, 20, 10, 30):
            stage.log_metrics({"loss": float(step)}, step)
        stage.log_metrics({"validation_loss": 5.0}, step=30)  # another metric of a step already seen
        stage.log_metrics({"loss": float("nan"), "gain": float("inf")}, step=31)
    with ref.stage("steps", "stage") as stage:  # restarted from a checkpoint at step 20
        for step in (30, 31, 40):
            stage.log_metrics({"loss": -1.0, "validation_loss": -1.0}, step)
    assert steps(client, stage.run_id, "loss") == [10, 20, 30, 31, 40]
    assert steps(client, stage.run_id, "validation_loss") == [30, 31, 40]


def test_many_metrics_are_sent_in_batches(ref: RunRef, client: "MlflowClient") -> None:
    with ref.stage("many", "stage") as stage:
        for step in range(300):
            stage.log_metrics({f"m{i}": float(step) for i in range(7)}, step)
        stage.log_metrics({f"wide{i}": 0.0 for i in range(1100)}, step=0)
    assert steps(client, stage.run_id, "m6") == list(range(300))
    assert len(client.get_run(stage.run_id).data.metrics) == 7 + 1100


def test_params_of_any_number_and_length(ref: RunRef, client: "MlflowClient") -> None:
    params = {"train": {f"p{i}": i for i in range(150)}, "long": "x" * 7000, "list": [1, None], "empty": ""}
    with ref.stage("params", "stage", params) as stage:
        pass
    logged = client.get_run(stage.run_id).data.params
    assert len(logged) == 153
    assert (logged["train.p149"], logged["list"], logged["empty"]) == ("149", "[1, null]", "")
    assert len(logged["long"]) == 6000
    assert "7000 characters" in logged["long"]


def test_changed_params_go_into_a_tag(ref: RunRef, client: "MlflowClient") -> None:
    def reopened(params: dict[str, int]) -> "tuple[dict[str, str], str | None]":
        with ref.stage("changed", "stage", params) as stage:
            pass
        data = client.get_run(stage.run_id).data
        return data.params, data.tags.get(tracking.PARAMS_CHANGED_TAG)

    assert reopened({"a": 1, "b": 2}) == ({"a": "1", "b": "2"}, None)
    changed = '{"a": ["1", "3"], "b": ["2", null]}'
    assert reopened({"a": 3, "c": 4}) == ({"a": "1", "b": "2", "c": "4"}, changed)
    assert reopened({"a": 1, "b": 2, "c": 4})[1] == "{}"


def test_what_the_server_refuses_is_a_warning(
    ref: RunRef, client: "MlflowClient", caplog: pytest.LogCaptureFixture
) -> None:
    with ref.stage("refused", "stage") as stage:
        stage.log_metrics({"no@such name": 1.0}, step=1)
        stage.flush()
        stage.log_artifact(Path("/no/such/file"))
        stage.log_metrics({"loss": 1.0}, step=1)
    assert client.get_run(stage.run_id).info.status == "FINISHED"
    assert steps(client, stage.run_id, "loss") == [1]
    assert "run stage lacks 2 records" in caplog.text


def test_a_stage_goes_on_without_a_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "OPEN_WAIT_S", 0.2)
    monkeypatch.setattr(tracking, "END_LIMIT_S", 1.0)
    monkeypatch.setattr(outbox, "MAX_WAITING", 50)
    port = free_port()
    for uri in (f"http://user:secret@127.0.0.1:{port}", f"sqlite:///{tmp_path}/elsewhere.db"):
        caplog.clear()
        started_s = time.perf_counter()
        with RunRef(uri, "1", "0" * 32, {}).stage("s", "stage") as stage:
            for step in range(100):
                stage.log_metrics({"loss": 1.0}, step)
            result = "trained"
        assert result == "trained"
        assert time.perf_counter() - started_s < 10.0  # a tenth of a second a call
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any("run stage" in warning for warning in warnings)
        assert "secret" not in caplog.text
        assert not (tmp_path / "elsewhere.db").exists()


@pytest.mark.parametrize(
    ("uri", "way_out"),
    [
        ("sqlite:///mlflow.db", "four slashes"),
        ("sqlite://", "four slashes"),
        ("sqlite:///:memory:", "four slashes"),
        ("file:///tmp/mlruns", "migrate-filestore"),
        ("./mlruns", "migrate-filestore"),
        ("/tmp/mlruns", "migrate-filestore"),
    ],
)
def test_stores_that_workers_cannot_share_are_refused(
    uri: str, way_out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=way_out) as caught:
        tracking_uri(str(tmp_path))
    assert f"MLFLOW_TRACKING_URI={uri}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage_uri", ["s3://bucket/kraken", "relative/storage", "/data/50%20"])
def test_storages_that_cannot_hold_the_database(storage_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"storage={storage_uri}.*MLFLOW_TRACKING_URI"):
        tracking_uri(storage_uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(storage_uri) == "http://tracking:5000"


@pytest.mark.parametrize("uri", ["http://ada:secret@tracking:5000", "postgresql://ada:secret@database/kraken"])
def test_the_summary_says_where_the_runs_are_without_a_password(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    where = summary.where_runs_are("/shared/kraken", "7")
    assert "secret" not in where
    if uri.startswith("http"):  # another machine reads it, which has neither this Python nor this checkout
        assert where.startswith("http://***@tracking:5000/#/experiments/7/runs?")
    else:
        assert where.startswith("make ui, or: ") and "postgresql://***@database/kraken" in where


def test_a_missing_database_driver_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking_server, "CONNECT_LIMIT_S", 0.5)
    monkeypatch.setitem(sys.modules, "psycopg", None)  # an import of it fails, installed or not
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@127.0.0.1:1/kraken")
    with pytest.raises(ConfigError, match=r"needs a database driver .*pip install .*\[pipelines,postgres\]") as caught:
        Tracker(str(tmp_path))
    assert "secret" not in str(caught.value)


def test_an_unusable_store_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str, tracker: Tracker, client: "MlflowClient"
) -> None:
    for module in (tracking, tracking_server):
        monkeypatch.setattr(module, "CONNECT_LIMIT_S", 0.5)
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        Tracker(str(tmp_path))
    with pytest.raises(ConfigError, match=r"storage=.*mlflow\.db"):
        Tracker(str(tmp_path / "mlflow.db"))  # a file where the folder should be
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(ConfigError, match="experiment=deleted is deleted in MLflow"):
        Tracker(storage, experiment="deleted")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI=.* start the server") as caught:
        Tracker(str(tmp_path))
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(tracker, "tracking_uri", os.environ["MLFLOW_TRACKING_URI"])  # gone since it was opened
    with pytest.raises(ConfigError, match="start the server"), tracker.pipeline("gone", "pipeline"):
        pytest.fail("a pipeline without its server began")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start_server(storage: str, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Starts MLflow's server on a port by the command that users get, and waits until it answers."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> subprocess.Popen[bytes]:
        with (tmp_path / "server.log").open("ab") as log:
            # A session of its own, so that its group, and nothing else, can be ended.
            server = subprocess.Popen(
                ui_command(storage, port), stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
            )
        servers.append(server)
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and server.poll() is None:
            try:
                get(f"http://127.0.0.1:{port}/health")
                return server
            except OSError:
                time.sleep(0.1)
        pytest.fail((tmp_path / "server.log").read_text())

    yield start
    for server in servers:
        stop(server)


def stop(server: "subprocess.Popen[bytes]") -> None:
    if server.returncode is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def post(url: str, body: str) -> str:
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
def test_a_real_server_shows_the_runs_and_may_go_away(
    tracker: Tracker,
    client: "MlflowClient",
    start_server: Callable[[int], "subprocess.Popen[bytes]"],
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tracker.pipeline("shown", "shown pipeline") as run, run.stage("s", "shown stage") as stage:
        stage.log_text("an artifact", "note.txt")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = start_server(port)

    # What the UI asks for: the runs, and an artifact of a child.
    found = post(f"{address}/api/2.0/mlflow/runs/search", f'{{"experiment_ids": ["{tracker.experiment_id}"]}}')
    assert "shown pipeline" in found
    assert "shown stage" in found
    query = urlencode({"run_uuid": stage.run_id, "path": "note.txt"})
    assert get(f"{address}/get-artifact?{query}") == "an artifact"
    assert "<title>MLflow</title>" in get(address)

    # The same server as the tracking server of a pipeline; it goes away while the stage logs.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    remote = Tracker(storage, experiment="remote")
    with remote.pipeline("remote", "pipeline") as run, run.ref.stage("s", "stage", {"a": 1}) as stage:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")  # a worker does not have it
        stage.log_metrics({"loss": 1.0}, step=1)
        assert stage.flush()
        stop(server)
        started_s = time.perf_counter()
        for step in range(2, 50):
            stage.log_metrics({"loss": float(step)}, step)
        stage.log_text("written while it was away", "late.txt")
        assert time.perf_counter() - started_s < 5.0  # a tenth of a second a call
        assert not stage.flush(1.5)
        start_server(port)
    assert "MLflow is away" in caplog.text
    assert "lacks" not in caplog.text
    assert [client.get_run(r.run_id).info.status for r in (run, stage)] == ["FINISHED", "FINISHED"]
    assert steps(client, stage.run_id, "loss") == list(range(1, 50))
    query = urlencode({"run_uuid": stage.run_id, "path": "late.txt"})
    assert get(f"{address}/get-artifact?{query}") == "written while it was away"
