"""Runs a comparison: every model, learning rate and seed through the pipeline, then one report and one MLflow run.

Each training is an ordinary pipeline up to `pretrain`: prepared data are shared, and finished trainings are reused, so
that a comparison that was interrupted continues with the same command.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken.checkpoint.history import read_history
from kraken.config import ConfigError, RunConfig, to_dict
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest, Metric, finish_artefact, make_fingerprint
from kraken.plan.cost import num_parameters
from kraken.storage import Storage
from pipelines import comparison, end_to_end, prepare, pretrain
from pipelines.comparison import Comparison, ModelResult, Training
from pipelines.lease import submission
from pipelines.stage import fingerprints
from pipelines.tracking import NOTE_TAG, PipelineRun, Tracker

KIND = "compare"
FingerprintOf = Callable[[RunConfig], str]
PARAMETER_TOLERANCE = 0.02
"""Models whose parameters differ by a larger share are not of one budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """What is compared, at equal parameters and tokens."""

    models: tuple[RunConfig, ...]
    """One run per model, with different names; the first seed is `train.seed`."""
    num_seeds: int = 3
    """Trainings of each model at its learning rate."""
    learning_rates: tuple[float, ...] = ()
    """Rates tried for each model with its first seed, the best of which it gets; none: the rate of its run."""
    baseline: str | None = None
    """Model that the others are measured against; None takes the first standard Transformer, else the first model."""
    allow_unequal: bool = False
    """Whether models may differ in parameters by more than 2 %."""

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"seeds={self.num_seeds} is not positive; 3 show how far seeds differ")
        names = [config.name for config in self.models]
        if len(names) < 2:
            raise ConfigError(f"only {', '.join(names) or 'nothing'} is given; a comparison needs two models or more")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two models are named {twice}; give each preset once, and no --name")
        if self.baseline is not None and self.baseline not in names:
            raise ConfigError(
                f"baseline={self.baseline} is none of the compared models; choose from: {', '.join(names)}"
            )
        if origin := self.models[0].continue_from:
            raise ConfigError(
                f"continue_from={origin}, but a comparison trains every model from its start; leave --continue-from out"
            )
        for config in self.models[1:]:
            _require_equal(self.models[0], config)
        for _ in self.first_runs():
            pass  # each rate is checked as its config is built

    @property
    def baseline_name(self) -> str:
        """The baseline, chosen."""
        standard = (config.name for config in self.models if config.model.architecture == "standard")
        return self.baseline or next(standard, self.models[0].name)

    def rates(self, model: RunConfig) -> tuple[float, ...]:
        """Learning rates to try for a model, each once."""
        return tuple(dict.fromkeys(self.learning_rates)) or (model.train.learning_rate,)

    def first_runs(self) -> Iterator[tuple[RunConfig, RunConfig]]:
        """(model, its training) at every rate with the first seed."""
        for index in range(len(self.rates(self.models[0]))):
            for model in self.models:
                yield model, _vary(model, self.rates(model)[index], model.train.seed)

    def other_runs(self, rates: dict[str, float]) -> Iterator[tuple[RunConfig, RunConfig]]:
        """(model, its training) with the other seeds, given each model's rate. Models take turns, so that a machine
        that gets slower is no model's disadvantage."""
        for index in range(1, self.num_seeds):
            for model in self.models:
                yield model, _vary(model, rates[model.name], model.train.seed + index)

    @property
    def num_trainings(self) -> int:
        """All of them, tuning included."""
        return len(self.models) * (len(self.rates(self.models[0])) + self.num_seeds - 1)


def _vary(model: RunConfig, learning_rate: float, seed: int) -> RunConfig:
    train = dataclasses.replace(model.train, learning_rate=learning_rate, seed=seed)
    return dataclasses.replace(model, name=comparison.label(model.name, seed, learning_rate), train=train)


def _require_equal(first: RunConfig, other: RunConfig) -> None:
    """Refuse two runs whose losses cannot be compared."""
    theirs = _common_settings(other)
    for field, value in _common_settings(first).items():
        if theirs[field] != value:
            raise ConfigError(
                f"{first.name} has {field}={value}, {other.name} has {theirs[field]}; models are compared at equal "
                f"{field}, so give it to all of them"
            )


def _common_settings(config: RunConfig) -> dict[str, Any]:
    c = config.train
    return {
        "storage": config.storage,
        "experiment": config.experiment,
        **{f"data.{name}": value for name, value in to_dict(config.data).items()},
        "model.context_length": config.model.context_length,
        "train.steps x train.sequences_per_step": c.steps * c.sequences_per_step,  # so the tokens are equal, too
        "train.seed": c.seed,
        "train.validation_windows": c.validation_windows,
    }


