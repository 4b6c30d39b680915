"""Rows of providers that are right, wrong, broken or not for the job, made by an op that timing has never heard of."""

import types
from dataclasses import replace

import pytest
import torch

from benchmarks.kernels.harness.case import Case, Plan, Prepared, Provider, Task, Unsupported, Work
from benchmarks.kernels.harness.checking import Expected
from benchmarks.kernels.harness.floors import Floors
from benchmarks.kernels.harness.workers import Fatal
from benchmarks.kernels.measure import Measurer
from sliderquant_kernels.tools.timing import Settings

QUICK = Settings(budget_us=1000, fewest_samples=3, most_samples=3)


def _negate(x, tensors):
    return -x + 0 * tensors[0][: x.shape[1]].float()


def _refuse(operands):
    raise Unsupported("not on Sundays")


def _break(operands):
    raise RuntimeError("first line\nsecond line")


def _provider(name, prepare):
    return Provider(name, prepare, devices=("cpu",), computes=f"what {name} computes")


@pytest.fixture
def op():
    """y = -x: an op of another kind, with one provider for everything that may happen."""
    made = []

    def operands(case, device):
        made.append(case)
        return torch.zeros(case.shape[0], dtype=torch.int8, device=device)

    def expected(operands, x, prepared):
        return Expected(torch.arange(x.shape[0]), -x.double(), torch.zeros(x.shape), 2.0**-8)

    right = Prepared((torch.zeros(64, dtype=torch.int8),), _negate, note=lambda m: f"for {m}")
    wrong = Prepared(right.tensors, lambda x, tensors: -x * 1.5)
    lazy = Prepared(right.tensors, lambda x, tensors: torch.empty_like(x))
    providers = {
        "right": _provider("right", lambda operands: right),
        "base": _provider("base", lambda operands: right),
        "wrong": _provider("wrong", lambda operands: wrong),
        "lazy": _provider("lazy", lambda operands: lazy),
        "refuses": _provider("refuses", _refuse),
        "breaks": _provider("breaks", _break),
    }
    return types.SimpleNamespace(
        NAME="negate",
        PROVIDERS=providers,
        BASELINE={"cpu": "base"},
        made=made,
        subsets=lambda device: ("all",),
        plan=lambda subset, device: Plan([], []),
        operands_key=lambda case: case.shape,
        operands=operands,
        activations=lambda case, operands: torch.randn(case.m, case.shape[0]),
        expected=expected,
        work=lambda case, prepared: Work(prepared.bytes(), 1.0),
        goals=lambda rows, runs: [],
    )


@pytest.fixture
def measurer(op):
    measurer = Measurer("cpu", {"negate": op}, QUICK)
    measurer.cache_bytes = 1000  # or a million copies of 64 bytes are rotated over
    return measurer


def _task(provider, kind="time", m=4, shape=(64,)):
    return Task(kind, Case("negate", "a layer", shape, m, "none", "fp32"), provider)


def test_a_right_result_is_timed(measurer):
    row = measurer(_task("right"))
    case = {"op": "negate", "layer": "a layer", "shape": "64", "m": 4, "scheme": "none", "dtype": "fp32"}
    assert case.items() <= row.items()
    assert (row["status"], row["kind"], row["provider"], row["note"]) == ("ok", "time", "right", "for 4")
    assert row["computes"] == "what right computes"
    assert row["relative_error"] == 0 <= row["tolerance"]
    assert 0 < row["q20_us"] <= row["q50_us"] <= row["q80_us"]
    assert row["samples"] == 3
    assert row["baseline_us"] > 0
    assert row["bytes"] == row["weight_bytes"] == 64
    assert row["cache"] == "cold: rotated over 33 sets of 0.0 MB, 0 MiB of cache"


def test_what_may_stay_in_the_cache_is_not_copied(measurer, op):
    warm = replace(op.PROVIDERS["right"].prepare(None), cold=False)
    op.PROVIDERS["right"] = _provider("right", lambda operands: warm)
    row = measurer(_task("right"))
    assert (row["status"], row["cache"]) == ("ok", "warm: 1 sets of 0.0 MB, 0 MiB of cache")


@pytest.mark.parametrize(("factor", "status"), [(1, "ok"), (1.5, "error")])
def test_of_several_results_what_is_compared_is_named(measurer, op, factor, status):
    right = op.PROVIDERS["right"].prepare(None)
    several = replace(right, call=lambda x, tensors: (-x, factor), compared=lambda result: result[0] * result[1])
    op.PROVIDERS["right"] = _provider("right", lambda operands: several)
    assert measurer(_task("right"))["status"] == status


