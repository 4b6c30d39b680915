"""What rotating aims at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ..case import Goal
from ..figures import case_key, is_timed, worst
from .operands import ROTATE
from .providers import CHOSEN, COPY

__all__ = ["goals"]

Row = dict[str, Any]
# Below, the launch decides and not the bytes.
FEWEST_TOKENS = 2048
# Sizes of one launch whose factors fill the matrix instructions.
SIZES = ("4096", "8192", "14336")


def goals(rows: list[Row], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """The worst figure among the rows of many tokens, rotated alone and quantized at once."""
    timed = [row for row in rows if is_timed(row) and runs[row["run"]]["device"] == "cuda" and row["dtype"] == "bf16"]
    copies = {case_key(row): row for row in timed if row["provider"] == COPY}
    many = [row for row in timed if row["provider"] == CHOSEN and row["m"] >= FEWEST_TOKENS and row["shape"] in SIZES]
    pairs = [(row, copies[case_key(row)]) for row in many if case_key(row) in copies]
    alone = [pair for pair in pairs if pair[0]["scheme"] == ROTATE]
    quantized = [pair for pair in pairs if pair[0]["scheme"] != ROTATE]
    text = "M >= 2048: time over that of a copy of as many bytes"
    return [
        worst(f"rotating and quantizing, {text}", 1.2, quantized, _over_floor, at_least=False),
        worst(f"rotating alone, {text}", 1.2, alone, _over_floor, at_least=False),
    ]


def _over_floor(pair: tuple[Row, Row]) -> float:
    """The copy of the same tensor moved other bytes: its rate, for the bytes of the row."""
    row, copy = pair
    return row["q50_us"] / (copy["q50_us"] * row["bytes"] / copy["bytes"])
