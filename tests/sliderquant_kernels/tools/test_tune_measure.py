"""Candidates are compiled once, checked, and captured with counters of their own, on a device that is made up."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sliderquant_kernels.common import workspace
from sliderquant_kernels.common.choices import Choice, Device, Problem
from sliderquant_kernels.tools import tune_measure, warming
from sliderquant_kernels.tools.timing import Settings
from sliderquant_kernels.tools.tune_measure import Failure, GpuMeasurer
from sliderquant_kernels.weight_only import launch as weight_only_triton

ROOT = Path(__file__).resolve().parents[3]
_DEVICE = Device(90, 132, "NVIDIA Test GPU")
# Not bf16, which Triton's interpreter cuts off instead of rounding it.
_PROBLEM = Problem(3, 48, 256, 4, 128, False, torch.float16)
_CHOICES = [Choice("warp_k", 8, 1, 2, 2), Choice("rows", 16, 4, 4, 2, 2), Choice("dense")]
_SETTINGS = Settings(warm_us=0, budget_us=0, fewest_samples=3)


class FakeGpu:
    """Every replay takes 10 us for each graph that was captured before it."""

    def __init__(self):
        self.events, self.captured = [], []

    def capture(self, calls):
        self.events.append("capture")
        self.captured.append(calls)
        number = len(self.captured)
        return lambda: 10.0 * number * len(calls)

    def elapsed_us(self, replays):
        self.events.append("replay")
        return [replay() for replay in replays]


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(workspace, "release_captured", lambda: gpu.events.append("release"))
    return gpu


def _measurer(gpu, cache_bytes=1 << 14, **options):
    return GpuMeasurer(_DEVICE, cache_bytes, gpu, "cpu", settings=_SETTINGS, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_choice_is_launched_checked_and_timed_in_turns(gpu, symmetric, monkeypatch):
    launched = []
    monkeypatch.setattr(
        weight_only_triton,
        "_plan",
        lambda *args, plan=weight_only_triton._plan: (launched.append(found := plan(*args)), found)[1],
    )
    problem = replace(_PROBLEM, symmetric=symmetric)
    assert _measurer(gpu).time(problem, _CHOICES) == [[10.0] * 3, [20.0] * 3, [30.0] * 3]
    assert [plan.choice for plan in launched] == _CHOICES
    # Counters are handed out anew for every graph, and after the last replay.
    assert gpu.events[:7] == ["release", "capture"] * 3 + ["replay"]
    assert gpu.events[-2:] == ["replay", "release"]
    # The copies exceed twice the cache, and a graph takes a millisecond of what the memory can do at best.
    layout = tune_measure.WeightLayout("triton", 4, 48, 256, 128, symmetric)
    size = layout.bytes(torch.float16)
    for calls in gpu.captured:
        weights = {call.args[0].data_ptr() for call in calls}
        assert (len(weights) - 1) * size >= 2 << 14
        assert len(calls) >= _SETTINGS.most_calls
        # Later calls find the plan: nothing is chosen in a capture.
        assert torch.isfinite(calls[-1]()).all()
    assert len(launched) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("fault", ["one element", "not written", "all a little", "shape", "raises"])
def test_wrong_numbers_are_not_timed(gpu, fault, monkeypatch):
    right = weight_only_triton.weight_only_linear

    def broken(*args, plans):
        y = right(*args, plans=plans)
        (plan,) = plans.values()
        if plan.choice != _CHOICES[1]:
            return y
        if fault == "raises":
            raise RuntimeError("out of resources\nand more")
        if fault == "one element":
            y[2, 5] *= 1.05
        elif fault == "not written":
            y[1, 0] = float("nan")
        elif fault == "all a little":
            y *= 1.02
        else:
            y = y[:, :-1]
        return y

    monkeypatch.setattr(weight_only_triton, "weight_only_linear", broken)
    first, failure, last = _measurer(gpu).time(_PROBLEM, _CHOICES)
    assert (first, last) == ([10.0] * 3, [20.0] * 3)
    assert failure.status == ("failed" if fault == "raises" else "wrong numbers")
    expected = {
        "one element": "1 of 144 elements, the first at [2, 5]: ",
        "not written": "1 of 144 elements, the first at [1, 0]: nan, expected ",
        "all a little": "of 144 elements, the first at ",
        "shape": "a result of shape (3, 47), expected (3, 48)",
        "raises": "RuntimeError: out of resources",
    }[fault]
    assert expected in failure.detail
    assert "more" not in failure.detail


def test_errors_within_the_bound_are_right_and_others_are_not():
    problem = replace(_PROBLEM, m=64, n=64, k=4096, dtype=torch.bfloat16)
    operands = tune_measure._Operands.random(problem, torch.device("cpu"), 1)
    u, want, magnitude = 2.0**-8, operands.want, operands.magnitude
    warp_k, dense = Choice("warp_k"), Choice("dense")
    assert operands.wrong(want.bfloat16(), warp_k) == ""
    # A column of fp32 sums at their worst, before rounding.
    sums = want.clone()
    sums[:, 0] += 4096 * 2.0**-24 * magnitude[:, 0]
    assert operands.wrong(sums.bfloat16(), warp_k) == ""
    # Only `dense` rounds weights, and independently of each other: not all of them by the most.
    generator = torch.Generator().manual_seed(0)
    rounded = want + u * want.norm() / want.numel() ** 0.5 * torch.randn(want.shape, generator=generator)
    assert "elements" in operands.wrong(rounded.float(), warp_k)
    assert operands.wrong(rounded.float(), dense) == ""
    assert operands.wrong((want + 0.9 * u * magnitude).float(), dense).startswith("relative error ")


def test_memory_that_a_launch_will_be_given_is_poisoned():
    operands = tune_measure._Operands.random(_PROBLEM, torch.device("cpu"), 1)
    made = []

    class Spy:
        def new_full(self, shape, value, dtype=torch.float16):
            made.append((tuple(shape), dtype, value != value))

    for choice in (_CHOICES[0], _CHOICES[1]):
        operands._replace(x=Spy()).poison(choice)
    y = ((3, 48), torch.float16, True)
    assert made == [y, y, ((2, 3, 48), torch.float32, True)]


def test_another_choice_is_in_force_only_inside():
    before = weight_only_triton.choose

    def fail():
        with tune_measure.chosen(_CHOICES[0]):
            assert weight_only_triton.choose(_PROBLEM, _DEVICE, None, False) == _CHOICES[0]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert weight_only_triton.choose is before


def test_kernels_that_problems_share_are_compiled_once(gpu, monkeypatch):
    asked = {}

    def compile_each(jobs, arch, processes, timeout, seconds):
        asked.update(jobs=jobs, arch=arch, processes=processes, timeout=timeout, seconds=seconds)
        errors = {"rows": "spills 8 bytes", None: warming.LATE}
        return [errors.get(job.choice and job.choice.variant, "") for job in jobs]

    monkeypatch.setattr(warming, "compile_each", compile_each)
    large, small = (Problem(16, n, 4096, 4, 128, False, torch.bfloat16) for n in (28672, 4096))
    other = replace(small, bits=2)
    warp_k, rows, dense = Choice("warp_k", 16, 4, 4, 3), Choice("rows", 16, 8, 4, 3, 2), Choice("dense")
    pairs = [(large, warp_k), (large, rows), (small, warp_k), (small, rows), (other, warp_k), (small, dense)]
    pairs.append((small, replace(warp_k, split=2)))
    found = _measurer(gpu, processes=5).compile(pairs, 9.0)
    spills, late = Failure("not compiled", "spills 8 bytes"), Failure("not compiled", warming.LATE)
    assert found == [None, spills, None, spills, None, late, None]
    assert [failure.late for failure in (spills, late)] == [False, True]
    jobs = [(job.case.op, job.case.problem, job.choice) for job in asked["jobs"]]
    assert jobs == [
        ("weight_only_linear", large, warp_k),
        ("weight_only_linear", large, rows),
        ("weight_only_linear", other, warp_k),
        ("dequantize", small, None),
        ("weight_only_linear", small, replace(warp_k, split=2)),
    ]
    assert (asked["arch"], asked["processes"], asked["seconds"]) == (90, 5, 9.0)
    assert asked["timeout"] == tune_measure.COMPILE_SECONDS


# Without the interpreter, which is decided for a process.
PROGRAM = """
from dataclasses import replace
import torch
from sliderquant_kernels.weight_only.tiles import Choice, Device, Problem
from sliderquant_kernels.tools.tune_measure import GpuMeasurer

problem = Problem(16, 4096, 14336, 2, 128, False, torch.bfloat16)  # of a shape that `inspect` does not list
pairs = [(problem, Choice("warp_k", 16, 8, 4, 3)), (problem, Choice("warp_k", 8, 1, 4, 3)), (problem, Choice("dense")),
         (problem, Choice("rows", 64, 16, 8, 8))]
for failure in GpuMeasurer(Device(90, 132), 1, object(), processes=2).compile(pairs, 500.0):
    print(failure and failure.detail)
"""


def test_tiles_that_spill_or_do_not_fit_are_not_compiled_for_timing(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills, fine, dense, large = done.stdout.splitlines()
    assert spills.startswith("weight_only_linear: RuntimeError: spills ")
    assert (fine, dense) == ("None", "None")
    assert "bytes of shared memory, 232448 are there" in large
    kernels = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert kernels >= {"warp_k_kernel", "dequantize_kernel"}
