"""Tracking: one MLflow run per pipeline, one child run per stage.

    tracker = Tracker(storage, submission=submission_id)              # the controller, once: it makes the database
    with tracker.pipeline(key, "quickstart", params) as run:          # found again by its key after a restart
        ref = run.ref                                                 # small and picklable, for the stages' tasks
        ...
        with ref.stage("pretrain", "pretrain", params) as stage:      # in the process of the stage
            stage.log_metrics({"loss": 4.2}, step=10)
            stage.log_manifest(folder / "manifest.json")

A run ends as its block ends: FINISHED, FAILED by an error, KILLED by a cancellation. Inside the block nothing waits
for the tracking server and nothing is raised because of it: records go through a bounded queue to a background thread,
which tries again while the server is away, and a warning counts what could not be delivered.

MLflow costs seconds to import, so it is imported where it is needed. Every call names its server and its run; there is
no active run and no global tracking URI.
"""

import getpass
import hashlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from kraken.manifest import git_revision, make_fingerprint
from kraken.storage_id import storage_id
from pipelines.outbox import MAX_METRICS_PER_BATCH, Metrics, Outbox, one_line, without_password
from pipelines.tracking_server import (
    CONNECT_LIMIT_S,
    TRAINING_QUERY,
    UI_PORT,
    TrackingServer,
    connect,
    is_passing,
    locked,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")
AnyRun = TypeVar("AnyRun", bound="StageRun")

KEY_TAG = "kraken.key"
"""Unique key, by which a restart or a resubmission finds its run."""
SUBMISSION_TAG = "kraken.submission"
"""The Ray job submission that opened the run last; `Tracker.reconcile` asks whether it lives."""
ATTEMPTS_TAG = "kraken.attempts"
"""Number of times that the run was opened."""
OPENED_BY_TAG = "kraken.opened_by"
"""Random id of the process's `StageRun` that opened the run last; an earlier one does not end it."""
STORAGE_TAG = "kraken.storage"
"""Where the artefacts lie, as the last process that opened the run called it."""
STORAGE_ID_TAG = "kraken.storage_id"
"""Identity of that storage."""
PARAMS_CHANGED_TAG = "kraken.params_changed"
"""Set on reopening, `{}` if nothing changed: params that differ from those logged first, {name: [logged, now]}."""
ERROR_TAG = "kraken.error"
"""Why the run did not finish, in one line."""
ARTEFACT_TAG = "kraken.artefact"
"""Where the stage's artefact lies."""
REUSED_TAG = "kraken.reused"
"""`true` for an artefact that was found, `false` for one that was made."""
COMPARISON_TAG = "kraken.comparison"
"""On a pipeline's run: the ids of the comparisons' runs that it is part of, a space between."""
COMPARED_TAG = "kraken.compared"
"""On a comparison's run, with the pipeline's name behind it: the id of the pipeline's run."""
NAME_TAG = "kraken.name"
"""On the run of a pipeline: the name in its config. The run's own name also says what differs from the preset."""
NOTE_TAG = "mlflow.note.content"
"""Markdown that the UI shows at the top of a run's page."""
NOTE_DIGEST_TAG = "kraken.note_digest"
"""Hash of the description that was written last; one that a person has edited since has another, and stays."""
DATASET_CONTEXT_TAG = "mlflow.data.context"
GIT_TAG = "mlflow.source.git.commit"
USER_TAG = "mlflow.user"
SOURCE_NAME_TAG = "mlflow.source.name"
SOURCE_TYPE_TAG = "mlflow.source.type"
PARENT_TAG = "mlflow.parentRunId"

# MLflow's limits.
MAX_PARAMS_PER_BATCH = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000  # 8000 in new versions

OPEN_WAIT_S = 5.0
"""A stage waits this long for its run to open, then begins; the run opens when the server is back."""
END_LIMIT_S = 30.0
"""Longest wait for deliveries at the end of a run."""
KILLED_LIMIT_S = 5.0
"""The same after a cancellation, when patience is short: Ray kills a stopped job after 3 s."""


# The user and the command


def submitter() -> str:
    """Name of the user: KRAKEN_USER, else the user of the tracking server, else the account of this process.

    In a submitted job the account is the cluster's; `jobs.submit` therefore sets KRAKEN_USER.
    """
    user = os.environ.get("KRAKEN_USER") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user := user or urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).username:
        return user
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return f"uid {os.getuid()}"