def require_equal_parameters(config: CompareConfig) -> None:
    """Refuse models of different budgets.

    Raises:
        ConfigError: names the largest and the smallest.
    """
    if config.allow_unequal:
        return
    counts = {model.name: num_parameters(model.model) for model in config.models}
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    excess = counts[largest] / counts[smallest] - 1.0
    if excess > PARAMETER_TOLERANCE:
        raise ConfigError(
            f"{largest} has {counts[largest]:,} parameters, {100 * excess:.1f} % more than the {counts[smallest]:,} of "
            f"{smallest}; choose models within {100 * PARAMETER_TOLERANCE:g} % of each other, or give --allow-unequal"
        )


# Running


@dataclass(frozen=True, slots=True)
class CompareResult:
    """A finished comparison, and where it is."""

    comparison: Comparison
    folder: Path
    """Local folder of the report's files, an artefact like a stage's."""
    page: str
    """Address of its run in the MLflow UI."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A training that is there."""

    training: Training
    manifest: Manifest


def run(config: CompareConfig) -> CompareResult:
    """Train what is not there yet, on the cluster at hand or one of its own, and report.

    Raises:
        ConfigError, ArtefactError: what is finished stays; the same command continues.
    """
    from pipelines import cluster

    require_equal_parameters(config)
    first = config.models[0]
    fingerprint_of = training_fingerprints(config)
    fingerprint = compare_fingerprint(config, fingerprint_of)
    with cluster.connect(first):
        tracker = Tracker(first.storage, first.experiment, submission())
        key = tracker.key(KIND, None, {KIND: fingerprint})
        with end_to_end.sole_pipeline(tracker, key, "comparison", params_of(config), "comparison") as mlflow_run:
            finished = train_all(config, fingerprint_of)
            result = comparison.compare([one.training for one in finished], config.baseline_name)
            folder = write(config, fingerprint, result, finished)
            record(mlflow_run, result, finished, folder)
            return CompareResult(result, folder, mlflow_run.page)


def training_fingerprints(config: CompareConfig) -> FingerprintOf:
    """What gives a training's fingerprint. The corpus, which all of them share, is read only once."""
    section = prepare.STAGE.section(config.models[0])
    stages = (dataclasses.replace(prepare.STAGE, section=lambda run: section), pretrain.STAGE)
    return lambda run: fingerprints(stages, run)["pretrain"]


def compare_fingerprint(config: CompareConfig, fingerprint_of: FingerprintOf) -> str:
    """Of everything that determines the trainings and the report."""
    section = {
        "num_seeds": config.num_seeds,
        "learning_rates": config.learning_rates,
        "baseline": config.baseline_name,
    }
    return make_fingerprint(KIND, section, {model.name: fingerprint_of(model) for model in config.models})


def describe(config: CompareConfig) -> str:
    """The trainings and which of them would run, a line each, for `--dry-run`."""
    runs = [run for _, run in config.first_runs()]
    is_tuned = len(runs) > len(config.models)
    if not is_tuned:
        runs += [run for _, run in config.other_runs({m.name: m.train.learning_rate for m in config.models})]
    fingerprint_of = training_fingerprints(config)
    width = max(len(run.name) for run in runs)
    lines = [f"{'training':{width}} {'fingerprint':16} would be"]
    for run in runs:
        manifest = find(run, fingerprint_of)
        state = "run" if manifest is None else f"reused (made {manifest.created_at})"
        lines.append(f"{run.name:{width}} {fingerprint_of(run)[:16]} {state}")
    if is_tuned and config.num_seeds > 1:
        lines.append(f"then each model's other seeds at its best rate: {config.num_trainings - len(runs)} trainings")
    return "\n".join(lines)


def train_all(config: CompareConfig, fingerprint_of: FingerprintOf) -> list[Finished]:
    """Every training, those with the first seed first."""
    progress = Progress(config.num_trainings)
    finished = train_each(list(config.first_runs()), progress, fingerprint_of)
    best: dict[str, float] = {}
    for model in config.models:
        tried = [one.training for one in finished if one.training.model == model.name]
        best[model.name] = comparison.best(tried).learning_rate
        if len(tried) > 1:
            print(f"compare: {model.name} gets the learning rate {best[model.name]:g}", flush=True)
    return finished + train_each(list(config.other_runs(best)), progress, fingerprint_of)


def train_each(
    runs: list[tuple[RunConfig, RunConfig]], progress: "Progress", fingerprint_of: FingerprintOf
) -> list[Finished]:
    """Trainings one after the other, as (model, training)."""
    is_ready = [find(run, fingerprint_of) is not None for _, run in runs]
    return [train(model, run, progress, sum(is_ready[index + 1 :])) for index, (model, run) in enumerate(runs)]


def find(run: RunConfig, fingerprint_of: FingerprintOf) -> Manifest | None:
    """The manifest of a training that need not be run again."""
    return pretrain.STAGE.find(run, fingerprint_of(run))


