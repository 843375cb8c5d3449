"""The DAG: prepare -> pretrain -> convert -> evaluate -> deploy, as Ray tasks whose references are the edges.

What is finished is not run again: fingerprints decide, before the cluster is asked for anything.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kraken.config import ConfigError, RunConfig, to_dict
from kraken.environment import environment, provide_home
from kraken.manifest import Manifest
from kraken.storage import Storage
from pipelines import convert, deploy, evaluate, lineage, prepare, pretrain
from pipelines.errors import ClusterError
from pipelines.lease import Lease, submission
from pipelines.recorder import Recorder
from pipelines.stage import Stage, fingerprints
from pipelines.stop import StopSwitch
from pipelines.tracking import PipelineRun, RunRef, Tracker
from pipelines.variation import run_name
from serve.api_key import API_KEY_VARIABLE, ApiKey, api_key

STAGES: tuple[Stage, ...] = (prepare.STAGE, pretrain.STAGE, convert.STAGE, evaluate.STAGE, deploy.STAGE)
KINDS = tuple(stage.kind for stage in STAGES)

STOP_LIMIT_S = 300.0
"""Longest wait for the checkpoint that training writes when it is asked to stop; a second signal ends the wait."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage of a finished pipeline."""

    manifest: Manifest
    seconds: float
    """Wall time of this run: of the work, or of finding that there is none."""
    reused: bool


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of a pipeline that has not been run yet."""

    stage: Stage
    fingerprint: str
    manifest: Manifest | None
    """Of the artefact that will be reused; None when the stage will run."""
    first_step: int = 0
    """Of training that will run: the step at which it continues, its own or that of the run that it continues."""
    advice: str = ""
    """Of training that would start at step 0: the earlier run that it could continue from, in a line."""


def identify(config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The run with every setting resolved that its identity needs, and kind -> fingerprint of all stages.

    Raises:
        ConfigError: `continue_from` names no run that fits.
    """
    known = fingerprints((prepare.STAGE,), config)
    config = lineage.resolve(config.resolved(), known["prepare"])
    return config, fingerprints(STAGES, config, known)


def plan(config: RunConfig, until: str = "deploy", found: dict[str, str] | None = None) -> list[PlannedStage]:
    """The stages, each with the artefact that it would reuse. Asks the storage and the endpoint, changes nothing.

    Args:
        found: the stages' fingerprints, where the config is identified already; the corpus is read for them.
    """
    if found is None:
        config, found = identify(config)
    planned: list[PlannedStage] = []
    for stage in STAGES[: KINDS.index(until) + 1]:
        fingerprint = found[stage.kind]
        parents_reused = all(p.manifest is not None for p in planned if p.stage.kind in stage.parents)
        manifest = stage.find(config, fingerprint) if parents_reused else None
        first_step, advice = _beginning(config, found) if stage.kind == "pretrain" and manifest is None else (0, "")
        planned.append(PlannedStage(stage, fingerprint, manifest, first_step, advice))
    return planned


def _beginning(config: RunConfig, found: dict[str, str]) -> tuple[int, str]:
    """The step at which training would begin, and the advice if that is step 0."""
    if step := lineage.newest_step(Storage(config.storage), found["pretrain"]):
        return step, ""
    if config.continue_from is not None:
        return lineage.split_origin(config.continue_from)[1] or 0, ""
    return 0, lineage.suggest(config, found["prepare"], found["pretrain"])


def describe(planned: list[PlannedStage]) -> str:
    """The graph, a line per stage, for `--dry-run`."""
    lines = [f"{'stage':10} {'fingerprint':16} {'needs':28} would be"]
    for p in planned:
        state = "run" if p.manifest is None else f"reused (made {p.manifest.created_at})"
        if p.first_step:
            state = f"continue at step {p.first_step}"
        lines.append(f"{p.stage.kind:10} {p.fingerprint[:16]} {', '.join(p.stage.parents) or '-':28} {state}")
    return "\n".join([*lines, *announcements(planned)])


def announcements(planned: list[PlannedStage]) -> list[str]:
    """Advice on a plan before it is run, one line for each stage that has any."""
    return [f"{p.stage.kind}: {p.advice}" for p in planned if p.advice]


def run(config: RunConfig, until: str = "deploy") -> dict[str, StageResult]:
    """Run the pipeline up to a stage, on the cluster at hand or one of its own.

    Returns:
        Kind -> result, in the order in which data flows.
    Raises:
        ConfigError, ArtefactError: the first stage that failed says why; everything finished stays.
        ClusterError: another process runs this very pipeline.
        RunStopped: training had to end early, and the same call continues it.
    """
    return _run(config, until, lambda planned: None)


def run_and_advise(config: RunConfig, until: str = "deploy") -> dict[str, StageResult]:
    """As `run`, for a person who can choose: first says which earlier training a new one could continue from."""

    def announce(planned: list[PlannedStage]) -> None:
        for line in announcements(planned):
            print(line, flush=True)

    return _run(config, until, announce)


def run_identified(config: RunConfig, found: dict[str, str], until: str) -> dict[str, StageResult]:
    """As `run`, where the fingerprints are those of artefacts that exist and not what the config gives today."""
    return _run(config, until, lambda planned: None, found)


