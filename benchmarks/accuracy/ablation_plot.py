"""The pictures of the ablations: what each change does to the perplexity, against the method as it is."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.accuracy.ablations import ABLATIONS, BASE, based_on, tables_of
from benchmarks.accuracy.plot import finish_bars
from benchmarks.accuracy.runs import Row
from benchmarks.accuracy.table import figure_text

__all__ = ["ablation_figure", "ablation_figures"]

BETTER, WORSE = "C0", "C1"
FARTHEST = 8.0  # times as far off as the row in the middle: longer bars are cut
CUT = 1.25  # and then this many times as long as the longest of the others
WIDEST, WIDEST_TITLE = 40, 90  # letters of a line of a label, and of one above a panel
SIDE_BY_SIDE = 2  # ablations of a panel each


def ablation_figures(summary: Iterable[Row]) -> dict[str, Figure]:
    """By the name of a method, the picture of its ablations.

    `summary` is what `benchmarks.accuracy.runs.summarize` makes.
    """
    rows = list(summary)
    methods = dict.fromkeys(row["method"] for row in rows if "ablation" in row)
    return {
        method: ablation_figure(row for row in rows if "ablation" not in row or row["method"] == method)
        for method in methods
    }


def ablation_figure(summary: Iterable[Row]) -> Figure:
    """A panel for each model, scheme and budget of an ablation, side by side; the ablations one below the other, those
    of a single panel in twos.

    `summary` is what `benchmarks.accuracy.runs.summarize` makes.
    """
    rows = list(summary)
    originals = {row["model"]: row["perplexity"] for row in rows if "ablation" not in row and "perplexity" in row}
    panels: dict[str, list[tuple[str, list[Row]]]] = {}
    for (name, *_), found in tables_of(rows).items():
        panels.setdefault(name, []).append((name, found))
    lines: list[list[tuple[str, list[Row]]]] = []
    alone = False
    for line in panels.values():
        if len(line) == 1 and alone and len(lines[-1]) < SIDE_BY_SIDE:
            lines[-1] += line
        else:
            lines.append(line)
        alone = len(line) == 1
    width = max(map(len, lines), default=1)
    counts = [max(len(found) for _, found in line) for line in lines] or [1]
    heights = [1.5 + 0.36 * count for count in counts]
    figure = Figure(figsize=(8.5 * width, 0.4 + sum(heights)), layout="constrained")
    every = figure.subplots(len(counts), width, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in every.flatten():
        axes.set_visible(False)
    cut = False
    for row_of_axes, count, line in zip(every, counts, lines, strict=False):
        for axes, (name, found) in zip(row_of_axes, line, strict=False):
            axes.set_visible(True)
            axes.set_title(_title(name, found[0], originals.get(found[0]["model"])), fontsize=9, loc="left")
            cut |= _bars(axes, found)
            axes.set_ylim(count - 0.4, -0.6)
    note = "perplexity, from that of the method as it is; whiskers and band: least to largest of the seeds"
    figure.supxlabel(f"{note}; an arrow: the bar goes on" if cut else note, fontsize=10)
    return figure


def _title(name: str, row: Row, original: float | None) -> str:
    question = f": {ABLATIONS[name].question}" if name in ABLATIONS else ""
    budget = [f"{row['epochs']} epochs"] if row["epochs"] is not None else []
    run = ", ".join([row["model"], row["scheme"], *budget, f"{row['samples']} samples"])
    known = "" if original is None else f" (16 bits: {figure_text(original)})"
    based = based_on(name)
    lines = [name + question, *([row["method"] + based, run + known] if based else [f"{row['method']}, {run}{known}"])]
    return "\n".join(textwrap.fill(line, WIDEST_TITLE, break_on_hyphens=False) for line in lines)


def _bars(axes: Any, rows: Sequence[Row]) -> bool:
    """Draw a panel; returns whether a bar is cut."""
    measured = [row for row in rows if math.isfinite(row.get("perplexity", math.nan))]
    base = next((row for row in measured if row["label"] == BASE), None)
    # Where the method as it is was not run, from the best row.
    start = base["perplexity"] if base else min((row["perplexity"] for row in measured), default=1.0)
    lengths = [abs(row["perplexity"] - start) for row in measured if row["perplexity"] != start]
    farthest = FARTHEST * statistics.median(lengths) if lengths else 0.0
    cut = any(length > farthest for length in lengths)
    limit = CUT * max(length for length in lengths if length <= farthest) if cut else math.inf
    low = min([start, *(_within(row["least"], start, limit) for row in measured)])
    high = max([start, *(_within(row["most"], start, limit) for row in measured)])
    room = max(high - low, 0.002 * start)
    # At the right there is room for the figures.
    axes.set_xlim(low - 0.04 * room, high + 0.45 * room)
    axes.axvline(start, color="black", linewidth=0.9, linestyle="-" if base else "")
    if base and len(base["seeds"]) > 1:
        axes.axvspan(base["least"], base["most"], color="black", alpha=0.08, linewidth=0)
    for place, row in enumerate(rows):
        _bar(axes, place, row, start, limit, is_base=row is base)
    axes.set_yticks(range(len(rows)), [textwrap.fill(row["label"], WIDEST) for row in rows], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    finish_bars(axes, digits=5)
    return cut


def _bar(axes: Any, place: int, row: Row, start: float, limit: float, is_base: bool) -> None:
    value = row.get("perplexity", math.nan)
    if not math.isfinite(value):
        text = "not finite" if "perplexity" in row else row.get("reason", "refused")
        axes.annotate(text, (start, place), (5, 0), textcoords="offset points", va="center", fontsize=8, style="italic")
        return
    end = _within(value, start, limit)
    axes.barh(place, end - start, left=start, height=0.66, color=BETTER if value < start else WORSE, linewidth=0)
    if is_base:
        axes.plot(start, place, color="black", marker="o", markersize=4)
    low, high = (_within(row[key], start, limit) for key in ("least", "most"))
    if low < high:
        axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=7)
    if end != value:
        axes.plot(end, place, color="black", marker=">" if value > start else "<", markersize=6, clip_on=False)
    text = figure_text(value)
    if not is_base and value != start:
        text += f" ({100 * (value / start - 1):+.1f}%)"
    text += f", {row['seconds']:.3g} s" if row["seconds"] is not None else ""
    right = max(start, end, high)
    axes.annotate(text, (right, place), (7, 0), textcoords="offset points", va="center", fontsize=8)


def _within(value: float, start: float, limit: float) -> float:
    return min(max(value, start - limit), start + limit)
