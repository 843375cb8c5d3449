"""The model registry: a version per converted model that passed its gates, and which of them is in production.

    registry = Registry(storage)
    version = registry.resolve("models:/kraken@champion")      # or models:/kraken/7
    version.folder()                                           # the converted model, on this machine
    registry.history("kraken")                                 # what was in production, when, why, and by whom

The registry is MLflow's. A version's tags hold its lineage: data, training, checkpoint, converted model. Two aliases
are ours: `candidate` passed its gates last, `champion` is deployed and has answered. A change of the champion is an
event of the history, in a tag of its own on the registered model, so that two writers at once lose nothing.
"""

import json
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import kraken
from kraken.config import REGISTERED_NAME, ConfigError
from kraken.manifest import ArtefactError, Manifest, library_versions
from kraken.storage import local_artefact
from pipelines.outbox import without_password
from pipelines.tracking import ARTEFACT_TAG, PARENT_TAG, STORAGE_ID_TAG, USER_TAG, submitter
from pipelines.tracking_server import TrackingServer, locked, sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")

SCHEME = "models:/"
CANDIDATE, CHAMPION = "candidate", "champion"
HISTORY_TAG = "kraken.history."
"""First part of the name of an event's tag; time and a random part follow."""
MARK_TAG = "kraken.registered_by"
"""Random id of the call that made a version."""
LATEST_LISTED = 5
MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
LIBRARIES = ("torch", "numpy", "tiktoken", "safetensors", "pyarrow", "dacite", "datasets", "rustbpe", "mlflow")
"""What the code of a registered model imports, directly or not."""


def is_reference(text: str) -> bool:
    """Whether a model is named by its place in the registry."""
    return text.startswith("models:")