def _run(
    config: RunConfig,
    until: str,
    announce: Callable[[list[PlannedStage]], None],
    found: dict[str, str] | None = None,
) -> dict[str, StageResult]:
    import ray

    from pipelines import cluster, preflight

    if until == "deploy" and cluster.is_embedded(config):
        raise ConfigError(
            "the endpoint needs a cluster that outlives this command, and none runs: start one with `make run` or "
            "`python -m jobs.local run PRESET`, or set RAY_ADDRESS to the host:port of a cluster"
        )
    access_key = api_key() if until == "deploy" else None
    if found is None:
        config, found = identify(config)
    with cluster.connect(config):
        tracker = Tracker(config.storage, config.experiment, submission())
        key = tracker.key("pipeline", config.name, found)
        with sole_pipeline(tracker, key, run_name(config), to_dict(config)) as pipeline_run:
            results: dict[str, StageResult] = {}
            references: dict[str, ray.ObjectRef[Manifest]] = {}
            planned = plan(config, until, found)
            if any(p.stage.kind == "deploy" and p.manifest is None for p in planned):
                deploy.require_possible(config)
            if any(p.stage.kind == "pretrain" and p.manifest is None for p in planned):
                preflight.check(config)
            announce(planned)
            stop = StopSwitch.make()
            stages = [(p.stage.kind, p.fingerprint, p.stage.parents) for p in planned]
            recorder = Recorder(config, stages, found, pipeline_run)
            try:
                for p in planned:
                    if p.manifest is not None:
                        started_at = time.monotonic()
                        p.stage.record_reuse(config, p.manifest, pipeline_run.ref)
                        references[p.stage.kind] = ray.put(p.manifest)
                        results[p.stage.kind] = StageResult(p.manifest, time.monotonic() - started_at, reused=True)
                        recorder.finished(p.manifest, results[p.stage.kind].seconds, reused=True)
                        print(f"{p.stage.kind}: reused, made {p.manifest.created_at}", flush=True)
                        continue
                    # Ray's types of a remote function know no keyword arguments.
                    task: Any = ray.remote(max_retries=0)(run_stage).options(
                        name=p.stage.kind, **cluster.stage_options(config, p.stage.kind)
                    )
                    parents = [references[kind] for kind in p.stage.parents]
                    references[p.stage.kind] = task.remote(
                        p.stage.kind,
                        config,
                        p.fingerprint,
                        pipeline_run.ref,
                        stop,
                        *parents,
                        access_key=access_key if p.stage.kind == "deploy" else None,
                    )
                for p in planned:
                    if p.manifest is None:
                        started_at = time.monotonic()
                        manifest = cluster.result_of(references[p.stage.kind])
                        results[p.stage.kind] = StageResult(manifest, time.monotonic() - started_at, reused=False)
                        recorder.finished(manifest, results[p.stage.kind].seconds, reused=False)
                        print(f"{p.stage.kind}: done in {manifest.seconds:.1f} s", flush=True)
            except BaseException as error:
                try:
                    if not isinstance(error, Exception):
                        end_training(stop, references)
                finally:
                    cluster.cancel_unfinished(references.values())
                if isinstance(error, Exception):  # little time may be left after a cancellation
                    recorder.failed(error)
                raise
            recorder.report()
    return {p.stage.kind: results[p.stage.kind] for p in planned}


@contextlib.contextmanager
def sole_pipeline(
    tracker: Tracker, key: str, name: str, params: Mapping[str, Any], what: str = "training"
) -> Iterator[PipelineRun]:
    """`Tracker.pipeline` for one process at a time; needs a connection to Ray.

    Raises:
        ClusterError: on entering; another process has this pipeline's run open. That run is left alone: the refusal is
            recorded in a run of its own.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Lease(f"pipeline/{key}", what))
        except ClusterError:
            with tracker.pipeline(f"{key}/{uuid.uuid4().hex}", f"{name} (refused)", params):
                raise
        yield stack.enter_context(tracker.pipeline(key, name, params))


def end_training(stop: StopSwitch, references: dict[str, Any]) -> None:
    """If training runs, ask it to write a checkpoint and end, and wait for its end. Otherwise a no-op.

    Args:
        references: kind -> the stage's task, or its manifest.
    """
    import ray

    if "pretrain" not in references or not ray.wait([references["prepare"]], timeout=0)[0]:
        return
    if ray.wait([references["pretrain"]], timeout=0)[0]:
        return
    print("pretrain: stopping after a checkpoint; a second signal ends it without", flush=True)
    stop.flip("asked to by a signal")
    ray.wait([references["pretrain"]], timeout=STOP_LIMIT_S)


def run_stage(
    kind: str,
    config: RunConfig,
    fingerprint: str,
    pipeline: RunRef,
    stop: StopSwitch,
    *parents: Manifest,
    access_key: ApiKey | None = None,
) -> Manifest:
    """The body of a stage's Ray task. Parents arrive as values of the references they were given as.

    Args:
        access_key: of the endpoint; from the driver, since a cluster's processes need not have its environment.
    """
    provide_home()
    stage = STAGES[KINDS.index(kind)]
    with environment({} if access_key is None else {API_KEY_VARIABLE: access_key.value}):
        return stage.run(config, fingerprint, {parent.kind: parent for parent in parents}, pipeline, stop)