def source_name() -> str:
    """The command that runs in this process, without its arguments."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0] or "python"


def _search(client: "MlflowClient", experiment_id: str, condition: str) -> "list[Run]":
    """All runs that fulfil a condition in MLflow's filter language."""
    runs: list[Run] = []
    page_token: str | None = None
    while True:
        page = client.search_runs([experiment_id], condition, page_token=page_token)
        runs += page
        if not (page_token := page.token):
            return runs


def _find_or_create(client: "MlflowClient", experiment_id: str, key: str, name: str, tags: Mapping[str, str]) -> "Run":
    """Find the run with this key, or make it."""
    condition = f"tags.`{KEY_TAG}` = '{key}'"
    runs, made = _search(client, experiment_id, condition), None
    if not runs:
        made = client.create_run(experiment_id, run_name=name, tags={**tags, KEY_TAG: key}).info.run_id
        # A server cannot be locked: when two processes have each made a run, the older one stays.
        runs = _search(client, experiment_id, condition)
    oldest = min(runs, key=lambda run: (run.info.start_time, run.info.run_id))
    if made and made != oldest.info.run_id:
        client.delete_run(made)
    return oldest


def _end(client: "MlflowClient", run_id: str, status: EndStatus, error: str | None) -> None:
    if error:
        client.set_tag(run_id, ERROR_TAG, error)
    elif ERROR_TAG in client.get_run(run_id).data.tags:  # of something that did not keep the run from finishing
        client.delete_tag(run_id, ERROR_TAG)
    client.set_terminated(run_id, status)


