"""What rotating aims at on a GPU of the H200's class, and what the rows say."""

from __future__ import annotations

from typing import Any

from ..harness.case import Goal
from ..shared.rows import goal, pairs_with_copies
from .operands import ROTATE

__all__ = ["goals"]

# Sizes of one launch whose factors fill the matrix instructions.
SIZES = ("4096", "8192", "14336")


def goals(rows: list[dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[Goal]:
    """The worst figure among the rows of many tokens, rotated alone and quantized at once."""
    pairs = [pair for pair in pairs_with_copies(rows, runs) if pair[0]["shape"] in SIZES]
    return [
        goal("rotating and quantizing", [pair for pair in pairs if pair[0]["scheme"] != ROTATE]),
        goal("rotating alone", [pair for pair in pairs if pair[0]["scheme"] == ROTATE]),
    ]