def train(model: RunConfig, run: RunConfig, progress: "Progress", num_ready: int) -> Finished:
    """One training through the pipeline, or its finished artefact; `num_ready` of those to come are finished."""
    try:
        result = end_to_end.run(run, until="pretrain")["pretrain"]
    except ArtefactError as error:
        raise ArtefactError(f"{run.name}: {error}") from error
    manifest = result.manifest
    storage = Storage(run.storage)
    storage.fetch("pretrain", manifest.fingerprint)
    training = Training(
        model=model.name,
        seed=run.train.seed,
        learning_rate=run.train.learning_rate,
        parameters=int(manifest.value("parameters")),
        history=read_history(storage.folder("pretrain", manifest.fingerprint)),
    )
    progress.report(training, manifest, result.reused, num_ready)
    return Finished(training, manifest)


class Progress:
    """A line per finished training, with what is left."""

    def __init__(self, num_trainings: int):
        self._total = num_trainings
        self._durations_s: list[float] = []

    def report(self, training: Training, manifest: Manifest, reused: bool, num_ready: int) -> None:
        """Print the line; `num_ready` of the trainings that are left are finished already."""
        self._durations_s.append(manifest.seconds)
        done = len(self._durations_s)
        left_s = (self._total - done - num_ready) * statistics.fmean(self._durations_s)
        state = "reused" if reused else f"trained in {duration(manifest.seconds)}"
        loss = f"validation loss {training.final_validation_loss:.4f}"
        left = f"about {duration(left_s)} left"
        print(f"compare: {done} of {self._total} | {training.label}: {loss}, {state} | {left}", flush=True)


def duration(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# Recording


def write(config: CompareConfig, fingerprint: str, result: Comparison, finished: list[Finished]) -> Path:
    """Write the report as an artefact, whose parents are the trainings."""
    started_at = time.monotonic()
    storage = Storage(config.models[0].storage)
    folder = storage.folder(KIND, fingerprint)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    comparison.write(result, folder)
    finish_artefact(
        folder,
        started_at=started_at,
        kind=KIND,
        fingerprint=fingerprint,
        config=to_dict(config),
        parents={one.training.label: one.manifest.fingerprint for one in finished},
        metrics={f"{model.name}.validation_loss": Metric(model.mean_loss, "nats/token") for model in result.models},
    )
    storage.publish(folder)
    return folder


def params_of(config: CompareConfig) -> dict[str, Any]:
    """What the comparison's MLflow run shows as its params."""
    first = config.models[0]
    return {
        "models": [model.name for model in config.models],
        "seeds": [first.train.seed + index for index in range(config.num_seeds)],
        "learning_rates": config.rates(first) if config.learning_rates else "each model's own",
        "baseline": config.baseline_name,
        "train_tokens": first.train.steps * first.train.sequences_per_step * first.model.context_length,
        "data": to_dict(first.data),
    }


def record(run: PipelineRun, result: Comparison, finished: list[Finished], folder: Path) -> None:
    """Put numbers and files into the MLflow run, curves into a child run per model, and link the pipelines."""
    children: list[str] = []
    for model in result.models:
        run.log_metrics({f"{name}.{model.name}": value for name, value in _metrics(result, model).items()}, step=0)
        with run.stage(model.name, model.name, _params(model)) as child:
            curve = model.curve
            for index, tokens in enumerate(curve.tokens):
                values = {
                    "validation_loss": curve.mean[index],
                    "lowest_validation_loss": curve.lowest[index],
                    "highest_validation_loss": curve.highest[index],
                    "seconds": curve.seconds[index],
                }
                child.log_metrics(values, step=tokens)  # counts tokens, so that MLflow's curves are over tokens
            child.log_metrics(_metrics(result, model), step=result.tokens)
            children.append(child.run_id)
    for path in sorted(folder.iterdir()):
        run.log_artifact(path)
    for one in finished:
        run.link(one.training.label, "pretrain", one.manifest.fingerprint)
    link = f"[The models' curves in one chart]({run.compare_link(children)})"
    run.set_tags({NOTE_TAG: f"{link}\n\n{comparison.markdown(result)}"})


def _metrics(result: Comparison, model: ModelResult) -> dict[str, float]:
    metrics = {
        "final_validation_loss": model.mean_loss,
        "excess_over_baseline": result.excess(model),
        "parameters": float(model.parameters),
        "tokens_per_second": model.tokens_per_second,
        "train_seconds": model.seconds,
    }
    if model.loss_deviation is not None:
        metrics["final_validation_loss_std"] = model.loss_deviation
    return metrics


def _params(model: ModelResult) -> dict[str, Any]:
    return {
        "learning_rate": model.learning_rate,
        "seeds": [training.seed for training in model.trainings],
        "parameters": model.parameters,
    }


def render(result: CompareResult) -> str:
    """The end of the command's output: the report, and where it is."""
    return "\n".join(
        [
            "",
            comparison.markdown(result.comparison),
            f"figure {result.folder / comparison.FIGURE_NAME} | numbers {result.folder / comparison.JSON_NAME} | "
            f"MLflow {result.page} (`make ui` starts a local one)",
        ]
    )