def test_the_baseline_is_timed_alone(measurer):
    assert "baseline_us" not in measurer(_task("base"))


def test_a_check_is_not_timed(measurer):
    row = measurer(_task("right", "check"))
    assert row["status"] == "ok"
    assert "q50_us" not in row


@pytest.mark.parametrize("provider", ["wrong", "lazy"])
def test_a_wrong_result_is_an_error_and_has_no_time(measurer, provider):
    row = measurer(_task(provider))
    assert row["status"] == "error"
    assert row["error"].startswith("wrong: relative error ")
    assert not row["relative_error"] <= row["tolerance"]
    assert "q50_us" not in row


def test_memory_with_an_earlier_result_does_not_make_an_unwritten_one_right(measurer, op, monkeypatch):
    """The result's memory, handed out again as the allocator of a GPU does, holds what was right a moment ago."""
    memory = torch.empty(4, 64)

    right = Prepared((memory,), lambda x, tensors: memory.copy_(-x))
    unwritten = Prepared((memory,), lambda x, tensors: memory)
    op.PROVIDERS["right"] = _provider("right", lambda operands: right)
    op.PROVIDERS["lazy"] = _provider("lazy", lambda operands: unwritten)
    monkeypatch.setattr(torch, "full", lambda shape, value, **kwargs: memory.fill_(value))
    assert measurer(_task("right", "check"))["status"] == "ok"
    assert measurer(_task("lazy", "check"))["status"] == "error"


def test_a_refusal_is_not_an_error(measurer):
    row = measurer(_task("refuses"))
    assert (row["status"], row["error"]) == ("unsupported", "not on Sundays")
    assert "q50_us" not in row


def test_an_exception_is_a_row(measurer):
    row = measurer(_task("breaks"))
    assert row["status"] == "error"
    assert row["error"].startswith("RuntimeError: first line (test_measure.py:")
    assert measurer(_task("right"))["status"] == "ok"


def test_a_peer_that_never_works_is_given_up(measurer, op):
    op.PROVIDERS["peer"] = replace(op.PROVIDERS["breaks"], name="peer", peer=True)
    rows = [measurer(_task(name, m=m)) for m in (1, 2, 4, 8) for name in ("peer", "breaks")]
    errors = [row["error"].partition(":")[0] for row in rows]
    assert errors[:7:2] == ["RuntimeError"] * 3 + ["not tried after 3 failures"]
    assert errors[1::2] == ["RuntimeError"] * 4  # what is ours is tried every time
    assert "first line" in rows[6]["error"]


def test_a_peer_that_worked_once_is_always_tried(measurer, op):
    op.PROVIDERS["peer"] = replace(op.PROVIDERS["right"], name="peer", peer=True)
    assert measurer(_task("peer"))["status"] == "ok"
    measurer(_task("base", shape=(32,)))
    op.PROVIDERS["peer"] = replace(op.PROVIDERS["breaks"], name="peer", peer=True)
    errors = [measurer(_task("peer", shape=(64 + i,)))["error"] for i in range(5)]
    assert all(error.startswith("RuntimeError") for error in errors)


def test_a_lost_device_ends_the_process_with_its_row(measurer, monkeypatch):
    monkeypatch.setattr(measurer, "_is_lost", lambda error: True)
    with pytest.raises(Fatal) as caught:
        measurer(_task("breaks"))
    assert caught.value.answer["provider"] == "breaks"
    assert caught.value.answer["status"] == "error"


def test_operands_are_made_once_per_key(measurer, op):
    for m in (1, 2):
        for provider in ("base", "right"):
            measurer(_task(provider, m=m))
    assert [case.shape for case in op.made] == [(64,)]
    measurer(_task("right", shape=(32,)))
    measurer(_task("right"))
    assert [case.shape for case in op.made] == [(64,), (32,), (64,)]


def test_warming_up_calls_and_compares_nothing(measurer):
    row = measurer(_task("wrong", "warm"))
    assert row["status"] == "ok"
    assert "relative_error" not in row


def test_floors_and_machine(measurer, monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.harness.floors.measure", lambda device: Floors(10.0, 0.1, 0.0))
    assert measurer("floors") == Floors(10.0, 0.1, 0.0) == measurer.roof
    assert measurer("machine")["cache_bytes"] > 0