@dataclass(frozen=True, slots=True)
class Reference:
    """A name in the registry, with a version or an alias."""

    name: str
    version: int | None
    alias: str | None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """`models:/NAME/VERSION` or `models:/NAME@ALIAS`.

        Raises:
            ConfigError: it is neither.
        """
        match = re.fullmatch(rf"{SCHEME}({REGISTERED_NAME.pattern})(?:/(\d+)|@([\w.-]+))", text)
        if match is None:
            raise ConfigError(f"{text} names no model; write models:/NAME/VERSION or models:/NAME@champion")
        return cls(match[1], int(match[2]) if match[2] else None, match[3])


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a version comes from and how it was judged; the tags `kraken.NAME` of the version."""

    exchange: str
    """Fingerprint of the converted model. With `storage_id` it identifies the version."""
    storage_id: str
    location: str
    """Path or URI of the converted model, the same on every node."""
    storage: str
    prepare: str
    pretrain: str
    evaluate: str
    """Fingerprints of the data, the training and the evaluation."""
    checkpoint: str
    """Name of the checkpoint that was converted."""
    pipeline: str
    """Name of the pipeline's run."""
    experiment: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    engine: str
    """Engine, type and quantization with which it was evaluated."""
    parity_max_abs_diff: str
    validation_loss: str
    perplexity: str
    bits_per_byte: str
    scored_tokens: str
    """Validation tokens that the perplexity is over."""

    @property
    def tags(self) -> dict[str, str]:
        """The tags of a version."""
        return {f"kraken.{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created_at: str
    run_id: str

    @property
    def uri(self) -> str:
        """As it is named on command lines and to MLflow."""
        return f"{SCHEME}{self.name}/{self.number}"

    @property
    def lineage(self) -> Lineage:
        """What the tags say.

        Raises:
            ArtefactError: it was not registered by a pipeline of this project.
        """
        values = {field.name: self.tags.get(f"kraken.{field.name}") for field in fields(Lineage)}
        if lacking := [name for name, value in values.items() if value is None]:
            raise ArtefactError(
                f"{self.uri} has no tag kraken.{lacking[0]}: no pipeline of this project registered it; choose another "
                "version"
            )
        return Lineage(**{name: str(value) for name, value in values.items()})

    def folder(self) -> Path:
        """The converted model on this machine; one in a remote storage is fetched.

        Raises:
            ArtefactError: it was removed, or another one lies in its place.
        """
        lineage = self.lineage
        try:
            folder = local_artefact(lineage.location)
            found = Manifest.read(folder).fingerprint
        except ArtefactError as error:
            raise ArtefactError(
                f"{self.uri} is registered, but its model was removed from {lineage.location} or cannot be reached "
                f"there ({str(error).partition(';')[0]}); choose another version (python -m jobs.registry list), or "
                "run its pipeline again"
            ) from error
        if found != lineage.exchange:
            raise ArtefactError(
                f"{self.uri} is the model {lineage.exchange[:16]}, and {folder} holds {found[:16]}; choose another "
                "version"
            )
        return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A change of the champion."""

    at: str
    """UTC, as 2026-11-28T10:15:00.123456Z."""
    action: Literal["promotion", "rollback"]
    """`rollback`: the version had been the champion before."""
    version: int
    previous: int | None
    """Version of the champion before."""
    who: str
    why: str
    where: str
    """URL of the endpoint; empty where the alias was moved alone."""


class Registry:
    """MLflow's model registry, as a storage's pipelines use it.

    Args:
        storage: absolute path or URI; says which registry, as for runs.
        uri: the tracking server, where it is known already.

    Raises:
        ConfigError: the registry cannot be used, or nothing has been recorded in it yet.
    """

    def __init__(self, storage: str, uri: str | None = None):
        uri = uri or tracking_uri(storage)
        if (path := sqlite_path(uri)) and not path.is_file():
            raise ConfigError(
                f"storage={storage} has no model registry: {path} is not there; give the --storage in which a pipeline "
                "has deployed a model, or set MLFLOW_TRACKING_URI to its MLflow server"
            )
        self._server = TrackingServer(storage, uri)
        self._client = self._server.client
        self.uri = uri

    # Reading

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first; none where the name is not registered."""
        aliases = self._aliases(name)
        if aliases is None:
            return []
        search = partial(self._client.search_model_versions, f"name='{name}'")
        found = [_version(entity, aliases) for entity in self._pages(search)]
        return sorted(found, key=lambda version: version.number, reverse=True)

    def names(self) -> list[str]:
        """Every registered name."""
        return sorted(model.name for model in self._pages(self._client.search_registered_models))

    def resolve(self, text: str) -> Version:
        """The version that a reference names.

        Raises:
            ConfigError: there is none; the message lists what there is.
        """
        reference = Reference.parse(text)
        versions = self.versions(reference.name)
        if not versions:
            raise ConfigError(
                f"{text}: no model is registered as {reference.name} at {without_password(self.uri)}; the names there "
                f"are: {', '.join(self.names()) or 'none'}"
            )
        for version in versions:
            if version.number == reference.version or (reference.alias and reference.alias in version.aliases):
                return version
        aliases = [f"{alias} (version {v.number})" for v in versions for alias in v.aliases]
        numbers = ", ".join(str(version.number) for version in versions[:LATEST_LISTED])
        raise ConfigError(
            f"{text}: {reference.name} has no {'alias' if reference.alias else 'version'} "
            f"{reference.alias or reference.version}; its newest versions are {numbers}, its aliases "
            f"{', '.join(aliases) or 'none'}"
        )

    def champion(self, name: str) -> Version | None:
        """The version in production; None where there is none."""
        return next((version for version in self.versions(name) if CHAMPION in version.aliases), None)

    def find(self, name: str, exchange: str, storage_id: str) -> Version | None:
        """The version of a converted model, by its fingerprint and storage; the oldest of several."""
        same = [
            version
            for version in self.versions(name)
            if version.tags.get("kraken.exchange") == exchange and version.tags.get("kraken.storage_id") == storage_id
        ]
        return same[-1] if same else None

    def history(self, name: str) -> list[Event]:
        """Every change of the champion, the oldest first."""
        model = self._call(lambda: self._find_model(name))
        tags = {} if model is None else model.tags
        return [Event(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(HISTORY_TAG)]

    def artefacts(self, storage_id: str) -> set[str]:
        """What active runs, and versions that have an alias, refer to in a storage, as `KIND/FINGERPRINT`."""
        found: set[str] = set()
        for experiment in self._pages(self._client.search_experiments):
            search = partial(
                self._client.search_runs, [experiment.experiment_id], f"tags.`{STORAGE_ID_TAG}` = '{storage_id}'"
            )
            locations = (run.data.tags.get(ARTEFACT_TAG) for run in self._pages(search))
            found |= {"/".join(text.partition("?")[0].rsplit("/", 2)[1:]) for text in locations if text}
        for name in self.names():
            for version in self.versions(name):
                if version.aliases and version.tags.get(STORAGE_ID_TAG) == storage_id:
                    lineage = version.lineage
                    kinds = {"convert": lineage.exchange, "evaluate": lineage.evaluate}
                    found |= {f"{kind}/{fingerprint[:16]}" for kind, fingerprint in kinds.items()}
        return found

    def _pages(self, search: Callable[..., Any]) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self._call(partial(search, page_token=token))
            yield from page
            if not (token := page.token):
                return

    # Writing

    def register(self, name: str, lineage: Lineage, settings: Mapping[str, str], run_id: str) -> Version:
        """The version of a converted model, which is made unless it is there, and the alias `candidate`.

        Args:
            settings: `dtype` and `quantization` with which MLflow's loader opens the model.
            run_id: the stage's run; the version belongs to that of its pipeline.
        """
        return self._call(lambda: self._register(name, lineage, settings, run_id))

    def _register(self, name: str, lineage: Lineage, settings: Mapping[str, str], run_id: str) -> Version:
        with locked(self.uri):
            version = self.find(name, lineage.exchange, lineage.storage_id)
            if version is None:
                mark = uuid.uuid4().hex
                self._make(name, lineage, settings, run_id, mark)
                # A server cannot be locked: when two processes have each made a version, the older one stays.
                version = self.find(name, lineage.exchange, lineage.storage_id)
                assert version is not None
                for other in self.versions(name):
                    if other.number != version.number and other.tags.get(MARK_TAG) == mark:
                        self._client.delete_model_version(name, str(other.number))
        self.set_tags(version, lineage.tags)
        self._set_alias(name, CANDIDATE, version.number)
        return self.resolve(version.uri)

    def _make(self, name: str, lineage: Lineage, settings: Mapping[str, str], run_id: str, mark: str) -> None:
        """Record the model with MLflow's loader, and a version of it. The weights stay in the storage."""
        if self._find_model(name) is None:
            self._client.create_registered_model(
                name,
                description=f"Kraken models that passed their gates. `{SCHEME}{name}@{CHAMPION}` is in production.",
            )
        run = self._client.get_run(run_id)
        pipeline_id = run.data.tags.get(PARENT_TAG, run_id)
        logged = self._client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=pipeline_id,
            tags=lineage.tags,
            params=dict(settings),
            model_type="Kraken",
        )
        try:
            with tempfile.TemporaryDirectory(prefix="kraken-model-") as folder:
                save(Path(folder) / "model", lineage, settings, logged.model_id, pipeline_id)
                self._client.log_model_artifacts(logged.model_id, f"{folder}/model")
            logged = self._client.finalize_logged_model(logged.model_id, "READY")
        except BaseException:
            self._client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        self._client.create_model_version(
            name,
            # not models:/ID, which a database would look up in the server of this process's environment
            source=logged.artifact_location,
            run_id=pipeline_id,
            tags={**lineage.tags, MARK_TAG: mark},
            description=describe(lineage),
            model_id=logged.model_id,
        )

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version, those that differ."""
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._call(partial(self._client.set_model_version_tag, version.name, str(version.number), key, value))

    def promote(self, version: Version, why: str, where: str = "", who: str | None = None) -> Event | None:
        """Make a version the champion, and record that; None where it is the champion already."""
        champion = self.champion(version.name)
        if champion is not None and champion.number == version.number:
            return None
        name, before = version.name, {event.version for event in self.history(version.name)}
        now = time.time()
        event = Event(
            at=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z",
            action="rollback" if version.number in before else "promotion",
            version=version.number,
            previous=champion.number if champion else None,
            who=who or submitter(),
            why=why,
            where=without_password(where),
        )
        key, text = f"{HISTORY_TAG}{event.at}.{uuid.uuid4().hex[:8]}", json.dumps(asdict(event), sort_keys=True)
        self._call(lambda: self._set_alias(name, CHAMPION, version.number))
        self._call(lambda: self._client.set_registered_model_tag(name, key, text))
        return event

    def submitter_of(self, run_id: str) -> str:
        """The user of a run; in a task of a cluster the account is the cluster's."""
        tags = self._call(lambda: self._client.get_run(run_id)).data.tags
        return tags.get(USER_TAG) or submitter()

    def _aliases(self, name: str) -> dict[str, str] | None:
        """Alias -> version; None where the name is not registered."""
        model = self._call(lambda: self._find_model(name))
        return None if model is None else dict(model.aliases)

    def _find_model(self, name: str) -> Any:
        """MLflow's record of a name; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _set_alias(self, name: str, alias: str, number: int) -> None:
        """Set an alias, a second time if MLflow refuses. When two processes create an alias at the same time, both
        insert its row, and the database refuses the second insert. By then the alias exists, and setting it again
        changes it."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_registered_model_alias(name, alias, str(number))
        except MlflowException:
            self._client.set_registered_model_alias(name, alias, str(number))

    def _call(self, call: Callable[[], T]) -> T:
        return self._server.retry(call)


def _version(entity: "ModelVersion", aliases: Mapping[str, str]) -> Version:
    return Version(
        name=entity.name,
        number=int(entity.version),
        tags=dict(entity.tags),
        aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(entity.version))),
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entity.creation_timestamp / 1000)),
        run_id=entity.run_id or "",
    )


