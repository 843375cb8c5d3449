"""What a report is about: a pipeline's settings, and what is known of each stage when the report is written."""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kraken.checkpoint.folders import is_checkpoint
from kraken.checkpoint.history import HISTORY_NAME, History
from kraken.config import RunConfig
from kraken.manifest import Manifest, Metric
from kraken.storage import Storage
from pipelines import gates
from pipelines.variation import run_name

StageState = Literal["made", "reused", "failed", "stopped", "not run"]


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of a pipeline."""

    kind: str
    fingerprint: str
    parents: tuple[str, ...]
    """Kinds of the stages whose artefacts it reads."""
    state: StageState = "not run"
    manifest: Manifest | None = None
    """Of the finished artefact."""
    seconds: float = 0.0
    """Wall time in this run of the pipeline: of the work, or of finding that there is none."""
    error: str = ""
    """Why it failed or was stopped, in one line."""

    @property
    def work_seconds(self) -> float:
        """Time of the work itself, as the manifest has it; 0 where there is none."""
        return self.manifest.seconds if self.manifest else 0.0

    @property
    def num_bytes(self) -> int:
        """Size of the artefact's files."""
        return sum(file.num_bytes for file in self.manifest.files) if self.manifest else 0


@dataclass(frozen=True, slots=True)
class Facts:
    """One run of a pipeline."""

    config: RunConfig
    stages: tuple[StageFacts, ...]
    """In the order in which data flows."""
    history: History = dataclasses.field(default_factory=list)
    """Reports of the training; empty where there is none yet."""
    gates: Sequence[Mapping[str, Any]] = ()
    """Results of the gates before deployment, as `gates.json` holds them."""
    page: str = ""
    """Address of the run in the MLflow UI."""
    written_at: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def name(self) -> str:
        """The run's name in MLflow."""
        return run_name(self.config)

    @property
    def warning(self) -> str:
        """Why the pipeline ended before its last stage, in one line; empty where it did not."""
        ended = (stage for stage in self.stages if stage.error)
        return next((f"{stage.kind} {stage.state}: {stage.error}" for stage in ended), "")

    def manifest(self, kind: str) -> Manifest | None:
        """The manifest of a stage, if there is one."""
        return next((stage.manifest for stage in self.stages if stage.kind == kind), None)

    def metric(self, kind: str, name: str) -> Metric | None:
        """A metric of a stage's manifest, if there is one."""
        manifest = self.manifest(kind)
        return manifest.metrics.get(name) if manifest else None

    def finished(self) -> Iterator[tuple[StageFacts, Manifest]]:
        """The stages that have an artefact."""
        for stage in self.stages:
            if stage.manifest is not None:
                yield stage, stage.manifest

    def fingerprints(self) -> Mapping[str, str]:
        """Kind -> fingerprint of all stages."""
        return {stage.kind: stage.fingerprint for stage in self.stages}


def read_training_history(storage: Storage, fingerprint: str) -> History:
    """The reports of a training, finished or not; empty where there are none, or they are damaged."""
    folder = storage.root / "pretrain" / fingerprint[:16]
    checkpoints = [path for path in storage.list_folders(folder) if is_checkpoint(path)]
    for path in (folder, *reversed(checkpoints)):
        if text := storage.read_text(path / HISTORY_NAME):
            try:
                return [json.loads(line) for line in text.splitlines()]
            except ValueError:
                continue
    return []


def read_gates(storage: Storage, stage: StageFacts) -> Sequence[Mapping[str, Any]]:
    """Results of the gates of a deploy stage: of its manifest, or of the attempt that failed on this machine."""
    if stage.manifest is not None:
        found: Sequence[Mapping[str, Any]] = stage.manifest.details.get("gates", [])
        return found
    text = storage.read_text(storage.root / stage.kind / stage.fingerprint[:16] / gates.NAME)
    if stage.state != "failed" or text is None:
        return ()
    try:
        results: Sequence[Mapping[str, Any]] = json.loads(text)
        return results
    except ValueError:
        return ()
