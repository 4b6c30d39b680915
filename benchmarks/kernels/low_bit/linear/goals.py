"""What the low-bit linear aims at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ...harness.case import Goal
from ...harness.figures import is_timed, ratio, worst
from .plan import MAIN_SCHEME
from .providers import CHOSEN

__all__ = ["goals"]

Row = dict[str, Any]


def goals(rows: list[Row], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """Every goal with the worst figure among the rows that it speaks of: with quantizing, alone and after a norm or
    SiLU-mul, which are in the baseline's time too."""
    ours = [
        row
        for row in rows
        if is_timed(row)
        and row["provider"] == CHOSEN
        and row["dtype"] == "bf16"
        and row["scheme"].partition("+")[0] == MAIN_SCHEME
        and runs[row["run"]]["device"] == "cuda"
    ]
    few, many = [row for row in ours if row["m"] <= 16], [row for row in ours if row["m"] >= 2048]
    text = f"{MAIN_SCHEME} with quantizing"
    return [
        worst(f"{text}, M >= 2048: time of cuBLAS bf16 over ours", 1.5, many, ratio("ratio_to_16bit")),
        worst(f"{text}, M = 1 to 16: time of cuBLAS bf16 over ours", 2.5, few, ratio("ratio_to_16bit")),
    ]
