"""The kernels' suites under pytest-benchmark: `make bench`. Every result is compared with fp64 before it is timed.

Without a GPU a tiny shape, with one the rows of `quick`; caches are cold, but a CPU's times hold the call from Python.
A round on a GPU replays a graph; `extra_info` says how many calls that is.
"""

from itertools import cycle

import pytest
import torch

from benchmarks.kernels.harness.machine import installed
from benchmarks.kernels.measure import setup
from benchmarks.kernels.ops import OPS
from sliderquant_kernels.tools.timing import Cuda, Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TASKS = [task for op in OPS.values() for task in op.plan("quick" if DEVICE == "cuda" else "tiny", DEVICE).timings]


@pytest.fixture(scope="module")
def measurer():
    return setup(DEVICE, Settings())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: "-".join(map(str, [*task.case.key[1:], task.provider])))
def test_kernel(benchmark, measurer, task):
    package = OPS[task.case.op].PROVIDERS[task.provider].distribution
    if package is not None and installed(package) is None:
        pytest.skip(f"needs {package}")
    row = measurer(task._replace(kind="check"))
    if row["status"] == "unsupported":
        pytest.skip(row["error"])
    assert row["status"] == "ok", row["error"]
    calls = measurer.calls(task)
    benchmark.group = " ".join(map(str, task.case.key))
    with torch.inference_mode():
        if DEVICE == "cpu":
            turns = cycle(calls)
            benchmark.pedantic(lambda: next(turns)(), rounds=20, warmup_rounds=3)
        else:
            _replay(benchmark, calls)
    OPS[task.case.op].PROVIDERS[task.provider].release()


def _replay(benchmark, calls):
    replay = Cuda().capture(calls)
    benchmark.extra_info["calls"] = len(calls)

    def replay_all():
        replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay_all, rounds=20, warmup_rounds=3)