def _is_ours(tags: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether the run with these tags has our storage and user. A run without those tags counts as ours."""
    return all(tags.get(name, ours.get(name)) == ours.get(name) for name in (STORAGE_ID_TAG, USER_TAG))


def _end_children(client: "MlflowClient", experiment_id: str, run_id: str, status: EndStatus) -> None:
    for run in _search(client, experiment_id, f"tags.`{PARENT_TAG}` = '{run_id}' and attributes.status = 'RUNNING'"):
        _end(client, run.info.run_id, status, None if status == "FINISHED" else "still running when its pipeline ended")


# How a run ends


def end_status(error: BaseException) -> EndStatus:
    """KILLED for a cancellation, FAILED for every other error."""
    # Every SystemExit counts as one: Ray turns SIGTERM into SystemExit, with 1 in its workers and 15 in its drivers.
    # Three cancellations are ordinary exceptions and go by name, so that nothing is imported for them: ours,
    # concurrent.futures' and Ray's, which a RayTaskError has among its base classes or, where that was impossible, as
    # its cause.
    classes = type(error).__mro__ + type(getattr(error, "cause", None)).__mro__
    is_cancelled = any(cls.__name__ in ("CancelledError", "TaskCancelledError", "RunStopped") for cls in classes)
    return "KILLED" if is_cancelled or not isinstance(error, Exception) else "FAILED"


# Runs


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """A data set that a run made or read, for the column and the drawer of data sets in the UI."""

    name: str
    digest: str
    """At most 36 characters."""
    location: str
    """Path or URI of its folder."""
    context: Literal["training", "validation"]
    profile: Mapping[str, int]
    """Sizes; the UI shows `num_rows` and `num_elements` by themselves."""


class StageRun:
    """An MLflow run, open. Nothing here waits for the server or is raised because of it.

    Args:
        key: unique in the experiment.
        params: any nesting of mappings; logged under dotted names.
        tags: set whenever the run is opened.
    """

    def __init__(
        self, uri: str, experiment_id: str, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ):
        self.name = name
        self.run_id = ""
        """MLflow's id; empty until the run is open."""
        self._uri = uri
        self._experiment_id = experiment_id
        self._key = key
        self._params = _flatten(params)
        self._tags = tags
        self._opened_by = uuid.uuid4().hex
        assert "'" not in key, f"key={key} cannot be searched for"
        with suppress(Exception):  # it happens again where it is reported
            # Imports MLflow, which the thread must not do while this thread perhaps imports what both need.
            connect(uri)
        self._outbox = Outbox(name, self._open, self._send, is_passing)
        self._outbox.put(self._log_params)

    @property
    def metrics_ref(self) -> "MetricsRef":
        """This run, for another process that logs metrics into it while it is open here."""
        return MetricsRef(self._uri, self.run_id, self.name)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of an optimizer step; one that is already recorded for this step or a later one is dropped."""
        assert step >= 0, f"step={step} is negative"
        values = [(name, float(value)) for name, value in metrics.items()]
        for start in range(0, len(values), MAX_METRICS_PER_BATCH):
            batch = dict(values[start : start + MAX_METRICS_PER_BATCH])
            self._outbox.put(Metrics(batch, step, int(time.time() * 1000)))

    def set_tags(self, tags: Mapping[str, str | bool]) -> None:
        """Set tags; booleans become `true` and `false`."""
        texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in tags.items()}
        self._outbox.put(lambda: self._set_tags(texts))

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows on the run's page, unless a person has edited it there."""
        self._outbox.put(lambda: self._describe(markdown[:MAX_TAG_LENGTH]))

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Record data sets that the run made or read; one that is recorded already is not recorded twice."""
        if datasets:
            self._outbox.put(lambda: self._log_datasets(datasets))

    def log_manifest(self, path: Path, *, artefact: str | None = None, reused: bool = False) -> None:
        """Record the manifest of the stage's artefact.

        Args:
            artefact: where the artefact lies in the storage; the default is the manifest's own folder.
            reused: the artefact was found, not made.
        """
        self.log_artifact(path)
        self.set_tags({ARTEFACT_TAG: artefact or str(path.parent), REUSED_TAG: reused})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Record a file or folder, within `folder` of the run's artifacts. It must stay until the run ends."""
        self._outbox.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def log_text(self, text: str, name: str) -> None:
        """Record a text as the artifact `name`."""
        self._outbox.put(lambda: self._client.log_text(self.run_id, text, name))

    def flush(self, limit_s: float = END_LIMIT_S) -> bool:
        """Wait until everything is delivered or refused; False when that takes longer than the limit."""
        return self._outbox.flush(limit_s)

    def wait_until_open(self, limit_s: float) -> bool:
        """Wait until the run is open or refused; whether it is open."""
        return self._outbox.settled.wait(limit_s) and not self._outbox.closed

    def end(self, status: EndStatus, error: str | None = None) -> None:
        """Deliver what waits and end the run; `with` does this."""
        if self._outbox.closed:
            return
        # A run that was killed is first marked so, since little time may be left.
        self._outbox.put(lambda: self._end(status, error), first=status == "KILLED")
        self._outbox.close(KILLED_LIMIT_S if status == "KILLED" else END_LIMIT_S)

    def abandon(self) -> str:
        """Give up a run that does not open; returns the reason."""
        self._outbox.close(0)
        return self._outbox.reason

    # The rest runs in the outbox's thread.

    def _open(self) -> None:
        """Find the run or make it. May run again from the start after an error."""
        self._client: MlflowClient = connect(self._uri)
        with locked(self._uri):
            run = _find_or_create(self._client, self._experiment_id, self._key, self.name, self._tags)
        self.run_id = run.info.run_id
        self._logged_params = run.data.params
        # MLflow's latest value of a metric is the one of its highest step.
        self._highest_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        if ERROR_TAG in run.data.tags:
            self._client.delete_tag(self.run_id, ERROR_TAG)
        attempts = str(int(run.data.tags.get(ATTEMPTS_TAG, "0")) + 1)
        self._set_tags({**self._tags, ATTEMPTS_TAG: attempts, OPENED_BY_TAG: self._opened_by})
        self._client.update_run(self.run_id, status="RUNNING")

    def _log_params(self) -> None:
        """Log the params that are new; what differs from those logged goes into a tag, since params cannot change."""
        from mlflow.entities import Param

        now, logged = self._params, self._logged_params
        new = [Param(name, text) for name, text in now.items() if name not in logged]
        for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS_PER_BATCH])
        if logged:
            changed = {name: [text, now.get(name)] for name, text in logged.items() if text != now.get(name)}
            self._set_tags({PARAMS_CHANGED_TAG: json.dumps(changed, sort_keys=True)})

    def _send(self, batch: list[Metrics]) -> None:
        from mlflow.entities import Metric

        highest_steps = dict(self._highest_steps)
        metrics = []
        for values, step, timestamp_ms in batch:
            for name, value in values.items():
                if step > highest_steps.get(name, -1):
                    highest_steps[name] = step
                    metrics.append(Metric(name, value, timestamp_ms, step))
        # If this got through and only the answer was lost, MLflow ignores the repetition: it is equal in every part.
        self._client.log_batch(self.run_id, metrics=metrics)
        self._highest_steps = highest_steps

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(name, text[:MAX_TAG_LENGTH]) for name, text in tags.items()])

    def _describe(self, markdown: str) -> None:
        tags = self._client.get_run(self.run_id).data.tags
        if NOTE_TAG in tags and tags.get(NOTE_DIGEST_TAG) != _digest(tags[NOTE_TAG]):
            return
        self._set_tags({NOTE_TAG: markdown, NOTE_DIGEST_TAG: _digest(markdown)})

    def _log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for dataset in datasets:
            scheme = urlsplit(dataset.location).scheme
            entity = Dataset(
                name=dataset.name,
                digest=dataset.digest,
                source_type=scheme or "local",
                source=json.dumps({"uri": without_password(dataset.location)}),
                profile=json.dumps(dict(dataset.profile)),
            )
            inputs.append(DatasetInput(entity, [InputTag(DATASET_CONTEXT_TAG, dataset.context)]))
        self._client.log_inputs(self.run_id, inputs)

    def _end(self, status: EndStatus, error: str | None) -> None:
        if self._is_current():
            self._end_current(status, error)
        else:
            logger.warning("MLflow run %s was opened again by another process, which will end it", self.name)

    def _is_current(self) -> bool:
        """Whether this object opened the run last. A process that was suspended must not end its successor's run."""
        opened_by = self._client.get_run(self.run_id).data.tags.get(OPENED_BY_TAG)
        return opened_by in (None, self._opened_by)

    def _end_current(self, status: EndStatus, error: str | None) -> None:
        _end(self._client, self.run_id, status, error)


