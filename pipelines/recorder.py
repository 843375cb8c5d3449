"""The recorder of a pipeline: what its own MLflow run and its report show, while it runs and when it ends.

Nothing here may end a pipeline: a report that cannot be written is a warning.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kraken.config import RunConfig
from kraken.manifest import Manifest
from kraken.storage import Storage
from pipelines import description
from pipelines.curves import log_curves
from pipelines.datasets import datasets_of
from pipelines.outbox import one_line, without_password
from pipelines.report.facts import Facts, StageFacts, read_gates, read_training_history
from pipelines.tracking import NAME_TAG, PipelineRun, end_status
from pipelines.tracking_server import KIND_TAG

HEADLINES: dict[str, dict[str, str]] = {
    "pretrain": {"parameters": "parameters", "train_tokens": "train_tokens"},
    "evaluate": {
        "bits_per_byte": "bits_per_byte",
        "validation_perplexity": "perplexity",
        "parity_max_abs_diff": "parity_max_abs_diff",
    },
}
"""Stage -> metric of its manifest -> its name in the pipeline's run. With the curves these are all: the few by which
pipelines are compared. The stages' runs have every metric."""


class Recorder:
    """Records a pipeline in its MLflow run.

    Args:
        stages: (kind, fingerprint, kinds of the parents) of all stages that the run has.
        fingerprints: kind -> fingerprint of all stages that the pipeline has, which identify the report.
    """

    def __init__(
        self,
        config: RunConfig,
        stages: Sequence[tuple[str, str, tuple[str, ...]]],
        fingerprints: dict[str, str],
        run: PipelineRun,
    ):
        self._config, self._run, self._fingerprints = config, run, fingerprints
        self._storage = Storage(config.storage)
        self._stages = {kind: StageFacts(kind, fingerprint, parents) for kind, fingerprint, parents in stages}
        run.set_tags({KIND_TAG: "pipeline", NAME_TAG: config.name})
        run.describe(description.of_pipeline(self._facts()))

    def finished(self, manifest: Manifest, seconds: float, *, reused: bool) -> None:
        """A stage has its artefact.

        Args:
            seconds: wall time in this run.
        """
        kind = manifest.kind
        self._update(kind, state="reused" if reused else "made", manifest=manifest, seconds=seconds)
        if kind == "prepare":
            self._run.log_datasets(datasets_of(self._storage, manifest))
        if kind == "pretrain" and reused:
            log_curves(self._run, read_training_history(self._storage, manifest.fingerprint))
        headlines = HEADLINES.get(kind, {})
        self._run.log_metrics({headlines[name]: float(manifest.value(name)) for name in headlines}, step=0)
        self._run.describe(description.of_pipeline(self._facts()))

    def failed(self, error: BaseException) -> None:
        """The first stage without an artefact failed or was stopped, and the pipeline ends: writes the report."""
        kind = next((kind for kind, stage in self._stages.items() if stage.manifest is None), None)
        if kind is not None:
            state = "failed" if end_status(error) == "FAILED" else "stopped"
            self._update(kind, state=state, error=one_line(error))
        self.report()

    def report(self) -> None:
        """Write the report and link it."""
        from pipelines.report.write import report_location, report_name, write  # matplotlib, a second

        name = report_name(self._config.name, self._fingerprints)
        try:
            pretrain = self._stages.get("pretrain")
            history = read_training_history(self._storage, pretrain.fingerprint) if pretrain else []
            deploy = self._stages.get("deploy")
            gates = read_gates(self._storage, deploy) if deploy else ()
            facts = dataclasses.replace(self._facts(), history=history, gates=gates)
            for path in write(facts, self._storage, name):
                self._run.log_artifact(path)
        except Exception as error:
            print(f"report: not written ({one_line(error)})", flush=True)
            return
        print(f"report: {without_password(report_location(self._config.storage, name))}", flush=True)
        self._run.describe(description.of_pipeline(facts, self._run.artifact_link("report.html")))

    def _update(self, kind: str, **fields: Any) -> None:
        self._stages[kind] = dataclasses.replace(self._stages[kind], **fields)

    def _facts(self) -> Facts:
        return Facts(self._config, tuple(self._stages.values()), page=self._run.page)
