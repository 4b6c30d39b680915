"""compute-sanitizer's racecheck on a launch whose programs share tiles.

It sees shared memory alone: how programs add up their parts in global memory is what `smoke` repeats 20 times.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
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
    # Into a file: on a pipe, what the tool has started would keep us waiting after its end.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1.0, context.left - 1))
        except subprocess.TimeoutExpired:
            process.kill()
            context.add("racecheck", {"status": "not through in time", "hazards": None})
            return
        output.seek(0)
        text = output.read()
    print(text[-3000:])
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text)
    hazards = int(found[1]) if found else None
    context.add("racecheck", {"status": "ok" if hazards == 0 and code == 0 else text[-500:], "hazards": hazards})