class PipelineRun(StageRun):
    """The run of a pipeline; records what a stage can, and has stages."""

    @property
    def ref(self) -> "RunRef":
        """This run, for the stages' tasks."""
        return RunRef(self._uri, self._experiment_id, self.run_id, dict(self._tags))

    @contextmanager
    def stage(self, key: str, name: str, params: Mapping[str, Any] | None = None) -> Iterator[StageRun]:
        """A stage in this process, as `RunRef.stage`."""
        with self.ref.stage(key, name, params) as stage:
            yield stage

    @property
    def page(self) -> str:
        """URL of this run in the UI: of the server, or for a database of the server that `ui_command` starts."""
        server = self._uri if self._uri.startswith("http") else f"http://127.0.0.1:{UI_PORT}"
        path = f"#/experiments/{self._experiment_id}/runs/{self.run_id}?{TRAINING_QUERY}"
        return f"{without_password(server).rstrip('/')}/{path}"

    def artifact_link(self, path: str) -> str:
        """URL of an artifact's page in the UI, relative to the UI's pages."""
        return f"#/experiments/{self._experiment_id}/runs/{self.run_id}/artifacts/{quote(path)}?{TRAINING_QUERY}"

    def compare_link(self, run_ids: Sequence[str]) -> str:
        """URL of the UI's comparison of other runs of this experiment, relative to the UI's pages."""
        runs, experiments = (quote(json.dumps(ids)) for ids in (run_ids, [self._experiment_id]))
        return f"#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING_QUERY}"

    def link(self, pipeline: str, kind: str, fingerprint: str) -> None:
        """Tie this run, a comparison, to a pipeline's run that it compares: each gets a tag that names the other.

        Args:
            pipeline: name of the other run, in which the artefact of this kind and fingerprint was made or reused.
        """
        self._outbox.put(lambda: self._link(pipeline, kind, fingerprint))

    def _link(self, pipeline: str, kind: str, fingerprint: str) -> None:
        condition = f"tags.`{ARTEFACT_TAG}` LIKE '%/{kind}/{fingerprint[:16]}'"
        stages = _search(self._client, self._experiment_id, condition)
        for run_id in sorted({run.data.tags[PARENT_TAG] for run in stages if PARENT_TAG in run.data.tags}):
            run = self._client.get_run(run_id)
            if run.data.tags.get(NAME_TAG, run.info.run_name) != pipeline or not _is_ours(run.data.tags, self._tags):
                continue
            comparisons = run.data.tags.get(COMPARISON_TAG, "").split()
            if self.run_id not in comparisons:
                self._client.set_tag(run_id, COMPARISON_TAG, " ".join([*comparisons, self.run_id]))
            self._client.set_tag(self.run_id, f"{COMPARED_TAG}.{pipeline}", run_id)

    def _end_current(self, status: EndStatus, error: str | None) -> None:
        _end_children(self._client, self._experiment_id, self.run_id, status)
        super()._end_current(status, error)


