"""What quantizing aims at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ...harness.case import Goal
from ...shared.rows import goal, pairs_with_copies

__all__ = ["goals"]


def goals(rows: list[dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """The worst figure among the rows of many tokens, for what is quantized alone and after other steps."""
    pairs = pairs_with_copies(rows, runs)
    return [
        goal("quantizing", [pair for pair in pairs if "+" not in pair[0]["scheme"]]),
        goal("quantizing after RMSNorm or SiLU-mul", [pair for pair in pairs if "+" in pair[0]["scheme"]]),
    ]
