"""What follows from the measured rows: shares of the floor, and ratios to the baseline and to the best peer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from .case import Goal, Op
from .floors import Floors

__all__ = ["case_key", "derive", "is_timed", "ratio", "row_key", "worst"]

Row = dict[str, Any]
CASE_COLUMNS = ("op", "shape", "m", "scheme", "dtype")


def case_key(row: Row) -> tuple[Any, ...]:
    """What tells a row's case from others."""
    return tuple(row.get(column) for column in CASE_COLUMNS)


def row_key(row: Row) -> tuple[Any, ...]:
    """What tells a row from others."""
    return (row.get("kind"), *case_key(row), row["provider"])


def is_timed(row: Row) -> bool:
    """Whether the row holds a time."""
    return row.get("status") == "ok" and "q50_us" in row


def derive(rows: Iterable[Row], runs: dict[int, dict[str, Any]], ops: dict[str, Op]) -> list[Row]:
    """Copies of the rows with what follows from them.

    - floor_us: bytes over bandwidth, the better of copying and reading, or operations over matmul rate, of the row's
      own run; percent_of_floor: its share of the time; percent_of_copy: bytes moved per second over that bandwidth;
      gbps, tflops.
    - ratio_to_16bit: the baseline's time over the row's: above 1 is faster than 16-bit weights.
    - ratio_to_best_peer: the fastest peer's time over the row's; best_peer.
    - runs_mixed: a ratio's two times are from different runs.
    """
    copied = [dict(row) for row in rows]
    cases: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in copied:
        if is_timed(row):
            cases[case_key(row)][row["provider"]] = row
    for case in cases.values():
        for row in case.values():
            _add_floor(row, runs[row["run"]])
            _add_ratios(row, case, ops[row["op"]], runs)
    return copied


def _add_floor(row: Row, run: dict[str, Any]) -> None:
    floors = Floors(**run["floors"])
    row["floor_us"] = floors.floor_us(row["bytes"], row["flops"])
    row["percent_of_floor"] = 100 * row["floor_us"] / row["q50_us"]
    row["gbps"] = row["bytes"] / row["q50_us"] / 1e3
    row["percent_of_copy"] = 100 * row["gbps"] / floors.bandwidth_gbps
    row["tflops"] = row["flops"] / row["q50_us"] / 1e6


def _add_ratios(row: Row, case: dict[str, Row], op: Op, runs: dict[int, dict[str, Any]]) -> None:
    baseline = case.get(op.BASELINE[runs[row["run"]]["device"]])
    used = []
    if "baseline_us" in row:
        row["ratio_to_16bit"] = row["baseline_us"] / row["q50_us"]
    elif baseline is not None:
        row["ratio_to_16bit"] = baseline["q50_us"] / row["q50_us"]
        used.append(baseline)
    peers = [other for name, other in case.items() if op.PROVIDERS[name].peer and name != row["provider"]]
    if peers:
        best = min(peers, key=lambda peer: peer["q50_us"])
        row["best_peer"], row["ratio_to_best_peer"] = best["provider"], best["q50_us"] / row["q50_us"]
        used.append(best)
    if any(other["run"] != row["run"] for other in used):
        row["runs_mixed"] = True


def ratio(column: str) -> Callable[[Row], float | None]:
    """A figure for `worst`: what a row's column holds, if it has it."""
    return lambda row: row.get(column)


def worst(
    text: str, target: float, rows: Iterable[Any], figure: Callable[[Any], float | None], at_least: bool = True
) -> Goal:
    """A goal with the worst figure of `rows`, or of pairs of rows that the first one of stands for."""
    figures = [(value, row) for row in rows if (value := figure(row)) is not None]
    if not figures:
        return Goal(text, target, None, at_least, "not measured")
    found, row = (min if at_least else max)(figures, key=lambda pair: pair[0])
    row = row[0] if isinstance(row, tuple) else row
    return Goal(text, target, found, at_least, f"worst of {len(figures)}: {row['shape']}, M = {row['m']}")
