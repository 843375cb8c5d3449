"""A stage: what determines its output, what it needs, and how it is run at most once.

The fingerprints of a whole pipeline follow from its config alone, before anything has run. A stage whose fingerprint is
in the storage is reused; everything else is run into a folder named after its fingerprint, and recorded in MLflow.
"""

import errno
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken.config import RunConfig, to_dict
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest, Metric, finish_artefact, make_fingerprint
from kraken.storage import Storage
from pipelines.datasets import datasets_of
from pipelines.description import of_stage
from pipelines.identity import determining
from pipelines.stop import StopSwitch
from pipelines.tracking import RunRef, StageRun


@dataclass(frozen=True, slots=True)
class Work:
    """The arguments of a stage's work."""

    config: RunConfig
    fingerprint: str
    storage: Storage
    folder: Path
    """The artefact's folder. Files of an interrupted attempt are still in it."""
    parents: dict[str, Manifest]
    run: StageRun
    """The stage's MLflow run."""
    stop: StopSwitch | None = None
    """Asks for an early end, where the stage can end early and be continued."""
    pipeline: RunRef | None = None
    """The pipeline's MLflow run, which shows the curves of training, too."""

    def parent_folder(self, kind: str) -> Path:
        """Local folder of a parent's artefact."""
        return self.storage.folder(kind, self.parents[kind].fingerprint)

    def parent_location(self, kind: str) -> str:
        """Path or URI of a parent's artefact, for processes on other nodes."""
        return self.storage.location(kind, self.parents[kind].fingerprint)


Outcome = tuple[dict[str, Metric], dict[str, Any]]
"""A stage's metrics and details, for its manifest."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One node of the pipeline."""

    kind: str
    parents: tuple[str, ...]
    section: Callable[[RunConfig], dict[str, Any]]
    """What the stage reads of the config, as plain JSON types. All of it is recorded, and the part that determines the
    output (`identity.py`) is hashed."""
    work: Callable[[Work], Outcome]
    still_valid: Callable[[RunConfig, Manifest], bool] = lambda config, manifest: True
    """Whether a finished artefact can be reused, which its fingerprint alone does not say: where the output is not only
    files, or where what happened on the way has to be compared. May raise ConfigError."""

    def find(self, config: RunConfig, fingerprint: str) -> Manifest | None:
        """The manifest of a finished run of this stage that can be reused."""
        manifest = Storage(config.storage).find(self.kind, fingerprint)
        return manifest if manifest is not None and self.still_valid(config, manifest) else None

    def run(
        self,
        config: RunConfig,
        fingerprint: str,
        parents: dict[str, Manifest],
        pipeline: RunRef,
        stop: StopSwitch | None = None,
    ) -> Manifest:
        """Do the work, write the manifest, record both.

        Raises:
            ConfigError, ArtefactError: with the way out; the MLflow run then ends as FAILED.
            RunStopped: it was asked to; the MLflow run then ends as KILLED.
        """
        started_at = time.monotonic()
        storage = Storage(config.storage)
        for parent in parents.values():
            storage.fetch(parent.kind, parent.fingerprint)
        folder = storage.folder(self.kind, fingerprint)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)  # from here on until the end it is unfinished
        section = self.section(config)
        with self._recorded(pipeline, section) as run:
            run.describe(of_stage(self.kind, config))
            try:
                metrics, details = self.work(Work(config, fingerprint, storage, folder, parents, run, stop, pipeline))
                manifest = finish_artefact(
                    folder,
                    started_at=started_at,
                    kind=self.kind,
                    fingerprint=fingerprint,
                    config=section,
                    parents={kind: parent.fingerprint for kind, parent in parents.items()},
                    metrics=metrics,
                    details=details,
                )
                storage.publish(folder)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise ArtefactError(
                    f"storage={config.storage} has no space left for {self.kind}; free some and run the same command "
                    "again: what is finished stays"
                ) from error
            record(run, storage, manifest, reused=False)
            run.describe(of_stage(self.kind, config, manifest))
        return manifest

    def record_reuse(self, config: RunConfig, manifest: Manifest, pipeline: RunRef) -> None:
        """Show a reused artefact in the pipeline's MLflow run, so that runs can be compared whole."""
        with self._recorded(pipeline, manifest.config) as run:
            record(run, Storage(config.storage), manifest, reused=True)
            run.describe(of_stage(self.kind, config, manifest))

    def _recorded(self, pipeline: RunRef, section: dict[str, Any]) -> AbstractContextManager[StageRun]:
        return pipeline.stage(self.kind, self.kind, section)


def fingerprints(
    stages: tuple[Stage, ...], config: RunConfig, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Kind -> fingerprint for stages in the order in which data flows.

    Args:
        known: fingerprints that need not be computed again.
    """
    found = dict(known or {})
    for stage in stages:
        if stage.kind not in found:
            parents = {kind: found[kind] for kind in stage.parents}
            section = determining(stage.kind, stage.section(config))
            found[stage.kind] = make_fingerprint(stage.kind, section, parents)
    return found


def record(run: StageRun, storage: Storage, manifest: Manifest, *, reused: bool) -> None:
    """Put a manifest and its metrics into an MLflow run; metrics of training count from its last step."""
    path = storage.folder(manifest.kind, manifest.fingerprint) / MANIFEST_NAME
    run.log_manifest(path, artefact=storage.location(manifest.kind, manifest.fingerprint), reused=reused)
    run.log_datasets(datasets_of(storage, manifest))
    step = int(manifest.value("steps")) if "steps" in manifest.metrics else 0
    run.log_metrics({name: float(metric.value) for name, metric in manifest.metrics.items()}, step)


def section_of(*names: str) -> Callable[[RunConfig], dict[str, Any]]:
    """A `Stage.section` that is some of the config's own sections."""
    return lambda config: {name: to_dict(getattr(config, name)) for name in names}
