"""A comparison of finished trainings: curves, a table, a figure and compare.json.

It needs nothing but the trainings' histories, wherever they ran, and neither Ray nor MLflow:

    trainings = [Training("standard_10m", 1337, 1e-3, 10_000_000, read_history(folder)), ...]
    write(compare(trainings, baseline="standard_10m"), Path("report"))
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kraken.checkpoint.history import History
from kraken.config import ConfigError
from kraken.manifest import ArtefactError, write_atomically

JSON_NAME, TABLE_NAME, FIGURE_NAME, VECTOR_NAME = "compare.json", "compare.md", "compare.png", "compare.svg"

LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Distinguishable without colour vision (Okabe and Ito, 2008)."""
LINE_STYLES = ("-", "--", "-.", ":")
HIDDEN_START = 0.25
"""Losses of the first tokens, this share of all, may lie outside the figure: the loss falls so far there that
differences between models would not be visible."""
SMALLEST_SPAN = 0.02
"""The axis of losses spans at least this share of the loss, so that noise does not look like a difference."""


@dataclass(frozen=True, slots=True)
class Training:
    """One finished training."""

    model: str
    seed: int
    learning_rate: float
    parameters: int
    history: History
    """Reports by step, as `kraken.checkpoint.history` reads them: `tokens`, `seconds`, at times `validation_loss`."""

    @property
    def validations(self) -> History:
        """The reports with a validation loss."""
        return [report for report in self.history if "validation_loss" in report]

    @property
    def final_validation_loss(self) -> float:
        """Nats per token after the last step."""
        return self.history[-1]["validation_loss"]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(self.history[-1]["tokens"])

    @property
    def seconds(self) -> float:
        """Time in training, validation included, over all restarts."""
        return self.history[-1]["seconds"]

    @property
    def label(self) -> str:
        """Name of this training in tables and figures: model, seed and learning rate."""
        return label(self.model, self.seed, self.learning_rate)


def label(model: str, seed: int, learning_rate: float) -> str:
    """A training's name, also of its pipeline's MLflow run."""
    return f"{model}-seed{seed}-lr{learning_rate:g}"


@dataclass(frozen=True, slots=True)
class Curve:
    """Validation loss over the seeds of a model, one entry per validation."""

    tokens: list[int]
    seconds: list[float]
    """Mean time at which the seeds had seen that many tokens."""
    mean: list[float]
    lowest: list[float]
    highest: list[float]