@dataclass(frozen=True, slots=True)
class RunRef:
    """A pipeline's run, small and picklable: what a task in another process needs to record its stage."""

    tracking_uri: str = field(repr=False)  # it may hold a password, and arguments of tasks get printed
    experiment_id: str
    run_id: str
    tags: dict[str, str]
    """Set for every stage, too."""

    @property
    def metrics_ref(self) -> "MetricsRef":
        """The pipeline's run, for a process that logs metrics into it while it is open."""
        return MetricsRef(self.tracking_uri, self.run_id, "of the pipeline")

    @contextmanager
    def stage(self, key: str, name: str, params: Mapping[str, Any] | None = None) -> Iterator[StageRun]:
        """Record a stage as a child run, new or found again, which ends as the block ends.

        Args:
            key: unique among the stages of the pipeline, and the same in a restart.
            params: any nesting of mappings; logged under dotted names.
        """
        tags = {**self.tags, PARENT_TAG: self.run_id}
        # The parent belongs to the key, so that a stage two pipelines share is a child of each.
        with _recorded(
            StageRun(self.tracking_uri, self.experiment_id, f"{self.run_id}/{key}", name, params or {}, tags)
        ) as run:
            run.wait_until_open(OPEN_WAIT_S)
            yield run


@dataclass(frozen=True, slots=True)
class MetricsRef:
    """An open run, small and picklable, for a process that logs into it but does not end it."""

    tracking_uri: str = field(repr=False)
    run_id: str
    name: str

    def attach(self) -> StageRun:
        """Open the run for metrics of this process. `flush` delivers them; the MLflow run stays open."""
        return _AttachedRun(self)


