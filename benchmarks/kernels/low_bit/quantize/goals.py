"""What quantizing aims at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ...case import Goal
from ...figures import case_key, is_timed, worst
from .providers import CHOSEN, COPY

__all__ = ["goals"]

Row = dict[str, Any]
# Below, the launch decides and not the bytes.
FEWEST_TOKENS = 2048


def goals(rows: list[Row], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """The worst figure among the rows of many tokens, for what is quantized alone and after other steps."""
    timed = [row for row in rows if is_timed(row) and runs[row["run"]]["device"] == "cuda" and row["dtype"] == "bf16"]
    copies = {case_key(row): row for row in timed if row["provider"] == COPY}
    many = [row for row in timed if row["provider"] == CHOSEN and row["m"] >= FEWEST_TOKENS]
    pairs = [(row, copies[case_key(row)]) for row in many if case_key(row) in copies]
    plain = [pair for pair in pairs if "+" not in pair[0]["scheme"]]
    fused = [pair for pair in pairs if "+" in pair[0]["scheme"]]
    text = "M >= 2048: time over that of a copy of as many bytes"
    return [
        worst(f"quantizing, {text}", 1.2, plain, _over_floor, at_least=False),
        worst(f"quantizing after RMSNorm or SiLU-mul, {text}", 1.2, fused, _over_floor, at_least=False),
    ]


def _over_floor(pair: tuple[Row, Row]) -> float:
    """The copy of the same tensor moved other bytes than quantizing it does: its rate, for the bytes of the latter."""
    row, copy = pair
    return row["q50_us"] / (copy["q50_us"] * row["bytes"] / copy["bytes"])
