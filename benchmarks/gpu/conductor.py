"""Running phases one after the other, each in a process of its own that may crash or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from benchmarks.kernels.harness import machine

from . import failures
from .phases import Phase, box
from .state import Outcome, State
from .worker import PARTIAL

__all__ = ["conduct", "phase_command"]

# A phase may take so much longer than it was told, before it is ended: it finishes what it has begun.
GRACE_SECONDS = 6.0
# Of the output of a phase that failed, what its outcome keeps.
LAST_LINES = 12

Command = Callable[[Phase, State, float, bool], Sequence[str]]


def phase_command(phase: Phase, state: State, seconds: float, rehearsal: bool) -> list[str]:
    """The command line of a phase's process."""
    words = [sys.executable, "-m", "benchmarks.gpu.worker", phase.name, "--state", str(state.folder)]
    # What its imports take is in its time.
    return [*words, "--ends", f"{time.monotonic() + seconds:.1f}", *(["--rehearse"] if rehearsal else [])]


def conduct(
    phases: Sequence[Phase],
    state: State,
    ends: float,
    rehearsal: bool,
    environment: Mapping[str, str],
    after_each: Callable[[], None] = lambda: None,
    command: Command = phase_command,
) -> bool:
    """Run the phases that are not finished, one after the other, until `ends`, a time of time.monotonic.

    When the first one fails, the others are not begun: it is what they all need, and is tried whenever it is missing.

    Args:
        after_each: called when a phase has ended; whoever ends this process leaves what it has written by then.

    Returns:
        Whether every phase was through, whatever it showed.
    """
    sources = machine.versions()["sliderquant_kernels"]
    for index, phase in enumerate(phases):
        before = state.outcome(phase.name)
        if index > 0 and state.outcome(phases[0].name).status == "failed":
            break
        if not before.is_left and not (index == 0 and before.status == "failed"):
            continue
        reason = failures.reason_to_skip(phase.name, state)
        if reason is not None:
            state.keep(phase.name, replace(before, status="skipped", detail=reason))
            print(f"{phase.name:<10} skipped: {reason}", flush=True)
            continue
        later = [other for other in phases[index + 1 :] if state.outcome(other.name).is_left]
        seconds = box(phase, later, ends - time.monotonic(), failures.compiled(state))
        if seconds == 0.0:
            status = "waiting" if before.status == "skipped" else before.status
            state.keep(phase.name, replace(before, status=status, detail="no time was left for it"))
            print(f"{phase.name:<10} waits: too few seconds are left", flush=True)
            continue
        print(f"{phase.name:<10} {phase.content}, up to {seconds:.0f} s ... ", end="", flush=True)
        words = command(phase, state, seconds, rehearsal)
        try:
            outcome = run_phase(words, state, seconds, environment, phase, before)
        except KeyboardInterrupt:
            state.keep(phase.name, replace(before, status="partial", attempts=before.attempts + 1,
                                           detail="interrupted"))  # fmt: skip
            print("interrupted: what was measured is kept")
            return False
        state.keep(phase.name, replace(outcome, sources=sources))
        print(f"{outcome.status} after {outcome.seconds - before.seconds:.0f} s", flush=True)
        after_each()
    return all(state.outcome(phase.name).finished for phase in phases)


def run_phase(
    words: Sequence[str],
    state: State,
    seconds: float,
    environment: Mapping[str, str],
    phase: Phase,
    before: Outcome,
) -> Outcome:
    """Run a phase's process, end it with everything that it started when its time is up, and say how it went."""
    started = time.monotonic()
    with state.log.open("ab") as log:
        log.write(f"\n=== {phase.name}, attempt {before.attempts + 1} ===\n".encode())
        log.flush()
        begins = log.tell()
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            code = process.wait(seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            late = True
            code = -1
        finally:
            _end(process)
    with state.log.open("rb") as log:
        log.seek(begins)
        printed = log.read().decode("utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    spent = before.seconds + time.monotonic() - started
    if code == 0:
        return Outcome("done", spent, before.attempts + 1)
    if phase.takes_rest and (late or code == PARTIAL):
        return Outcome("done", spent, before.attempts + 1, "ended with the time")
    if code == PARTIAL:
        return Outcome("partial", spent, before.attempts + 1, "\n".join(printed[-1:]))
    if late:
        detail = "\n".join([f"no end within {seconds + GRACE_SECONDS:.0f} s; the process was ended", *printed])
        # It had all the time that it was to have: what hangs once will hang again, and costs its box once more.
        status = "failed" if seconds >= phase.planned(failures.compiled(state)) else "partial"
        return Outcome(status, spent, before.attempts + 1, detail)
    why = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    return Outcome("failed", spent, before.attempts + 1, "\n".join([why, *printed]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which are in a group of their own and may be deaf to SIGTERM."""
    for word, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, word)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
