"""Every kernel family at every width, once: right against fp64, written everywhere, the same bits every time.

Cases run in processes of their own, several at a time: one that hangs or kills its process costs its own row.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.kernels.harness.workers import Failure, Workers

from . import faults
from .context import Context, OutOfTime
from .smoke_cases import CASES

__all__ = ["may_be_tried", "run"]

REPEATS = 20
# Each compiles and holds a CUDA context.
MOST_PROCESSES = 10
# One case with its compilation; a kernel that hangs must not take the phase with it.
CASE_SECONDS = 20.0
# A case that failed once may have been short of time, or of memory beside the others.
MOST_TRIES = 2
REHEARSED_SECONDS = 12.0


def run(context: Context) -> None:
    """Add a row for every case that has none, and try once more what failed in an earlier attempt."""
    known = {row["key"]: row for row in context.state.rows(context.phase)}
    missing = [key for key in CASES if key not in known or may_be_tried(known[key])]
    processes = 1 if context.rehearsal else max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
    repeats = 2 if context.rehearsal else REPEATS
    with Workers(processes, Smoke, (str(context.device), repeats)) as workers:
        longest = REHEARSED_SECONDS if context.rehearsal else CASE_SECONDS
        # A case that begins last must be able to hang, and to be ended, within the phase.
        limit = min(longest, max((context.left - 5) / 2, 5))
        for key, answer in workers.run(missing, limit, context.ends - 3):
            if answer is not None:
                row = {"status": "error", "error": answer.error} if isinstance(answer, Failure) else answer
                keep(context, key, {**row, "tries": known.get(key, {}).get("tries", 0) + 1})
    if left := sum(not context.has(key) for key in CASES):
        raise OutOfTime(f"{left} of {len(CASES)} cases are left")


def may_be_tried(row: Mapping[str, Any]) -> bool:
    """Whether a case failed, and was tried once only."""
    return row["status"] in ("wrong", "error") and row.get("tries", 1) < MOST_TRIES


def keep(context: Context, key: str, row: dict[str, Any]) -> None:
    """Add a case's row, with what it is of, and print it."""
    case = CASES[key]
    context.add(key, {"family": case.family, "bits": case.bits, **row})
    figures = f"{row['relative_error']:.1e} of {row['tolerance']:.1e}" if "relative_error" in row else ""
    print(f"{key}: {row['status']} {figures} {row.get('error', '')}".rstrip(), flush=True)


class Smoke:
    """Answers keys of cases with rows, inside a worker process."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = torch.device(device), repeats
        torch.set_num_threads(1)

    def __call__(self, key: str) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return self.check(key)
        except NotImplementedError as reason:
            return {"status": "unsupported", "error": str(reason)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or [""])[0][:300]
            return {"status": "error", "error": f"{type(error).__name__}: {first} ({where.name}:{where.lineno})"}

    def check(self, key: str) -> dict[str, Any]:
        """The row of a case: `ok`, or `wrong` with what is wrong."""
        check = CASES[key].make(self.device)
        if key in faults.given("hang"):
            time.sleep(3600)
        if key in faults.given("wrong"):
            check = check._replace(want=check.want * 2)
        # Memory that the result will probably get: an element that the kernel does not write is then not a number.
        stale = torch.full(check.want.shape, float("nan"), dtype=torch.bfloat16, device=self.device)
        del stale
        first = check.call()
        got = check.compared(first).double()
        row: dict[str, Any] = {"note": check.note, "tolerance": check.tolerance}
        if got.shape != check.want.shape:
            return {**row, "status": "wrong", "error": f"shape {list(got.shape)}, expected {list(check.want.shape)}"}
        row["relative_error"] = float((got - check.want).norm() / check.want.norm())
        if not bool(torch.isfinite(got).all()):
            return {**row, "status": "wrong", "error": "some elements are not finite: not written, or overflowed"}
        if not row["relative_error"] <= check.tolerance:
            return {**row, "status": "wrong", "error": f"relative error {row['relative_error']:.2e}, at most "
                    f"{check.tolerance:.2e} is rounding"}  # fmt: skip
        for repeat in range(1, self.repeats):
            if not _same(first, check.call()):
                return {**row, "status": "wrong", "error": f"other bits at call {repeat + 1} of {self.repeats}"}
        return {**row, "status": "ok", "repeats": self.repeats}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(_same(a, b) for a, b in zip(one, other, strict=True) if a is not None)
