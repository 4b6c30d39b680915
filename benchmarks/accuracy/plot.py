"""The picture of the accuracy table: perplexity over that of 16 bits, a panel for each model and scheme."""

import math
from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.accuracy.runs import Row
from benchmarks.accuracy.table import column_of, figure_text
from sliderquant.planning.methods import METHODS

__all__ = ["accuracy_figure", "finish_bars"]

LOG_FROM = 3.0  # times 16 bits; below that, bars of a linear axis can be told apart


def accuracy_figure(summary: Iterable[Row]) -> Figure:
    """Bars of every method, in the order of `summary`, which is what `benchmarks.accuracy.table.summary_of` makes."""
    rows = [row for row in summary if "perplexity" in row]
    originals = {row["model"]: row["perplexity"] for row in rows if row["method"] == "original"}
    panels: dict[str, dict[str, list[Row]]] = {model: {} for model in originals}
    for row in rows:
        if row["method"] != "original" and row["model"] in originals and math.isfinite(row["perplexity"]):
            panels[row["model"]].setdefault(row["scheme"], []).append(row)
    panels = {model: found for model, found in panels.items() if found}
    width = max((len(found) for found in panels.values()), default=1)
    bars = [max(map(len, found.values())) for found in panels.values()] or [1]
    figure = Figure(figsize=(1 + 3.8 * width, 1 + sum(0.8 + 0.27 * count for count in bars)), layout="constrained")
    heights = [2.5 + count for count in bars]
    every = figure.subplots(len(bars), width, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in every.flatten():
        axes.set_visible(False)
    for line, count, (model, found) in zip(every, bars, panels.items(), strict=False):
        for axes, (scheme, some) in zip(line, found.items(), strict=False):
            axes.set_visible(True)
            _bars(axes, some, originals[model])
            axes.set_ylim(count - 0.4, -0.6)
            axes.set_title(scheme, fontsize=10)
        line[0].set_ylabel(f"{model}\n16 bits: {figure_text(originals[model])}", fontsize=10)
    figure.supxlabel("perplexity over that of 16 bits; at the bars the perplexity itself", fontsize=10)
    return figure


def _bars(axes: Any, rows: list[Row], original: float) -> None:
    names = list(METHODS)
    ratios = [row["perplexity"] / original for row in rows]
    least, most = min([1.0, *ratios]), max(ratios)
    colors = [f"C{names.index(row['method']) % 10}" if row["method"] in names else "black" for row in rows]
    hatches = ["///" if _rotated(row) else "" for row in rows]
    bars = axes.barh(
        range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.72, hatch=hatches,
        edgecolor="white", linewidth=0,
    )  # fmt: skip
    axes.bar_label(bars, [figure_text(row["perplexity"]) for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    # Room for the figures at the ends of the bars.
    if most > LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(least, most**1.35)
        axes.xaxis.set_minor_formatter(NullFormatter())
        if most < 30:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_xlim(least, 1 + 1.35 * max(most - 1, 1e-3))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    finish_bars(axes, digits=4)


def finish_bars(axes: Any, digits: int) -> None:
    """Figures of so many digits below a panel of bars, and a light grid behind them."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis="x", linewidth=0.3)


def _rotated(row: Row) -> bool:
    return column_of(row) != row["scheme"]


def _label(row: Row) -> str:
    name = f"{row['method']}, rotated" if _rotated(row) else row["method"]
    return f"{name}\n{row['label']}" if row.get("label") else name
