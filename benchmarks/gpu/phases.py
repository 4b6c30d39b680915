"""What a run consists of, in order, and how its seconds are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PHASES", "SUMMARY_SECONDS", "Phase", "box"]

# What a run needs at its end, for the summary and the result files.
SUMMARY_SECONDS = 4.0


@dataclass(frozen=True)
class Phase:
    """One step of a run: the module `benchmarks.gpu.NAME`, whose `run(context)` does it.

    Attributes:
        seconds: that it takes, with kernels that are compiled already.
        least: with less it is not begun.
        cold: the seconds where kernels have to be compiled first; 0: the same.
        content: what it does, in a few words.
        takes_rest: it goes on for as long as there is time, and is `done` whenever that ends.
    """

    name: str
    seconds: float
    least: float
    content: str
    cold: float = 0.0
    takes_rest: bool = False

    def planned(self, compiled: bool) -> float:
        """Seconds that it is expected to take."""
        return self.seconds if compiled or not self.cold else self.cold


PHASES = (
    Phase("env", 20, 10, "the GPU, versions, the cache of compiled kernels, predictions"),
    Phase("smoke", 40, 20, "every kernel family at every width against fp64, 20 times bitwise, in graphs", cold=70),
    Phase(
        "roofline", 18, 10, "copy, read, L2, bf16 and int8 products, an empty kernel, the host's time per call", cold=30
    ),
    Phase("tests", 110, 30, "the tests that need a GPU", cold=240),
    Phase("decode", 70, 30, "tokens through generate: quantized, original, with and without graphs"),
    Phase("goals", 140, 40, "kernels against cuBLAS, their peers and the goals"),
    Phase("tune", 80, 30, "tiles of 4 layers at 5 numbers of tokens, measured"),
    Phase("retime", 25, 10, "tuned tiles against those of the rules, once more"),
    Phase("sanitizer", 15, 10, "compute-sanitizer's racecheck on a split launch", takes_rest=True),
)


def box(phase: Phase, later: Sequence[Phase], left: float, compiled: bool) -> float:
    """The seconds that a phase may take of those that are left; 0: too few to begin.

    It gets what it is expected to take, and all that the phases after it do not need.
    """
    usable = left - SUMMARY_SECONDS
    spare = usable - phase.planned(compiled) - sum(other.planned(compiled) for other in later)
    given = min(usable, phase.planned(compiled) + max(0.0, spare))
    return given if given >= phase.least else 0.0
