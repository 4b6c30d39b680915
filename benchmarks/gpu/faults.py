"""What a rehearsal breaks on purpose, to show what a run makes of it: `--fault crash:roofline`.

    crash:PHASE   the phase's process dies after its first row
    hang:KERNEL   a case of `smoke` never returns
    wrong:KERNEL  a case of `smoke` returns something else

Names of kernels are those of smoke's rows with + between their words: `hang:elementwise+rotary`.
"""

from __future__ import annotations

import argparse
import os

from .phases import PHASES

__all__ = ["VARIABLE", "given", "parse"]

VARIABLE = "SLIDERQUANT_REHEARSED_FAULTS"


def parse(text: str) -> str:
    """Check an argument of the command line, and return it. Raises ArgumentTypeError."""
    what, _, name = text.partition(":")
    if what not in ("crash", "hang", "wrong") or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected crash:PHASE, hang:KERNEL or wrong:KERNEL")
    known = [phase.name for phase in PHASES]
    if what == "crash":
        if name not in known:
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of the phases {', '.join(known)}")
        return text
    from .smoke_cases import CASES

    cases = [key.replace(" ", "+") for key in CASES]
    if name not in cases:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of the kernels {', '.join(cases)}")
    return text


def given(what: str) -> frozenset[str]:
    """The names that are to `crash`, `hang` or be `wrong` in this process."""
    pairs = [text.partition(":") for text in os.environ.get(VARIABLE, "").split()]
    return frozenset(name.replace("+", " ") for word, _, name in pairs if word == what)
