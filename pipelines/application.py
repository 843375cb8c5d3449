"""A name on a cluster's Ray Serve, and the pipeline that owns it.

Serve itself replaces an application by the next one of the same name, whoever deploys it. The owner is therefore kept
in the cluster's key-value store beside the application; a record without an application counts for nothing.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kraken.config import ConfigError, RunConfig, ServeConfig
from kraken.manifest import make_fingerprint
from pipelines.lease import delete, get, put
from serve.ray_internals import forget_controller, serve_details

START_LIMIT_S = 30.0
"""A deployment that has claimed a name and has no application after this is dead."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The pipeline that an application belongs to. The next model of the same pipeline has the same owner."""

    storage_id: str
    storage: str
    experiment: str
    run: str
    """Name of the pipeline's run in MLflow."""
    user: str
    """Who deployed the application; not part of the identity."""

    @property
    def id(self) -> str:
        """Hash of what identifies the pipeline."""
        return make_fingerprint("owner", [self.storage_id, self.experiment, self.run], {})

    def __str__(self) -> str:
        return f"run {self.run} of experiment {self.experiment} in storage {self.storage}, deployed by {self.user}"


def owner_of(config: RunConfig) -> Owner:
    """The owner of what a run deploys; its storage must have an id."""
    from kraken.storage_id import find_storage_id
    from pipelines.outbox import without_password
    from pipelines.tracking import submitter

    return Owner(
        storage_id=find_storage_id(config.storage) or "",
        storage=without_password(config.storage),
        experiment=config.experiment,
        run=config.name,
        user=submitter(),
    )


def require_own_name(serve: ServeConfig, owner: Owner) -> None:
    """Check that a pipeline may deploy under its name; asks the cluster, changes nothing.

    Raises:
        ConfigError: the name or its route belongs to another pipeline, which the message names.
    """
    applications = _applications()
    for name, details in applications.items():
        if name != serve.name and details.get("route_prefix") == serve.route_prefix:
            raise ConfigError(
                f"serve.name={serve.name} is served at {serve.route_prefix}, where this cluster serves the application "
                f"{name}; choose another name, for example --serve.name {_another_name(serve, owner)}, or end that "
                f"application (`serve.delete({name!r})`)"
            )
    record = _record(serve.name)
    is_free = serve.name not in applications and (
        record is None or time.time() - record["claimed_at"] > START_LIMIT_S or record["is_deployed"]
    )
    if serve.replace or is_free or (record is not None and record["id"] == owner.id):
        return
    found = "a pipeline that left no record" if record is None else str(Owner(**record["owner"]))
    raise ConfigError(
        f"serve.name={serve.name} belongs to {found}; serve beside it with another name, for example --serve.name "
        f"{_another_name(serve, owner)}, or replace it with --serve.replace"
    )


@contextlib.contextmanager
def claimed(serve: ServeConfig, owner: Owner) -> Iterator[None]:
    """Own a name while an application is deployed under it, and afterwards if there is one.

    Raises:
        ConfigError: on entering, as `require_own_name` does; also when another pipeline claims it at the same time.
    """
    require_own_name(serve, owner)
    key = _key(serve.name)
    before, deployed_at = get(key), _deployed_at(serve.name)
    claim = {"id": owner.id, "owner": dataclasses.asdict(owner), "claimed_at": time.time(), "is_deployed": False}
    text = json.dumps(claim)
    if before and get(key) == before:
        delete(key)
    put(key, text, overwrite=False)  # of two that come this far at once, one gets it
    require_own_name(dataclasses.replace(serve, replace=False), owner)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if get(key) == text and _deployed_at(serve.name) == deployed_at:  # nothing was deployed
                delete(key)
                if before:
                    put(key, before, overwrite=False)
        raise
    put(key, json.dumps(claim | {"is_deployed": True}))


def http_address() -> tuple[str, int] | None:
    """Host and port on which this cluster's Serve listens; None where Serve does not run."""
    details = _details()
    options = details.get("http_options") if details else None
    return (options["host"], options["port"]) if options else None


def require_no_others(owner: Owner, reason: str) -> None:
    """Check that every application on this cluster belongs to a pipeline.

    Args:
        reason: what they stand in the way of, for the message.

    Raises:
        ConfigError: names the first application of another pipeline.
    """
    for name in _applications():
        record = _record(name)
        if record is None or record["id"] != owner.id:
            whose = str(Owner(**record["owner"])) if record else "unknown"
            raise ConfigError(f"{reason}, which would end the application {name} (owner: {whose})")


def _another_name(serve: ServeConfig, owner: Owner) -> str:
    return owner.run if owner.run != serve.name else f"{serve.name}-2"


def _key(name: str) -> str:
    return f"application/{name}"


def _record(name: str) -> dict[str, Any] | None:
    text = get(_key(name))
    return json.loads(text) if text else None


def _applications() -> dict[str, Any]:
    """Name -> Serve's details of every application."""
    details = _details()
    return dict(details["applications"]) if details else {}


def _deployed_at(name: str) -> float | None:
    """When an application was deployed last, in Unix seconds; None where there is none."""
    details = _applications().get(name)
    return None if details is None else details["last_deployed_time_s"]


def _details() -> dict[str, Any] | None:
    """The Serve controller's description of its applications; None if Serve does not run."""
    from ray.exceptions import RayActorError

    for _ in range(2):
        try:
            return serve_details()
        except RayActorError:  # this process remembers a Serve that another one has shut down
            forget_controller()
    return None
