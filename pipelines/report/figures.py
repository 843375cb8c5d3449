"""Figures of a report: the loss by tokens, the stages by time, and the stages as a graph with their states.

Each is drawn once and saved twice: as PNG in light colours, and as SVG whose colours are those of the page around it.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kraken.checkpoint.history import History
from pipelines.report.facts import Facts, StageFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAGE = "#1f2328", "#59636e", "#d1d9e0", "#fefefe"
FIRST, SECOND = "#0969da", "#bc4c00"
STATE_COLOURS = {
    "made": "#1a7f37",
    "reused": "#6639ba",
    "failed": "#d1242f",
    "stopped": "#9a6700",
    "not run": "#818b98",
}
STYLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAGE: "page",
    FIRST: "first",
    SECOND: "second",
    STATE_COLOURS["made"]: "made",
    STATE_COLOURS["reused"]: "reused",
    STATE_COLOURS["failed"]: "failed",
    STATE_COLOURS["stopped"]: "stopped",
    STATE_COLOURS["not run"]: "waiting",
}
"""Colour in the PNG -> name of the style sheet's colour that replaces it in the SVG."""
HIDDEN_START = 0.02
"""Losses of the first tokens, this share of all, may lie outside the figure: the loss falls so far there that later
differences would not be visible."""


def loss_curve(facts: Facts) -> "Figure | None":
    """Loss and validation loss of the training by tokens; None where fewer than two reports are there."""
    reports = [report for report in facts.history if math.isfinite(report.get("loss", math.nan))]
    if len(reports) < 2:
        return None
    figure, axes = _figure(3.4)
    unit, name = _unit(reports[-1]["tokens"])
    _plot(axes, reports, "loss", unit, FIRST, "training loss", marker="")
    validations = [r for r in facts.history if math.isfinite(r.get("validation_loss", math.nan))]
    _plot(axes, validations, "validation_loss", unit, SECOND, "validation loss", marker="o")
    entropy = facts.metric("prepare", "unigram_entropy")
    shown = [r["loss"] for r in reports if r["tokens"] >= HIDDEN_START * reports[-1]["tokens"]]
    shown += [r["validation_loss"] for r in validations]
    if entropy is not None and min(shown) < entropy.value < 1.5 * max(shown):
        axes.axhline(entropy.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="unigram entropy")
    margin = 0.05 * (max(shown) - min(shown)) or 0.05 * max(shown)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, reports[-1]["tokens"] / unit)
    axes.set_xlabel(f"training tokens{name}", color=MUTED)
    axes.set_ylabel("nats per token", color=MUTED)
    axes.grid(color=LINE, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def timeline(facts: Facts) -> "Figure | None":
    """The stages that were made in this run by the time at which they worked; None where there is none."""
    made = [(stage, *_span(stage)) for stage in facts.stages if stage.state == "made" and stage.work_seconds > 0]
    if not made:
        return None
    origin = min(start for _, start, _ in made)
    longest = max(end for _, _, end in made) - origin
    unit, name = (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 300 else (1.0, "seconds")
    figure, axes = _figure(0.75 + 0.36 * len(facts.stages))
    for index, stage in enumerate(facts.stages):
        if stage.state == "made":
            start, end = _span(stage)
            axes.barh(
                index, (end - start) / unit, left=(start - origin) / unit, height=0.55, color=STATE_COLOURS["made"]
            )
            text, x = f"{stage.work_seconds:.1f} s", (end - origin) / unit
        else:
            text, x = stage.state, 0.0
        colour = STATE_COLOURS[stage.state]
        axes.annotate(
            text, (x, index), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=colour
        )
    axes.set_yticks(range(len(facts.stages)), [stage.kind for stage in facts.stages])
    axes.set_ylim(len(facts.stages) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * longest / unit or 1.0)
    axes.set_xlabel(f"{name} since the first stage began to work", color=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    return figure


def graph(facts: Facts) -> "Figure":
    """The stages as boxes with state and time, and an arrow for each artefact that a stage reads."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = _figure(2.5)
    axes.set_axis_off()
    places = {stage.kind: index for index, stage in enumerate(facts.stages)}
    for stage in facts.stages:
        x, colour = places[stage.kind], STATE_COLOURS[stage.state]
        box = FancyBboxPatch(
            (x - 0.36, -0.3), 0.72, 0.6, boxstyle="round,pad=0,rounding_size=0.08", facecolor=PAGE, edgecolor=colour
        )
        box.set_linewidth(1.8)
        axes.add_patch(box)
        axes.text(x, 0.12, stage.kind, ha="center", va="center", fontsize=10, color=INK)
        axes.text(x, -0.12, _state_text(stage), ha="center", va="center", fontsize=8.5, color=colour)
        for parent in stage.parents:
            distance = x - places[parent]
            start, end, bend = (
                ((places[parent] + 0.36, 0.0), (x - 0.36, 0.0), 0.0)
                if distance == 1
                else ((places[parent], 0.3), (x, 0.3), -0.32)
            )
            axes.add_patch(
                FancyArrowPatch(
                    start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=10, color=MUTED
                )
            )
    axes.set_xlim(-0.5, len(facts.stages) - 0.5)
    axes.set_ylim(-0.45, 1.35)
    return figure


FIGURES: dict[str, Callable[[Facts], "Figure | None"]] = {"loss": loss_curve, "timeline": timeline, "graph": graph}
"""Name of a figure's file -> what draws it."""


def save(figure: "Figure", name: str, folder: Path) -> str:
    """Write a figure as `NAME.png` into a folder; returns it as SVG for a page with the style sheet's colours."""
    import matplotlib as mpl

    figure.savefig(folder / f"{name}.png", dpi=130, facecolor="white")
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return themed(text.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """An SVG of matplotlib's for use inside a page: without prologue, its colours the page's, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, style in STYLES.items():
        svg = svg.replace(colour, f"var(--{style})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # not pyplot, whose state is global; it draws with Agg

    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=MUTED, labelsize=9)
    return figure, axes


def _plot(axes: "Axes", reports: History, metric: str, unit: float, colour: str, label: str, marker: str) -> None:
    x, y = [report["tokens"] / unit for report in reports], [report[metric] for report in reports]
    axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)


def _unit(tokens: float) -> tuple[float, str]:
    """Size and name of the unit that suits a number of tokens."""
    units: Sequence[tuple[float, str]] = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))
    return next((unit for unit in units if tokens >= 2 * unit[0]), (1.0, ""))


def _span(stage: StageFacts) -> tuple[float, float]:
    """When a stage that was made began and ended its work, in seconds since the epoch."""
    assert stage.manifest is not None
    end = datetime.strptime(stage.manifest.created_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    return end - stage.manifest.seconds, end


def _state_text(stage: StageFacts) -> str:
    return f"made in {stage.work_seconds:.1f} s" if stage.state == "made" else stage.state