class _AttachedRun(StageRun):
    """A run that another process opened and will end."""

    def __init__(self, ref: MetricsRef):
        self._ref = ref
        super().__init__(ref.tracking_uri, "", "", ref.name, {}, {})

    def _open(self) -> None:
        self._client = connect(self._uri)
        run = self._client.get_run(self._ref.run_id)
        self.run_id = run.info.run_id
        self._logged_params = {}
        self._highest_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def _end(self, status: EndStatus, error: str | None) -> None:
        """No-op: the process that opened the run ends it."""


@contextmanager
def _recorded(run: AnyRun) -> Iterator[AnyRun]:
    """End a run as the block ends."""
    try:
        yield run
    except BaseException as error:
        run.end(end_status(error), one_line(error))
        raise
    run.end("FINISHED")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten params to dotted names and texts. A text too long for MLflow is cut and ends in its hash, which keeps it
    different from others."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if len(text) > MAX_PARAM_LENGTH:
            end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()})"
            text = text[: MAX_PARAM_LENGTH - len(end)] + end
        flat[prefix + name] = text
    return flat


# The controller


class Tracker:
    """Opens pipelines' runs, and ends runs that dead submissions left open; used by the controller.

    Args:
        storage: absolute local path or URI of the artefacts; `tracking_server.py` says where it records.
        submission: id of the Ray job submission this runs in.

    Raises:
        ConfigError: the tracking server cannot be used; every method that contacts it raises the same.
    """

    def __init__(self, storage: str, experiment: str = "kraken", submission: str | None = None):
        self._server = TrackingServer(storage)
        self.tracking_uri = self._server.uri
        self.experiment_id = self._server.experiment_id(experiment)
        self._storage_id = storage_id(storage)
        tags = {
            GIT_TAG: git_revision(),
            USER_TAG: submitter(),
            SOURCE_NAME_TAG: source_name(),
            SOURCE_TYPE_TAG: "JOB",
            STORAGE_TAG: without_password(storage),
            STORAGE_ID_TAG: self._storage_id,
            SUBMISSION_TAG: submission,
        }
        self._tags = {name: value for name, value in tags.items() if value}

    def key(self, kind: str, section: Any, fingerprints: Mapping[str, str]) -> str:
        """The key of a pipeline's run: one per storage and user, though a server has the runs of many.

        Args:
            kind: of the pipeline.
            section: what else identifies it; anything JSON can hold.
            fingerprints: what it makes.
        """
        owner = {"storage": self._storage_id, "user": self._tags[USER_TAG]}
        return make_fingerprint(kind, section, {**fingerprints, **owner})

    @contextmanager
    def pipeline(self, key: str, name: str, params: Mapping[str, Any] | None = None) -> Iterator[PipelineRun]:
        """Record a pipeline as a run, new or found again; it and stages still running end as the block ends.

        Args:
            key: unique in the experiment, and the same in a restart or resubmission.
            params: any nesting of mappings; logged under dotted names.
        """
        with _recorded(PipelineRun(self.tracking_uri, self.experiment_id, key, name, params or {}, self._tags)) as run:
            if not run.wait_until_open(CONNECT_LIMIT_S):
                raise self._server.unusable(run.abandon())
            yield run

    def reconcile(self, end_of: Callable[[str], EndStatus | None]) -> list[str]:
        """End the runs that dead submissions left running; those of other storages and users are left alone.

        Args:
            end_of: how a submission ended; None while it lives, or where that is unknown.

        Returns:
            The ids of the runs it ended.
        """
        ended = []
        client, is_open = self._server.client, "attributes.status = 'RUNNING'"
        for run in self._server.retry(lambda: _search(client, self.experiment_id, is_open)):
            submission = run.data.tags.get(SUBMISSION_TAG)
            if submission and _is_ours(run.data.tags, self._tags) and (status := end_of(submission)):
                error = f"submission {submission} was gone before this ended"
                self._server.retry(partial(_end, client, run.info.run_id, status, error))
                ended.append(run.info.run_id)
        return ended
