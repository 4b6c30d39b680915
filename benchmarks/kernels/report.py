"""Markdown tables and roofline plots from the result files of `python -m benchmarks kernels`.

Written next to each file. Plots need matplotlib, tables do not.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.kernels.harness.figures import derive, is_timed
from benchmarks.kernels.harness.floors import Floors
from benchmarks.kernels.harness.store import load
from benchmarks.kernels.ops import OPS

__all__ = ["add_arguments", "markdown", "report", "run"]

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, nargs="?", default=results.FOLDER, help="searched for kernels-*.json (benchmarks/results)"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")


def run(arguments: argparse.Namespace) -> None:
    found = sorted(arguments.folder.rglob("kernels-*.json"))
    if not found:
        raise SystemExit(f"{arguments.folder}: no kernels-*.json in it; measure with python -m benchmarks kernels")
    for path in found:
        for written in report(path, plots=not arguments.no_plots):
            print(written)


def report(path: Path, *, plots: bool = True) -> list[Path]:
    """Write the tables and the plots of one result file next to it; return what was written."""
    content = load(path)
    runs = {run["id"]: run for run in content["runs"]}
    rows = derive(content["rows"], runs, OPS)
    target = path.with_suffix(".md")
    pictures = []
    if plots:
        pictures = _draw(rows, runs, path)
    target.write_text(markdown(path.stem, runs, rows, content["goals"], pictures), encoding="utf-8")
    return [target, *pictures]


def _draw(rows: list[Row], runs: dict[int, Any], path: Path) -> list[Path]:
    try:
        from benchmarks.kernels.plots import draw  # Tables do without matplotlib.
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"plots need {error.name}: pip install {error.name.partition('.')[0]}, or leave them out with --no-plots"
        ) from error
    return draw(rows, runs, path)


def markdown(
    title: str, runs: dict[int, Any], rows: list[Row], goals: list[dict[str, Any]], pictures: Iterable[Path] = ()
) -> str:
    """All that a result file says, for people."""
    parts = [f"# {title}", _runs(runs)]
    if any(runs[row["run"]]["device"] == "cuda" for row in rows):
        parts += ["## Goals", _goals(goals)]
    for group, found in _groups(rows).items():
        parts += [f"## {' '.join(group)}", _table(found)]
        parts += [f"![{picture.stem}]({picture.name})" for picture in pictures if "-".join(group) in picture.stem]
    parts += ["## Checks", _checks(rows), "## Not measured", _failures(rows)]
    return "\n\n".join(parts) + "\n"


def _runs(runs: dict[int, Any]) -> str:
    columns = ["run", "date", "device", "driver, clocks", "copy GB/s", "read GB/s", "bf16 TFLOP/s", "empty kernel us"]
    columns.append("versions")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for number, run in runs.items():
        machine, floors, clocks = run["machine"], Floors(**run["floors"]), run.get("clocks") or {}
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        found = ", ".join(clocks[key] for key in ("driver_version", "clocks.sm", "clocks.mem") if key in clocks) or "-"
        versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        read = f"{floors.read_gbps:.0f}" if floors.read_gbps else "-"
        figures = f"{floors.copy_gbps:.0f} | {read} | {floors.matmul_tflops:.3g} | {floors.empty_kernel_us:.2f}"
        lines.append(f"| {number} | {run['date']} | {name} | {found} | {figures} | {versions} |")
    return "\n".join(lines)


def _goals(goals: list[dict[str, Any]]) -> str:
    lines = ["| goal | target | measured | | where |", "|---|---|---|---|---|"]
    for goal in goals:
        bound = "at least" if goal["at_least"] else "at most"
        measured = "-" if goal["measured"] is None else f"{goal['measured']:.3f}"
        word = {True: "pass", False: "miss", None: "not measured"}[goal["passed"]]
        lines.append(f"| {goal['text']} | {bound} {goal['target']:g} | {measured} | {word} | {goal['where']} |")
    return "\n".join(lines)


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Timed rows by op, scheme and dtype."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "time" and is_timed(row):
            groups[row["op"], row["scheme"], row["dtype"]].append(row)
    return groups


def _table(rows: list[Row]) -> str:
    """One line per row, cases in the order of shape and tokens."""
    columns = ["layer", "shape", "M", "provider", "us", "20-80%", "% of floor", "GB/s", "TFLOP/s"]
    columns += ["x 16 bits", "x best peer", "best peer"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for row in sorted(rows, key=lambda row: (shapes.index(row["shape"]), row["m"])):
        mixed = " *" if row.get("runs_mixed") else ""
        cells = [row["layer"], row["shape"], row["m"], row["provider"], f"{row['q50_us']:.4g}"]
        cells += [f"{row['q20_us']:.4g}-{row['q80_us']:.4g}", f"{row['percent_of_floor']:.0f}"]
        cells += [f"{row['gbps']:.4g}", f"{row['tflops']:.3g}"]
        cells += [_ratio(row, "ratio_to_16bit") + mixed, _ratio(row, "ratio_to_best_peer") + mixed]
        cells.append(row.get("best_peer", "-"))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _ratio(row: Row, column: str) -> str:
    return f"{row[column]:.2f}" if column in row else "-"


def _checks(rows: list[Row]) -> str:
    compared = [row for row in rows if row.get("relative_error") is not None]
    if not compared:
        return "None."
    good = sum(row["status"] == "ok" for row in compared)
    # Copies have a tolerance of 0, and no share of it.
    right = [row for row in compared if row["status"] == "ok" and row["tolerance"] > 0]
    margins = [row["relative_error"] / row["tolerance"] for row in right]
    worst = f"; the largest error of a right one is {max(margins):.2f} of its tolerance" if margins else ""
    return f"{good} of {len(compared)} results agree with fp64{worst}."


def _failures(rows: list[Row]) -> str:
    """Errors and refusals, counted: a peer that is not installed is one line."""
    counts = Counter((row["provider"], row["status"], row["error"]) for row in rows if row["status"] != "ok")
    if not counts:
        return "Nothing."
    lines = ["| provider | | why | rows |", "|---|---|---|---|"]
    lines += [f"| {name} | {status} | {error} | {count} |" for (name, status, error), count in counts.most_common()]
    return "\n".join(lines)