@dataclass(frozen=True, slots=True)
class ModelResult:
    """What a comparison says about one model."""

    name: str
    trainings: tuple[Training, ...]
    """One per seed, all at the chosen learning rate."""
    tuning: tuple[Training, ...]
    """One per learning rate, all with the first seed; only the chosen one when nothing was tuned."""

    @property
    def parameters(self) -> int:
        return self.trainings[0].parameters

    @property
    def learning_rate(self) -> float:
        return self.trainings[0].learning_rate

    @property
    def losses(self) -> list[float]:
        """Final validation losses, one per seed."""
        return [training.final_validation_loss for training in self.trainings]

    @property
    def mean_loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def loss_deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def seconds(self) -> float:
        """Mean time of a training."""
        return statistics.fmean(training.seconds for training in self.trainings)

    @property
    def tokens_per_second(self) -> float:
        """Of all seeds together, validation included."""
        return sum(training.tokens for training in self.trainings) / sum(t.seconds for t in self.trainings)

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` when the chosen rate ends the range that was tried: a better one may lie beyond."""
        rates = [training.learning_rate for training in self.tuning]
        if len(rates) < 2 or min(rates) < self.learning_rate < max(rates):
            return None
        return "lowest" if self.learning_rate == min(rates) else "highest"

    @property
    def curve(self) -> Curve:
        """The validations that all seeds have."""
        points = [{int(report["tokens"]): report for report in t.validations} for t in self.trainings]
        tokens = sorted(set.intersection(*map(set, points)))
        losses = np.array([[seed[count]["validation_loss"] for count in tokens] for seed in points])
        seconds = np.array([[seed[count]["seconds"] for count in tokens] for seed in points])
        return Curve(
            tokens,
            seconds.mean(axis=0).tolist(),
            losses.mean(axis=0).tolist(),
            losses.min(axis=0).tolist(),
            losses.max(axis=0).tolist(),
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models trained on equally many tokens."""

    models: tuple[ModelResult, ...]
    baseline: ModelResult
    """One of the models: what the others are measured against."""

    @property
    def tokens(self) -> int:
        """Tokens of every training."""
        return self.baseline.trainings[0].tokens

    @property
    def seeds(self) -> list[int]:
        return [training.seed for training in self.baseline.trainings]

    def excess(self, model: ModelResult) -> float:
        """How far a model's mean loss lies above the baseline's, as a fraction of the baseline's."""
        return model.mean_loss / self.baseline.mean_loss - 1.0


def compare(trainings: Sequence[Training], baseline: str | None = None) -> Comparison:
    """Group trainings by model. Of several learning rates, the one that is best with the model's first seed counts.

    Args:
        trainings: the first training of a model has its first seed.
        baseline: name of a model; None takes the first.

    Raises:
        ArtefactError: a training is unfinished, or they saw different numbers of tokens.
        ConfigError: no such baseline.
    """
    assert trainings, "nothing to compare"
    for training in trainings:
        if not training.history or "validation_loss" not in training.history[-1]:
            raise ArtefactError(f"the history of {training.label} does not end in a validation; finish that training")
        if training.tokens != trainings[0].tokens:
            raise ArtefactError(
                f"{training.label} ends after {training.tokens:,} tokens and {trainings[0].label} after "
                f"{trainings[0].tokens:,}; train all of them equally long"
            )
    names = dict.fromkeys(training.model for training in trainings)
    models = {name: _result(name, [t for t in trainings if t.model == name]) for name in names}
    name = baseline or next(iter(models))
    if name not in models:
        raise ConfigError(f"baseline={name} is none of the compared models; choose from: {', '.join(models)}")
    return Comparison(tuple(models.values()), models[name])


def _result(name: str, trainings: list[Training]) -> ModelResult:
    tuning = [training for training in trainings if training.seed == trainings[0].seed]
    rate = best(tuning).learning_rate
    chosen = [training for training in trainings if training.learning_rate == rate]
    assert len({t.label for t in trainings}) == len(trainings), f"{name}: a training is given twice"
    return ModelResult(name, tuple(chosen), tuple(sorted(tuning, key=lambda training: training.learning_rate)))


def best(trainings: Sequence[Training]) -> Training:
    """The training with the lowest final validation loss; one that is not a number is never the best."""
    return min(trainings, key=lambda t: math.inf if math.isnan(t.final_validation_loss) else t.final_validation_loss)


# What people read


def table(comparison: Comparison) -> str:
    """A Markdown table, a row per model, readable as it stands."""
    baseline = comparison.baseline.name
    head = [
        *("model", "parameters", "learning rate", "validation loss", f"against {baseline}"),
        *("seeds' losses", "tokens/s", "seconds"),
    ]
    rows = [
        [
            model.name,
            f"{model.parameters:,}",
            f"{model.learning_rate:g}",
            _with_deviation(model),
            "-" if model is comparison.baseline else f"{100 * comparison.excess(model):+.2f} %",
            " ".join(f"{loss:.4f}" for loss in model.losses),
            f"{model.tokens_per_second:,.0f}",
            f"{model.seconds:,.0f}",
        ]
        for model in comparison.models
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    head, *rows = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["-" * width for width in widths], *rows])


def tuning_table(comparison: Comparison) -> str:
    """A Markdown table of the final validation losses with the first seed by learning rate; empty without tuning."""
    rates = sorted({training.learning_rate for model in comparison.models for training in model.tuning})
    if all(len(model.tuning) < 2 for model in comparison.models):
        return ""
    lines = ["| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for model in comparison.models:
        losses = {training.learning_rate: f"{training.final_validation_loss:.4f}" for training in model.tuning}
        cells = [losses.get(rate, "-") for rate in rates]
        cells = [f"**{c}**" if rate == model.learning_rate else c for rate, c in zip(rates, cells, strict=True)]
        lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence per model beside the baseline, then what to doubt."""
    baseline = comparison.baseline
    lines = []
    for model in comparison.models:
        if model is baseline:
            continue
        excess = comparison.excess(model)
        difference = f"{100 * abs(excess):.2f} % {'above' if excess > 0 else 'below'}"
        lines.append(
            f"{model.name}'s mean validation loss is {model.mean_loss:.4f}, {difference} "
            f"{baseline.name}'s {baseline.mean_loss:.4f} ({_spread(model, baseline)})."
        )
    for model in comparison.models:
        if model.edge:
            lines.append(
                f"{model.name}'s best learning rate, {model.learning_rate:g}, is the {model.edge} that was tried; "
                "a better one may lie beyond."
            )
    return lines


def _spread(model: ModelResult, baseline: ModelResult) -> str:
    if model.loss_deviation is None or baseline.loss_deviation is None:
        return "one seed, so the spread is unknown"
    return f"standard deviation over seeds ±{model.loss_deviation:.4f} and ±{baseline.loss_deviation:.4f}"


def _with_deviation(model: ModelResult) -> str:
    deviation = "" if model.loss_deviation is None else f" ± {model.loss_deviation:.4f}"
    return f"{model.mean_loss:.4f}{deviation}"


def markdown(comparison: Comparison) -> str:
    """The whole report as text."""
    seeds = ", ".join(map(str, comparison.seeds))
    parts = [
        f"Final validation loss in nats per token after {comparison.tokens:,} training tokens; "
        f"mean ± standard deviation over the seeds {seeds}.",
        table(comparison),
        "\n".join(f"* {line}" for line in verdicts(comparison)),
    ]
    if tuning := tuning_table(comparison):
        parts += [f"Learning rates, each with seed {comparison.seeds[0]}; the best of a model is in bold.", tuning]
    return "\n\n".join(part for part in parts if part) + "\n"


# What programs read


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The content of compare.json. Losses are nats per token; a deviation is null for a single seed, a loss that is
    not a number is null."""
    values = {
        "baseline": comparison.baseline.name,
        "train_tokens": comparison.tokens,
        "models": {model.name: _model_json(comparison, model) for model in comparison.models},
    }
    return json.loads(json.dumps(values), parse_constant=lambda name: None)  # JSON has no NaN


def _model_json(comparison: Comparison, model: ModelResult) -> dict[str, Any]:
    curve = model.curve
    return {
        "parameters": model.parameters,
        "learning_rate": model.learning_rate,
        "seeds": [training.seed for training in model.trainings],
        "final_validation_losses": model.losses,
        "mean_final_validation_loss": model.mean_loss,
        "std_final_validation_loss": model.loss_deviation,
        "loss_ratio_vs_baseline": 1.0 + comparison.excess(model),
        "tokens_per_second": model.tokens_per_second,
        "train_seconds": [training.seconds for training in model.trainings],
        "tuning": [
            {"learning_rate": t.learning_rate, "seed": t.seed, "final_validation_loss": t.final_validation_loss}
            for t in model.tuning
        ],
        "curve": {
            "tokens": curve.tokens,
            "seconds": curve.seconds,
            "validation_loss": curve.mean,
            "lowest_validation_loss": curve.lowest,
            "highest_validation_loss": curve.highest,
        },
    }


# The figure


def draw(comparison: Comparison, paths: Sequence[Path]) -> None:
    """Validation loss against tokens and against time: a line per model, its mean over seeds, in a band from the lowest
    to the highest seed. A path's suffix chooses the format."""
    from matplotlib.figure import Figure  # not pyplot, whose state is global

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    curves = [model.curve for model in comparison.models]
    longest = max(curve.seconds[-1] for curve in curves)
    tokens_unit, tokens_name = _unit(
        comparison.tokens, ((1e9, 1e9, " (billions)"), (1e6, 1e6, " (millions)"), (0, 1, ""))
    )
    time_unit, time_name = _unit(longest, ((7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds")))
    for index, (model, curve) in enumerate(zip(comparison.models, curves, strict=True)):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        style = LINE_STYLES[index % len(LINE_STYLES)]
        for axes, positions, unit in ((by_tokens, curve.tokens, tokens_unit), (by_time, curve.seconds, time_unit)):
            x = np.array(positions) / unit
            axes.plot(
                x, curve.mean, style, color=colour, linewidth=1.6, label=f"{model.name}  {_with_deviation(model)}"
            )
            axes.plot(x[-1], curve.mean[-1], "o", color=colour, markersize=5, clip_on=False, zorder=3)
            axes.fill_between(x, curve.lowest, curve.highest, color=colour, alpha=0.15, linewidth=0)
    by_tokens.set(xlabel=f"training tokens{tokens_name}", ylabel="validation loss (nats per token)")
    by_time.set(xlabel=f"training time ({time_name})")
    by_tokens.set_ylim(*_loss_range(comparison, curves))
    by_tokens.set_xlim(0, comparison.tokens / tokens_unit)
    by_time.set_xlim(0, longest / time_unit)
    for axes in (by_tokens, by_time):
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.legend(title="mean of final losses, ± deviation over seeds", frameon=False, fontsize=9, title_fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=160)


def _unit(largest: float, units: tuple[tuple[float, float, str], ...]) -> tuple[float, str]:
    """Size and name of the first unit, given as (from, size, name), that suits a number."""
    return next((size, name) for smallest, size, name in units if largest >= smallest)


def _loss_range(comparison: Comparison, curves: list[Curve]) -> tuple[float, float]:
    """Lower and upper end of the axis of losses."""
    first = HIDDEN_START * comparison.tokens
    shown = [
        loss
        for curve in curves
        for count, low, high in zip(curve.tokens, curve.lowest, curve.highest, strict=True)
        if count >= first
        for loss in (low, high)
        if math.isfinite(loss)
    ]
    lowest, highest = min(shown), max(shown)
    margin = max(0.05 * (highest - lowest), (SMALLEST_SPAN * lowest - (highest - lowest)) / 2)
    return lowest - margin, highest + margin


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.json, the report as Markdown, and the figure as PNG and SVG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, table_path, *figures = (folder / name for name in (JSON_NAME, TABLE_NAME, FIGURE_NAME, VECTOR_NAME))
    write_atomically(json_path, json.dumps(to_json(comparison), indent=2) + "\n")
    write_atomically(table_path, markdown(comparison))
    draw(comparison, figures)
    return [json_path, table_path, *figures]
