"""What came of tuning, and the log that holds it: a line of JSON for every problem.

A line is written at once. One that a killed process has left unfinished is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.choices import Choice, Problem

__all__ = ["Measured", "Outcome", "Retimed", "append", "read_outcomes"]

TIMED = "timed"
LOST = "lost the GPU"


@dataclass(frozen=True)
class Measured:
    """A candidate, and what came of it.

    Attributes:
        status: `timed`, `not compiled`, `wrong numbers`, `failed` or `lost the GPU`.
        detail: why it was not timed.
        us, low_us, high_us: median and quartiles of a launch's microseconds.
        estimate_us: what was expected; None where there is no estimate.
    """

    choice: Choice
    status: str
    detail: str = ""
    us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    estimate_us: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What measuring one problem gave.

    Attributes:
        rules_us: of the rules' own choice; None: it was not timed.
        best: what goes into the table: the rules' choice where nothing is clearly faster; None: nothing was timed.
        measured: in the order of their times; `failed`: the candidates that were not timed.
    """

    problem: Problem
    rules_choice: Choice
    rules_us: float | None
    best: Choice | None
    best_us: float | None
    measured: tuple[Measured, ...]
    failed: tuple[Measured, ...]

    @property
    def ratio(self) -> float | None:
        """Microseconds of the best over those of the rules' choice."""
        return None if self.best_us is None or self.rules_us is None else self.best_us / self.rules_us


@dataclass(frozen=True)
class Retimed:
    """A choice that was faster once, measured once more against the rules' own.

    Attributes:
        ratio: microseconds of the tuned choice over those of the rules'; None: one of them was not timed.
        holds: whether it is clearly faster again.
    """

    problem: Problem
    tuned: Choice
    tuned_us: float | None
    rules_us: float | None
    ratio: float | None
    holds: bool


def append(path: Path, result: Outcome | Retimed, **about: Any) -> None:
    """Write one more line; `about` says with what it was measured."""
    kind = "tuned" if isinstance(result, Outcome) else "retimed"
    content = {"kind": kind, **about, **asdict(result), "ratio": result.ratio}
    content["problem"]["dtype"] = str(result.problem.dtype).removeprefix("torch.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # of a process that was killed
                file.write(b"\n")
        file.write(json.dumps(content).encode() + b"\n")


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes of a log, the last one of each problem.

    Raises:
        ValueError: a line is JSON, but no outcome of this version.
    """
    found: dict[Problem, Outcome] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off by the end of a process
            continue
        try:
            if row["kind"] == "tuned":
                outcome = _outcome(row)
                found[outcome.problem] = outcome
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an outcome of `tune`, got {type(error).__name__}: {error}; "
                "tune again with another --log"
            ) from None
    return list(found.values())


def _outcome(row: dict[str, Any]) -> Outcome:
    problem = Problem(**row["problem"] | {"dtype": getattr(torch, row["problem"]["dtype"])})
    rules, best = Choice(**row["rules_choice"]), row["best"] and Choice(**row["best"])
    measured, failed = _measured(row["measured"]), _measured(row["failed"])
    return Outcome(problem, rules, row["rules_us"], best, row["best_us"], measured, failed)


def _measured(rows: Iterable[dict[str, Any]]) -> tuple[Measured, ...]:
    return tuple(Measured(**row | {"choice": Choice(**row["choice"])}) for row in rows)
