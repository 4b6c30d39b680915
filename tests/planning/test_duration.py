"""How long a run is expected to take."""

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sliderquant
from sliderquant.planning import duration
from sliderquant.planning.duration import Speed, expected_seconds, measured_speed

ONE_FLOP_A_SECOND = Speed(learning=1.0, fp32=1.0, updates=math.inf, calls=math.inf)
# So few tokens that attention, which PyTorch does not count on a CPU, is next to nothing.
TINY = {"scheme": "W4A16-g32", "samples": 24, "seqlen": 8, "device": "cpu"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sliderquant", {"epochs": 1}),
        ("sliderquant", {"epochs": 1, "last_loss": "hidden", "windows": {"shallow": 0, "deep": 0}}),
        ("sliderquant-published", {"epochs": 2}),
        ("sliderquant-published", {"epochs": 2, "stage_order": "window"}),
    ],
)
def test_the_operations_are_those_that_pytorch_counts(tiny_llama, calibration_file, tmp_path, method, settings):
    arguments = {
        **TINY,
        "method": method,
        "settings": {**settings, "batch_size": 12, "compile": "never", "matmul": "float32"},
    }
    arguments |= {"calibration": str(calibration_file), "rotate": ()}
    plan = sliderquant.plan(tiny_llama, **arguments)
    with FlopCounterMode(display=False) as counter:
        sliderquant.quantize(tiny_llama, tmp_path / "out", **arguments)
    counts = counter.get_flop_counts()["Global"]
    # A window's first linears need no gradient of their input, and low-rank terms multiply too.
    assert expected_seconds(plan, ONE_FLOP_A_SECOND) == pytest.approx(sum(counts.values()), rel=0.1)


def test_what_is_slow_is_what_takes_the_time(tiny_llama, calibration_file):
    plan = sliderquant.plan(tiny_llama, **TINY, calibration=str(calibration_file))
    fast = dict.fromkeys(("learning", "fp32", "updates", "calls"), math.inf)
    assert expected_seconds(plan, Speed(**fast)) == 0
    for name in fast:
        assert expected_seconds(plan, Speed(**{**fast, name: 1e6})) > 0
    # A call costs the same whatever its size: layers of steps times calls.
    layers = plan.work * 500
    assert expected_seconds(plan, Speed(**{**fast, "calls": 1.0})) == pytest.approx(layers)


def test_speeds_count_what_the_calls_did(tiny_llama, calibration_file, monkeypatch):
    """If every call took a second."""

    def second(call, device, times=3):
        call()
        return 1.0

    monkeypatch.setattr(duration, "_seconds", second)
    plan = sliderquant.plan(tiny_llama, **TINY, calibration=str(calibration_file))
    speed = measured_speed(plan, torch.device("cpu"))
    tokens, weights = 3 * 8, 64 * 96  # of the largest linear
    assert speed == Speed(learning=2 * tokens * weights, fp32=2 * tokens * weights, updates=weights, calls=1)


def test_seconds_are_those_of_one_call():
    assert duration._seconds(lambda: time.sleep(0.02), torch.device("cpu"), times=2) == pytest.approx(0.02, rel=0.5)
