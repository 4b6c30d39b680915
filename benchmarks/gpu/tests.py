"""The tests that need a GPU, in many processes; each one's outcome is kept as it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from .context import Context, OutOfTime
from .failures import TEST_FILES, compiled
from .pytest_plugin import LEFT_OUT, STATE
from .state import write_whole

__all__ = ["run"]

ROOT = Path(__file__).resolve().parent.parent.parent
# Each compiles, and holds a CUDA context and what its tests allocate.
MOST_PROCESSES = 14
TEST_SECONDS, COLD_TEST_SECONDS = 40, 90
# pytest's exit codes: all passed, some failed, nothing was left to run.
FINISHED = (0, 1, 5)
# One file is enough to see that the phase works, and these tests run without a GPU too.
REHEARSED = ("tests/sliderquant_kernels/elementwise/test_op.py", "tests/sliderquant_kernels/low_bit/test_gpu.py")


def run(context: Context) -> None:
    """Run pytest until it ends or the time does. Tests that fail do not make the phase fail: their rows say so."""
    files = REHEARSED if context.rehearsal else tuple(TEST_FILES)
    words = [sys.executable, "-m", "pytest", *files, "-p", "benchmarks.gpu.pytest_plugin", "-p", "no:cacheprovider",
             "-vv", "-rfE", "--tb=short"]  # fmt: skip
    if context.rehearsal:
        words += ["-k", "silu_mul or low_bit"]
    elif find_spec("xdist") is not None:
        words += ["-n", str(max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    if find_spec("pytest_timeout") is not None:
        # By a thread, which ends the process: a signal does not interrupt a call of CUDA that never returns.
        seconds = TEST_SECONDS if compiled(context.state) else COLD_TEST_SECONDS
        words += ["--timeout", str(seconds), "--timeout-method", "thread"]
    # Of those that had begun when the time was up nothing is known.
    ended = [row["key"] for row in context.state.rows(context.phase) if row["outcome"] != "begun"]
    write_whole(context.state.folder / LEFT_OUT, json.dumps(ended))
    environment = {**os.environ, STATE: str(context.state.folder.resolve())}
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    try:
        code = process.wait(max(1.0, context.left - 4))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
        raise OutOfTime("some tests are left") from None
    if code not in FINISHED:
        raise RuntimeError(f"pytest ended with exit code {code}, before it was through its tests")
