"""A registered version as a run: evaluated or deployed again from the artefacts that it has, without training."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from kraken.config import ConfigError, EngineConfig, GatesConfig, RunConfig, ServeConfig, from_dict
from kraken.manifest import ArtefactError, Manifest
from kraken.storage import Storage
from kraken.storage_id import find_storage_id
from pipelines import end_to_end
from pipelines.approval import SERVE_TAG
from pipelines.registry import Registry, Version
from pipelines.stage import fingerprints

MADE = ("prepare", "pretrain", "convert")
"""Stages whose artefacts a version consists of."""


@dataclass(frozen=True, slots=True)
class RegisteredRun:
    """A version, and the run that made it."""

    version: Version
    config: RunConfig
    """Data, model and training as they were; the engine of its evaluation; the endpoint of the champion, if there is
    one."""
    known: dict[str, str]
    """Kind -> fingerprint of the artefacts that it consists of."""

    def identify(self, config: RunConfig) -> dict[str, str]:
        """Kind -> fingerprint of every stage.

        Args:
            config: `self.config`, varied in what evaluation and deployment read.

        Raises:
            ConfigError: something else was varied.
        """
        for section in ("model", "train", "data", "convert", "storage", "experiment", "name"):
            if getattr(config, section) != getattr(self.config, section):
                raise ConfigError(
                    f"{section} differs from that of {self.version.uri}, which is finished; vary engine, evaluate, "
                    "gates, serve and cluster only, or run a preset with it"
                )
        return fingerprints(end_to_end.STAGES, config, self.known)


def open_version(reference: str, storage: str) -> RegisteredRun:
    """The run of a registered version.

    Args:
        storage: whose registry is meant; the version's artefacts must lie in it.

    Raises:
        ConfigError: no such version, or it lies in another storage.
        ArtefactError: an artefact of it was removed.
    """
    registry = Registry(storage)
    version = registry.resolve(reference)
    lineage = version.lineage
    if find_storage_id(storage) != lineage.storage_id:
        raise ConfigError(
            f"{version.uri} lies in storage {lineage.storage}, and storage={storage} is another one; give --storage "
            f"{lineage.storage}"
        )
    found = Storage(storage)
    known = {"prepare": lineage.prepare, "pretrain": lineage.pretrain, "convert": lineage.exchange}
    manifests = {kind: _require(found, version, kind, fingerprint) for kind, fingerprint in known.items()}
    evaluation = found.find("evaluate", lineage.evaluate)
    training = manifests["pretrain"].config
    engine = evaluation.config["engine"] if evaluation else None
    champion = registry.champion(version.name) or version
    serve = champion.tags.get(SERVE_TAG) or version.tags.get(SERVE_TAG)
    values: dict[str, Any] = {
        "name": lineage.pipeline,
        "experiment": lineage.experiment,
        "storage": storage,
        "model": training["model"],
        "train": training["train"],
        "data": manifests["prepare"].config["data"],
        "convert": {"tensorrt_llm": manifests["convert"].config["tensorrt_llm"]},
        "continue_from": training["continue_from"],
        "cluster": {"num_workers": 1},
        **({"evaluate": evaluation.config["evaluate"]} if evaluation else {}),
    }
    config = from_dict(RunConfig, values)
    endpoint = from_dict(ServeConfig, json.loads(serve)) if serve else config.serve
    registered_name = None if version.name == endpoint.name else version.name
    config = dataclasses.replace(
        config,
        engine=from_dict(EngineConfig, engine) if engine else config.engine,
        serve=dataclasses.replace(endpoint, registered_name=registered_name),
    )
    return RegisteredRun(version, config, known)


def _require(storage: Storage, version: Version, kind: str, fingerprint: str) -> Manifest:
    manifest = storage.find(kind, fingerprint)
    if manifest is None:
        raise ArtefactError(
            f"{version.uri} needs {kind}/{fingerprint[:16]}, which was removed from storage={storage.uri}; choose "
            "another version (python -m jobs.registry list), or run its pipeline again"
        )
    return manifest


def run(version: RegisteredRun, config: RunConfig, until: str) -> dict[str, end_to_end.StageResult]:
    """Evaluate a version, or deploy it through the gates; what is finished is reused, and nothing is trained.

    Args:
        until: `evaluate` or `deploy`.
    """
    return end_to_end.run_identified(config, version.identify(config), until)


def deploy(reference: str, storage: str, reason: str, force: tuple[str, ...] | None = ()) -> Version:
    """Deploy a version instead of the champion; once it answers it is the champion.

    Args:
        reason: for the history.
        force: gates that may fail, as GATE=REASON; None compares nothing with the champion, as to roll back.

    Raises:
        ConfigError: the reason is empty, or there is no such version.
        ArtefactError: a gate failed, or an artefact was removed.
    """
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, since the history keeps it")
    found = open_version(reference, storage)
    gates: dict[str, Any] = {"reason": reason, "force": force or ()}
    if force is None:
        gates |= {"max_perplexity_increase": None, "max_latency_increase": None, "same_tokenizer": False}
    config = dataclasses.replace(
        found.config,
        gates=GatesConfig(**gates),
        serve=dataclasses.replace(found.config.serve, replace=True),
    )
    results = run(found, config, "deploy")
    # where the endpoint served this version already, the stage was reused and the alias is still where it was
    Registry(storage).promote(found.version, reason, results["deploy"].manifest.details["endpoint"])
    return found.version
