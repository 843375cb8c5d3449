"""The tracking server: where a storage's runs are recorded, how to reach it, and the command that shows its pages.

A storage records in the server or database that MLFLOW_TRACKING_URI names, else in a SQLite database of its own.
`tracking.py` records runs there; these two files are the only importers of mlflow. MLflow costs seconds to import, so
that it is imported where it is needed.
"""

import fcntl
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kraken.config import ConfigError
from kraken.environment import provide_home
from pipelines.outbox import one_line, persist, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

UI_PORT = 5000
"""Where the UI of a database listens unless told otherwise."""
KIND_TAG = "kraken.kind"
"""On the run of a pipeline: `pipeline`. The list of the UI's link shows the runs that have it."""
TRAINING_QUERY = "workflowType=machine_learning"
"""Part of an address that has the UI show its pages for model training. A browser that has not been there before shows
every experiment as GenAI, without its runs, whatever the experiment's tags say."""
VIEW_NAME = "kraken"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"
"""On the experiment: the list of runs as the UI's link shows it. The UI's own button for sharing a view writes such
tags, too."""
VIEW_COLUMNS = (
    *("metrics.`perplexity`", "metrics.`bits_per_byte`", "metrics.`loss`", "metrics.`validation_loss`"),
    *("metrics.`tokens_per_second`", "metrics.`mfu`", "metrics.`parameters`", "metrics.`train_tokens`"),
    *("params.`train.steps`", "params.`train.learning_rate`", "attributes.`Dataset`", "attributes.`Source`"),
    *("attributes.`Version`", "attributes.`User`"),
)
"""Columns of that list behind name and date, in this order."""
NAME_COLUMN, NAME_WIDTH = "attributes.`Run Name`", 340
CONNECT_LIMIT_S = 30.0
"""A pipeline does not begin without its tracking server; one that is just starting gets this long."""


def tracking_uri(storage: str) -> str:
    """Where the runs of a storage are recorded: MLFLOW_TRACKING_URI, else a database in the storage folder.

    Args:
        storage: absolute local path, or a URI such as `s3://bucket/prefix`.

    Raises:
        ConfigError: a file store, a database that other processes would not find, or a storage that cannot hold one.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        if uri.startswith("file:") or not re.match(r"[\w+-]+://|databricks", uri):
            raise ConfigError(
                f"MLFLOW_TRACKING_URI={uri} is a file store, which MLflow has given up; convert it with "
                "`mlflow migrate-filestore`, give sqlite:////absolute/path/mlflow.db or a server, or unset the variable"
            )
        if uri.startswith("sqlite") and sqlite_path(uri) is None:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI={uri} is no absolute path, and workers run in other folders; "
                "give sqlite:////absolute/path/mlflow.db (four slashes) or a server, or unset the variable"
            )
        return uri
    if "://" in storage:
        raise ConfigError(
            f"storage={storage} cannot hold MLflow's database; set MLFLOW_TRACKING_URI to an MLflow server (http://...)"
        )
    if not os.path.isabs(storage) or set(storage) & set("%#?"):
        raise ConfigError(
            f"storage={storage} cannot hold MLflow's database, which needs an absolute path without %, # and ?; "
            "choose another storage, or set MLFLOW_TRACKING_URI to an MLflow server (http://...)"
        )
    return f"sqlite:///{storage}/mlflow.db"


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite URI with an absolute path; None for every other URI."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///(/[^?]+)(?:\?.*)?", uri)
    return Path(match[1]) if match else None


def ui_command(storage: str, port: int = UI_PORT) -> list[str]:
    """The command that opens the MLflow UI of a storage's database on loopback; not for a server, which has its own."""
    uri = tracking_uri(storage)
    # MLflow's jobs evaluate chats; they cost eight processes and half a gigabyte. One worker, another quarter of a
    # gigabyte, suffices for one person.
    environment = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"]
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", uri, "--artifacts-destination", f"{storage}/mlartifacts"]
    return [*environment, *server, *stores]


def view_state() -> str:
    """The list of pipelines' runs with the columns that they are compared by, as the UI reads it."""
    return json.dumps(
        {
            "searchFilter": f"tags.`{KIND_TAG}` = 'pipeline'",
            "selectedColumns": VIEW_COLUMNS,
            "columnOrder": (NAME_COLUMN, *VIEW_COLUMNS),
            "columnWidths": {NAME_COLUMN: NAME_WIDTH},
        }
    )


def runs_page(server: str, experiment_id: str) -> str:
    """URL of the list of pipelines' runs in the UI.

    Args:
        server: URL of the server whose UI it is.
    """
    query = f"viewStateShareKey={VIEW_NAME}&{TRAINING_QUERY}"
    return f"{without_password(server).rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


