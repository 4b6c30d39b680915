"""The process of a phase: `python -m benchmarks.gpu.worker PHASE --state DIR --ends T [--rehearse]`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

# What tells the run that the phase is not finished, and that all it has to say is in its rows.
PARTIAL = 75


def main(arguments: list[str] | None = None) -> int:
    """Run the phase and return the exit status: 0, `PARTIAL`, or 1 after a traceback."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("phase")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--ends", type=float, required=True, help="a time of time.monotonic")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)

    from .context import Context, OutOfTime
    from .state import State

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    context = Context(options.phase, State(options.state), options.ends, options.rehearse)
    try:
        importlib.import_module(f"benchmarks.gpu.{options.phase}").run(context)
    except OutOfTime as reason:
        print(reason)
        return PARTIAL
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def end_with(parent: int) -> None:
    """Kill this process and all that it started once its parent is gone: it has a group of its own, and would go on
    using the GPU."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
