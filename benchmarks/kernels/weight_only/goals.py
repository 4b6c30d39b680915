"""What the weight-only kernels aim at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ..harness.case import Goal
from ..harness.figures import is_timed, ratio, worst
from .plan import MAIN_SCHEME
from .providers.ours import CHOSEN

__all__ = ["goals"]

Row = dict[str, Any]
LARGE, MEDIUM = 60e6, 30e6
W2_SCHEME, W3_SCHEME = "W2A16-g128", "W3A16-g128"
# An H200 has slots for 110 instructions of a thread per 16 packed bytes at its full bandwidth, and keeps 58% of them
# busy (`weight_only.estimate`). One token takes 113 at 2 bits, 94 at 3 and 63 at 4: at most 0.56, 0.68 and, where
# memory decides, 0.86 of the bandwidth, so that 2 bits can be
# 2 * 0.56 / 0.86 = 1.3 times as fast as 4, and 3 bits 1.05 times.
W2_OVER_W4, W3_OVER_W4 = 1.25, 1.0


def goals(rows: list[Row], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """Every goal with the worst figure among the rows that it speaks of; `rows` have been through `figures.derive`."""
    ours = [
        row
        for row in rows
        if is_timed(row)
        and row["provider"] == CHOSEN
        and row["dtype"] == "bf16"
        and runs[row["run"]]["device"] == "cuda"
    ]
    main = [row for row in ours if row["scheme"] == MAIN_SCHEME]
    single = [row for row in main if row["m"] == 1]
    large = [row for row in single if row["weight_bytes"] >= LARGE]
    medium = [row for row in single if MEDIUM <= row["weight_bytes"] < LARGE]
    return [
        worst(f"{MAIN_SCHEME}, M = 1, weights of 60 MB and up: of copy bandwidth", 0.75, large, _copy_share),
        worst(f"{MAIN_SCHEME}, M = 1, weights of 30 to 60 MB: of copy bandwidth", 0.55, medium, _copy_share),
        worst(f"{MAIN_SCHEME}, M = 16: time over that of M = 1", 1.10, _pairs(main, 16), _over_first, at_least=False),
        worst(f"{MAIN_SCHEME}, M >= 2048: time of cuBLAS bf16 over ours", 0.90, _many(main), ratio("ratio_to_16bit")),
        worst(f"{MAIN_SCHEME}, M = 1 to 64: best peer's time over ours", 1.0, _few(main), ratio("ratio_to_best_peer")),
        worst(f"{W2_SCHEME}, M = 1: time of {MAIN_SCHEME} over its", W2_OVER_W4, _beside(ours, W2_SCHEME), _over_first),
        worst(f"{W3_SCHEME}, M = 1: time of {MAIN_SCHEME} over its", W3_OVER_W4, _beside(ours, W3_SCHEME), _over_first),
    ]  # fmt: skip


def _copy_share(row: Row) -> float:
    return row["percent_of_copy"] / 100


def _few(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["m"] <= 64]


def _many(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["m"] >= 2048]


def _over_first(pair: tuple[Row, Row]) -> float:
    return pair[0]["q50_us"] / pair[1]["q50_us"]


def _pairs(rows: list[Row], m: int) -> list[tuple[Row, Row]]:
    """(the row of m tokens, that of one token) for each shape."""
    first = {row["shape"]: row for row in rows if row["m"] == 1}
    return [(row, first[row["shape"]]) for row in rows if row["m"] == m and row["shape"] in first]


def _beside(rows: list[Row], scheme: str) -> list[tuple[Row, Row]]:
    """(W4, `scheme`) of one token for each shape."""
    single = [row for row in rows if row["m"] == 1]
    fewer = {row["shape"]: row for row in single if row["scheme"] == scheme}
    return [(row, fewer[row["shape"]]) for row in single if row["scheme"] == MAIN_SCHEME and row["shape"] in fewer]