class TrackingServer:
    """The tracking server or database of a storage, connected; a database is made if it is not there.

    Args:
        storage: absolute local path or URI of the artefacts; see `tracking_uri`.
        uri: the server, where it is known already.

    Raises:
        ConfigError: the server cannot be used. Every method that contacts it raises the same.
    """

    def __init__(self, storage: str, uri: str | None = None):
        self.uri = uri or tracking_uri(storage)
        self._storage = storage
        if path := sqlite_path(self.uri):
            try:
                # MLflow would try a database that cannot be written for minutes.
                path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(path, timeout=CONNECT_LIMIT_S)) as database:
                    database.execute("BEGIN IMMEDIATE")
            except (OSError, sqlite3.Error) as error:
                raise self.unusable(one_line(error)) from error
        with locked(self.uri):  # two processes that make the tables at once would both fail
            self.client = self.retry(lambda: connect(self.uri))

    def experiment_id(self, name: str) -> str:
        """MLflow's id of an experiment, which is made if it is not there.

        Raises:
            ConfigError: the experiment is deleted.
        """
        return self.retry(lambda: self._find_experiment(name))

    def _find_experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # A server knows where its artifacts go. A database does not, and MLflow's default is the current folder.
            has_server = self.uri.startswith("http")
            return self.client.create_experiment(
                name,
                artifact_location=None if has_server else f"{self._storage}/mlartifacts",
                tags={"mlflow.experimentKind": "custom_model_development", VIEW_TAG: view_state()},
            )
        if experiment.lifecycle_stage != "active":
            raise ConfigError(
                f"experiment={name} is deleted in MLflow; choose another experiment, "
                f"or restore it with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        if experiment.tags.get(VIEW_TAG) != view_state():  # of an earlier version
            self.client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view_state())
        return str(experiment.experiment_id)

    def experiments(self) -> list[tuple[str, str]]:
        """(name, id) of the experiments that pipelines are recorded in, the one that was used last first."""
        from mlflow.entities import ViewType

        every = self.retry(lambda: self.client.search_experiments(ViewType.ACTIVE_ONLY))
        found = [experiment for experiment in every if VIEW_TAG in experiment.tags]
        found.sort(key=lambda experiment: experiment.last_update_time or 0, reverse=True)
        return [(experiment.name, str(experiment.experiment_id)) for experiment in found]

    def retry(self, call: Callable[[], T]) -> T:
        """Call until the server answers; one that is still starting gets `CONNECT_LIMIT_S`."""
        deadline_s = time.monotonic() + CONNECT_LIMIT_S

        def pause(pause_s: float, _error: Exception) -> bool:
            time.sleep(pause_s)
            return time.monotonic() < deadline_s

        try:
            return persist(call, is_passing, pause)
        except ConfigError:
            raise
        except ImportError as error:
            raise self._not_importable(error) from error
        except Exception as error:
            raise self.unusable(one_line(error)) from error

    def _not_importable(self, error: ImportError) -> ConfigError:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if uri.startswith("postgresql"):
            return ConfigError(
                f"MLFLOW_TRACKING_URI={without_password(uri)} needs a database driver ({error}); install it on every "
                "node: pip install -c constraints.txt -e '.[pipelines,postgres]', or give an MLflow server (http://...)"
            )
        return ConfigError(f"MLflow cannot be imported ({one_line(error)}); mend this Python's packages")

    def unusable(self, reason: str) -> ConfigError:
        """The error to raise when the server cannot be used, with the way out."""
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return ConfigError(
                f"MLFLOW_TRACKING_URI={without_password(uri)} cannot be used ({reason}); "
                "start the server or mend the URI, or unset the variable to record in the storage folder"
            )
        return ConfigError(
            f"storage={self._storage} has an MLflow database, mlflow.db, that cannot be used ({reason}); "
            "mend or move it, or choose another storage"
        )


def connect(uri: str) -> "MlflowClient":
    """A client of the server. Only a database is contacted at once.

    Raises:
        FileNotFoundError: the database is not on this machine.
    """
    if (path := sqlite_path(uri)) and not path.exists():
        # MLflow would make an empty one, for example on another node.
        raise FileNotFoundError(
            f"{path} is not on this machine; set MLFLOW_TRACKING_URI to a server that all nodes reach"
        )
    # MLflow's own retries last minutes, and repeat a create_run that did get through. The user's own values stand.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    provide_home()  # MLflow asks for the home directory while it is imported
    from mlflow import MlflowClient

    return MlflowClient(uri)


def is_passing(error: Exception) -> bool:
    """Whether another try can help: the server is away or busy, as opposed to having said no."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # INTERNAL_ERROR is also what a refused connection becomes; RESOURCE_ALREADY_EXISTS means that another process
        # was faster, and the next try finds what it made.
        passing = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_ALREADY_EXISTS")
        return error.error_code in passing
    # By name, since sqlalchemy matters to database stores only.
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ == "OperationalError"


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Keep this machine's other processes away from a sqlite database, so that looking and making are one step."""
    if path := sqlite_path(uri):
        with path.with_name(f"{path.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    else:
        yield
