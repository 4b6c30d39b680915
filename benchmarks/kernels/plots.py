"""Pictures of the kernels' result files: the roofline, and the ratio to 16-bit weights over the tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.kernels.harness.figures import is_timed
from benchmarks.kernels.harness.floors import Floors

__all__ = ["draw"]

Row = dict[str, Any]
MARKERS = "osD^vP*Xph<>"
COLORS = [*(f"C{i}" for i in range(10)), "black", "navy", "darkgreen", "gold"]
MOST_PANELS = 9


def draw(rows: Iterable[Row], runs: dict[int, Any], path: Path) -> list[Path]:
    """The pictures of each op, scheme and dtype, next to the result file `path`; returns their paths."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "time" and is_timed(row):
            groups[row["op"], row["scheme"], row["dtype"]].append(row)
    written = []
    for group, found in groups.items():
        name = "-".join(group)
        figures = {}
        # What only moves bytes is on no roof of operations.
        if all(row["flops"] for row in found):
            figures["roofline"] = roofline(found, runs, name)
        if len({row["m"] for row in found}) > 1:
            figures["ratio"] = ratios(found, name)
        for kind, figure in figures.items():
            written.append(path.with_name(f"{path.stem}-{name}-{kind}.png"))
            figure.savefig(written[-1], dpi=110)
    return written


def roofline(rows: list[Row], runs: dict[int, Any], title: str) -> Figure:
    """TFLOP/s over operations per byte, under the measured roof. A provider's bytes are those of its own format."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    # Several runs of one file are of one device; the roof is that of the last.
    floors = Floors(**runs[max(row["run"] for row in rows)]["floors"])
    ridge = floors.matmul_tflops * 1e3 / floors.bandwidth_gbps
    xs = [left, *([ridge] if left < ridge < right else []), right]
    ys = [min(x * floors.bandwidth_gbps / 1e3, floors.matmul_tflops) for x in xs]
    roof = f"measured: {floors.bandwidth_gbps:.0f} GB/s, matmul {floors.matmul_tflops:.3g} TFLOP/s"
    axes.plot(xs, ys, color="black", linewidth=1.5, label=roof)
    for index, (provider, found) in enumerate(_by(rows, "provider").items()):
        axes.scatter(
            [row["flops"] / row["bytes"] for row in found], [row["tflops"] for row in found],
            s=28, alpha=0.75, label=provider, **_style(index),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TFLOP/s", title=title)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def ratios(rows: list[Row], title: str) -> Figure:
    """How many times as fast as the baseline, over the tokens, a panel for each shape."""
    every = list(_by(rows, "shape").items())
    shapes = every[:MOST_PANELS]
    columns = min(3, len(shapes))
    height = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * height + 0.8), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False, sharey=True).flatten()
    names = list(_by(rows, "provider"))
    lines = {}
    for axes, (shape, found) in zip(panels, shapes, strict=False):
        for provider, some in _by(found, "provider").items():
            points = sorted((row["m"], row["ratio_to_16bit"]) for row in some if "ratio_to_16bit" in row)
            if points:
                style = _style(names.index(provider))
                lines[provider] = axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1, **style)[0]
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=shape, xlabel="tokens M")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(True, linewidth=0.3)
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("times as fast as the baseline")
    figure.suptitle(title if len(every) == len(shapes) else f"{title}, {len(shapes)} of {len(every)} shapes")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=min(6, max(1, len(lines))))
    return figure


def _style(index: int) -> dict[str, Any]:
    return {"marker": MARKERS[index % len(MARKERS)], "color": COLORS[index % len(COLORS)]}


def _by(rows: Iterable[Row], column: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return groups
