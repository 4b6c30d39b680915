"""Tiles of Llama-3-8B's layers measured against what the rules choose; the table and the log lie in the phase's folder.

Nothing reads the table from there: whoever likes what `retime` says of it puts it into the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton

from benchmarks.kernels.harness import machine
from benchmarks.kernels.weight_only.providers.ours import tile_text
from sliderquant_kernels.common.choices import Choice, Device, Problem
from sliderquant_kernels.tools.tune import tune
from sliderquant_kernels.tools.tune_measure import DeviceLost, Failure, GpuMeasurer, Measurer
from sliderquant_kernels.tools.tune_outcomes import Outcome, read_outcomes
from sliderquant_kernels.weight_only import tuned

from .context import Context, OutOfTime

__all__ = ["FOLDER", "KEPT", "Place", "name_of", "place_of", "run"]

FOLDER, LOG = "tune", "log.jsonl"
WEIGHTS = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
TOKENS = (1, 8, 16, 32, 64)
# Of the phase's seconds, those for keeping what was measured.
KEPT = 2.0


class Place:
    """What is tuned, by what, and where to.

    Attributes:
        about: for the files.
    """

    def __init__(self, context: Context) -> None:
        folder = context.state.folder / FOLDER
        folder.mkdir(exist_ok=True)
        self.device, self.measurer, tokens = place_of(context)
        self.table, self.log = folder / tuned.file_name(self.device.name or "rehearsal"), folder / LOG
        self.about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
        self.problems = [Problem(m, n, k, 4, 128, False, torch.bfloat16) for (n, k), m in product(WEIGHTS, tokens)]

    def outcomes(self) -> list[Outcome]:
        """What the log holds."""
        return read_outcomes(self.log) if self.log.is_file() else []


def place_of(context: Context) -> tuple[Device, Measurer, tuple[int, ...]]:
    """The device, what measures on it, and the numbers of tokens."""
    if context.rehearsal:
        return Device.typical(90), StubMeasurer(), TOKENS[:2]
    return machine.current_device(), GpuMeasurer(machine.current_device(), machine.cache_bytes(context.device)), TOKENS


def run(context: Context) -> None:
    """Add a row for every problem that was measured."""
    place = Place(context)
    try:
        tune(place.problems, place.device, place.measurer, place.table, log=place.log, budget=context.left - KEPT,
             **place.about)  # fmt: skip
    except DeviceLost as error:
        # The log names the tile, and a process with a new context leaves it out.
        print(f"{tile_text(error.choice)} broke the GPU's state: {error}", flush=True)
        if context.left > KEPT + 10:
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.worker", *sys.argv[1:]])
        raise
    finally:
        for outcome in place.outcomes():
            if outcome.best is not None:
                best = tile_text(outcome.best)
                context.add(name_of(outcome.problem), {"ratio": outcome.ratio, "us": outcome.best_us, "best": best,
                                                       "candidates": len(outcome.measured),
                                                       "failed": len(outcome.failed)})  # fmt: skip
    known = {outcome.problem for outcome in place.outcomes()}
    if left := sum(problem not in known for problem in place.problems):
        raise OutOfTime(f"{left} of {len(place.problems)} problems are left")


def name_of(problem: Problem) -> str:
    """What rows call a problem."""
    return f"{problem.n}x{problem.k} W{problem.bits} M={problem.m}"


class StubMeasurer:
    """A clock for rehearsals: the tile whose pipeline has 3 stages wins by a tenth."""

    def compile(self, pairs: Sequence[tuple[Problem, Choice]], seconds: float | None) -> list[Failure | None]:
        """All compile."""
        return [None for _ in pairs]

    def time(self, problem: Problem, choices: Sequence[Choice]) -> list[list[float] | Failure]:
        """Three samples of each."""
        return [[9.0, 9.0, 9.1] if choice.num_stages == 3 else [10.0, 10.0, 10.1] for choice in choices]
