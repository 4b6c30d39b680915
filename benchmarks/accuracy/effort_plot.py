"""What minutes buy: perplexity over the seconds of quantizing, of a method's efforts and of every other method."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.accuracy.label_placement import Label, place_labels
from benchmarks.accuracy.runs import Row
from benchmarks.accuracy.table import column_of, figure_text
from sliderquant.planning.methods import METHODS, with_overrides
from sliderquant.planning.settings import Settings
from sliderquant.schemes import ModelScheme

__all__ = ["effort_figure"]

FARTHEST = 3.0  # times as far above 16 bits as the worst effort: what is worse is at the upper edge
SHORTEST = 0.1  # seconds, to which they are rounded


def effort_figure(summary: Iterable[Row]) -> Figure | None:
    """A panel for each model and scheme that has rows of a method with efforts; None: there are none.

    `summary` is what `benchmarks.accuracy.table.summary_of` makes.
    """
    rows = [row for row in summary if math.isfinite(row.get("perplexity", math.nan))]
    originals = {row["model"]: row["perplexity"] for row in rows if row["method"] == "original"}
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["method"] != "original" and row["model"] in originals:
            panels.setdefault(row["model"], {}).setdefault(row["scheme"], []).append(row)
    for model, found in list(panels.items()):
        panels[model] = {scheme: some for scheme, some in found.items() if any(map(_effort, some))}
    panels = {model: found for model, found in panels.items() if found}
    if not panels:
        return None
    width = max(map(len, panels.values()))
    figure = Figure(figsize=(0.6 + 5 * width, 0.6 + 4 * len(panels)), layout="constrained")
    every = figure.subplots(len(panels), width, squeeze=False)
    for axes in every.flatten():
        axes.set_visible(False)
    drawn = []
    for line, (model, found) in zip(every, panels.items(), strict=True):
        for axes, (scheme, some) in zip(line, found.items(), strict=False):
            axes.set_visible(True)
            axes.set_title(scheme, fontsize=10)
            drawn.append((axes, *_points(axes, some, originals[model])))
        line[0].set_ylabel(f"{model}\nperplexity", fontsize=10)
    note = "seconds of quantizing; diamonds: other packages"
    if any(beyond for *_, beyond in drawn):
        note += "; triangles at the upper edge: beyond it, their perplexities at them"
    figure.supxlabel(note, fontsize=10)
    figure.draw_without_rendering()
    for axes, labels, lines, _ in drawn:
        place_labels(axes, labels, lines)
    return figure


def _points(axes: Any, rows: Sequence[Row], original: float) -> tuple[list[Label], list[Any], bool]:
    """Draw a panel's points; returns their labels, the lines, and whether any point is at the upper edge."""
    curves: dict[tuple[Any, ...], list[Row]] = {}
    others = []
    for row in rows:
        if _effort(row):
            key = (row["method"], row["rotation"], row["samples"], _changed_epochs(row))
            curves.setdefault(key, []).append(row)
        else:
            others.append(row)
    worst = max(row["perplexity"] for found in curves.values() for row in found)
    highest = max(row["perplexity"] for row in rows)
    edge = original + FARTHEST * max(worst - original, 0.01 * original)
    top = edge if highest > edge else original + 1.12 * max(highest - original, 0.01 * original)
    least = min(original, *(row["perplexity"] for row in rows))
    seconds = [max(row["seconds"], SHORTEST) for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 3, max(seconds) * 3)
    axes.set_ylim(least - 0.1 * (top - least), top)
    labels, lines = [], []
    for found in curves.values():
        found.sort(key=lambda row: list(METHODS[row["method"]].efforts).index(_effort(row)))
        line = [(max(row["seconds"], SHORTEST), row["perplexity"]) for row in found]
        color = _color(found[0])
        axes.plot(*zip(*line, strict=True), color=color, marker="o", markersize=5, linewidth=1.6, zorder=3)
        lines.append(line)
        for row, (x, y) in zip(found, line, strict=True):
            name = f"{_name(row, rows)}, {_effort(row)}" if row is found[0] else _effort(row)
            labels.append(Label(f"{name} {figure_text(y)}", x, y, color))
    # Those at the edge get their labels from left to right.
    for row in sorted(others, key=lambda row: (row["perplexity"] > top, row["seconds"])):
        x, value = max(row["seconds"], SHORTEST), row["perplexity"]
        y, color = min(value, top), _color(row)
        marker = "^" if value > top else "o" if row["method"] in METHODS else "D"
        axes.plot(x, y, color=color, marker=marker, markersize=5, linestyle="", clip_on=False, zorder=3)
        labels.append(Label(f"{_name(row, rows)} {figure_text(value)}", x, y, color))
    axes.axhline(original, color="black", linewidth=0.8, linestyle="--")
    left, right = axes.get_xlim()
    lines.append([(left, original), (right, original)])
    axes.annotate(
        f"16 bits {figure_text(original)}", (1, original), (-3, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", fontsize=7.5,
    )  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if right < 1e3 * left else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=8)
    axes.spines["right"].set_visible(False)
    axes.spines["top"].set(visible=highest > edge, linestyle=":")
    axes.set_axisbelow(True)
    axes.grid(True, linewidth=0.3)
    return labels, lines, highest > edge


def _effort(row: Row) -> str:
    """The effort of the row; empty: its method has none."""
    effort = row.get("label", "").removesuffix(" effort")
    return effort if row["method"] in METHODS and effort in METHODS[row["method"]].efforts else ""


def _changed_epochs(row: Row) -> int | None:
    """The epochs of an effort that was run with others than its own."""
    own = with_overrides(METHODS[row["method"]], ModelScheme.parse(row["scheme"]), {}, _effort(row))
    return None if isinstance(own, Settings) and own.epochs == row["epochs"] else row["epochs"]


def _name(row: Row, rows: Sequence[Row]) -> str:
    parts = [row["method"]]
    if column_of(row) != row["scheme"]:
        parts.append("rotated")
    if _effort(row):
        parts += [f"{epochs} epochs" for epochs in [_changed_epochs(row)] if epochs is not None]
    elif row.get("label"):
        parts.append(row["label"])
    same = [other for other in rows if all(other.get(key) == row.get(key) for key in ("method", "rotation", "label"))]
    for name in ("epochs", "samples"):
        if len({other[name] for other in same}) > 1 and (name == "samples" or not _effort(row)):
            parts.append(f"{row[name]} {name}")
    return ", ".join(parts)


def _color(row: Row) -> str:
    names = list(METHODS)
    return f"C{names.index(row['method']) % 10}" if row["method"] in names else "black"
