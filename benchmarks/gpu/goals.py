"""`python -m benchmarks kernels --subset quick`: checks, times against cuBLAS and peers, goals."""

from __future__ import annotations

import argparse

from benchmarks.kernels import command

from .context import Context, OutOfTime
from .failures import GOAL_OPS, skipped_ops

__all__ = ["FOLDER", "run"]

FOLDER = "goals"


def run(context: Context) -> None:
    """Measure what is not measured yet; the rows are in kernels-quick.json in the phase's folder."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    skipped = skipped_ops(context.state)
    ops = [op for op in GOAL_OPS if skipped.get(op) != []][: 1 if context.rehearsal else None]
    words = ["--subset", "tiny" if context.rehearsal else "quick", "--out", str(context.folder(FOLDER)), "--op", *ops]
    # Rows that have begun may take 10 seconds more, and floors are measured once more at the end.
    words += [
        "--budget",
        f"{max(context.left - 14, 5):.0f}",
        *(["--providers", "sliderquant"] if context.rehearsal else []),
    ]
    for op, widths in skipped.items():
        words += [f"--skip={op}:{bits}" for bits in widths]
    left = command.measure(parser.parse_args(words))
    if left:
        raise OutOfTime(f"{left} rows are left")