def save(folder: Path, lineage: Lineage, settings: Mapping[str, str], model_id: str, run_id: str) -> None:
    """Write what MLflow loads: this project's code, and where the weights lie.

    The weights, which may be gigabytes, are referenced and not copied: they are in the storage already. With
    `artifacts=` MLflow would copy them into the logged model and again to every machine that loads it. Loading a
    version whose weights were removed raises an error that says so.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    code = folder.with_name("code") / "kraken"
    shutil.copytree(Path(kraken.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__", "trtllm"))
    text = Schema([ColSpec(DataType.string)])
    params = ParamSchema(
        [
            ParamSpec("max_tokens", DataType.integer, 16),
            ParamSpec("temperature", DataType.double, 1.0),
            ParamSpec("top_p", DataType.double, 1.0),
            ParamSpec("top_k", DataType.integer, 0),
            ParamSpec("seed", DataType.long, -1),
            ParamSpec("stop", DataType.string, [], shape=(-1,)),
        ]
    )
    found = library_versions_of(LIBRARIES)
    with warnings.catch_warnings():  # that there is no example of the input, beside a signature
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(MODEL_CODE),
            code_paths=[str(code)],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            model_config={"exchange": lineage.location, "fingerprint": lineage.exchange, **settings},
            signature=ModelSignature(inputs=text, outputs=text, params=params),
            pip_requirements=[f"{name}=={version}" for name, version in found.items()],
        )


def library_versions_of(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the libraries that are installed."""
    from importlib import metadata

    found = dict(library_versions())
    for name in names:
        if name not in found:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return {name: found[name].partition("+")[0] for name in names if name in found}


def describe(lineage: Lineage) -> str:
    """Markdown for the version's page."""
    return (
        f"{lineage.pipeline}: perplexity {float(lineage.perplexity):.4g}, {float(lineage.bits_per_byte):.4g} bits per "
        f"byte, parity {float(lineage.parity_max_abs_diff):.1e} nats.\n\n"
        f"data `{lineage.prepare[:16]}` -> training `{lineage.pretrain[:16]}` ({lineage.checkpoint}) -> model "
        f"`{lineage.exchange[:16]}` in `{lineage.location}`"
    )


def model_folder(text: str, storage: str) -> Path:
    """The folder of a model that a command line names: by its place in the registry, its URI or its path.

    Args:
        storage: whose registry is meant.

    Raises:
        ConfigError, ArtefactError: as `Registry.resolve` and `local_artefact`.
    """
    if not is_reference(text):
        return local_artefact(text)
    Reference.parse(text)  # refuse a malformed reference before the tracking server is contacted
    return Registry(storage).resolve(text).folder()
