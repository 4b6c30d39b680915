"""compute-sanitizer's racecheck on a launch whose programs add up their parts in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from .context import Context

__all__ = ["run"]

TOOL = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin",)


def run(context: Context) -> None:
    """Add one row: the hazards that were found, or why there is no answer."""
    if context.has("racecheck"):
        return
    launch = [sys.executable, "-m", "benchmarks.gpu.split_launch"]
    tool = shutil.which(TOOL) or next(
        (str(Path(place) / TOOL) for place in PLACES if (Path(place) / TOOL).is_file()), None
    )
    if context.rehearsal:
        subprocess.run(launch, check=True, timeout=max(1.0, context.left - 1))
        context.add("racecheck", {"status": "rehearsed", "hazards": None})
        return
    if tool is None:
        context.add("racecheck", {"status": f"{TOOL} is not installed", "hazards": None})
        return
    words = [tool, "--tool", "racecheck", "--kernel-regex", "kns=warp_k", *launch]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=max(1.0, context.left - 1))
    except subprocess.TimeoutExpired:
        print(f"{TOOL} was not through in time")
        return
    text = done.stdout + done.stderr
    print(text[-3000:])
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text)
    hazards = int(found[1]) if found else None
    context.add(
        "racecheck", {"status": "ok" if hazards == 0 and done.returncode == 0 else text[-500:], "hazards": hazards}
    )
