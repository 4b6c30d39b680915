"""Floors, shares and ratios of hand-made rows, and what the goals make of them."""

import pytest

from benchmarks.kernels.harness.figures import derive
from benchmarks.kernels.harness.floors import Floors
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.weight_only.goals import goals


def test_floor_is_the_longer_of_moving_and_computing():
    floors = Floors(copy_gbps=4000.0, matmul_tflops=800.0, empty_kernel_us=1.0)
    assert floors.floor_us(8.0e6, 0) == pytest.approx(2.0)
    assert floors.floor_us(8.0e6, 8e9) == pytest.approx(10.0)


def test_shares_and_ratios(run_facts, timed_row):
    rows = [
        timed_row("cublas", 10.0, weight_bytes=33.6e6),
        timed_row("sliderquant", 4.0),
        timed_row("humming", 5.0),
        timed_row("torch-int4", 8.0),
        timed_row("cublas", 12.0, m=2),
    ]
    cublas, ours, humming, int4, alone = derive(rows, {0: run_facts()}, OPS)
    moved = 9e6 + 2 * 8192
    assert ours["floor_us"] == pytest.approx(moved / 4000e3)
    assert ours["percent_of_floor"] == pytest.approx(100 * moved / 4000e3 / 4.0)
    assert ours["gbps"] == pytest.approx(moved / 4.0 / 1e3)
    assert ours["percent_of_copy"] == pytest.approx(ours["percent_of_floor"])
    assert ours["tflops"] == pytest.approx(2 * 4096**2 / 4.0 / 1e6)
    assert (ours["ratio_to_16bit"], cublas["ratio_to_16bit"]) == (2.5, 1.0)
    assert (ours["best_peer"], ours["ratio_to_best_peer"]) == ("humming", 1.25)
    # A peer is compared with the others, and ours is nobody's peer.
    assert (humming["best_peer"], humming["ratio_to_best_peer"]) == ("torch-int4", 1.6)
    assert (int4["best_peer"], int4["ratio_to_best_peer"]) == ("humming", 0.625)
    assert "best_peer" not in alone
    assert not any("runs_mixed" in row for row in (cublas, ours, humming))


def test_many_tokens_are_bound_by_arithmetic(run_facts, timed_row):
    (row,) = derive([timed_row("sliderquant", 200.0, m=4096)], {0: run_facts()}, OPS)
    assert row["floor_us"] == pytest.approx(2 * 4096**3 / 800e6)
    assert row["percent_of_floor"] == pytest.approx(row["floor_us"] / 2)
    assert "ratio_to_16bit" not in row


def test_a_ratio_over_two_runs_says_so(run_facts, timed_row):
    rows = [timed_row("cublas", 10.0, run=0), timed_row("sliderquant", 4.0, run=1)]
    cublas, ours = derive(rows, {0: run_facts(0), 1: run_facts(1, copy_gbps=2000.0)}, OPS)
    assert ours["runs_mixed"] is True
    assert "runs_mixed" not in cublas
    assert ours["floor_us"] == pytest.approx((9e6 + 2 * 8192) / 2000e3)  # of its own run


def test_rows_without_a_time_are_left_as_they_are(run_facts, timed_row):
    failed = {**timed_row("humming", 1.0), "status": "error", "error": "wrong"}
    del failed["q50_us"]
    checked = {**timed_row("sliderquant", 1.0), "kind": "check"}
    for column in ("q20_us", "q50_us", "q80_us"):
        del checked[column]
    assert derive([failed, checked], {0: run_facts()}, OPS) == [failed, checked]


def test_on_a_cpu_the_ratio_is_to_the_baseline_that_took_turns(run_facts, timed_row):
    rows = [timed_row("onednn", 30.0), timed_row("sliderquant", 10.0, baseline_us=20.0)]
    _, ours = derive(rows, {0: run_facts(device="cpu")}, OPS)
    assert ours["ratio_to_16bit"] == 2.0


def _measured(found):
    return {goal.text: (goal.measured, goal.passed, goal.where) for goal in found}


def test_goals_take_the_worst_of_their_rows(run_facts, timed_row):
    large, medium = {"shape": "8192x28672", "weight_bytes": 123e6}, {"shape": "14336x4096", "weight_bytes": 31e6}
    rows = [
        timed_row("sliderquant", 40.0, **large),
        timed_row("sliderquant", 46.0, m=16, **large),
        timed_row("sliderquant", 20.0, scheme="W2A16-g128", shape="8192x28672", weight_bytes=63e6),
        timed_row("sliderquant", 10.0, **medium),
        timed_row("sliderquant", 10.5, m=16, **medium),
        timed_row("sliderquant", 9.0, scheme="W2A16-g128", shape="14336x4096", weight_bytes=16e6),
        timed_row("sliderquant", 9.5, scheme="W3A16-g128", shape="14336x4096", weight_bytes=24e6),
        timed_row("humming", 44.0, **large),
        timed_row("humming", 9.5, **medium),
        timed_row("cublas", 500.0, m=2048, **medium),
        timed_row("sliderquant", 520.0, m=2048, **medium),
    ]
    runs = {0: run_facts()}
    found = list(_measured(goals(derive(rows, runs, OPS), runs)).values())
    assert found[0][0] == pytest.approx((123e6 + 2 * 36864) / 40e3 / 4000)
    assert found[0][1] is True
    assert found[1][0] == pytest.approx((31e6 + 2 * 18432) / 10e3 / 4000)
    assert found[2] == (pytest.approx(1.15), False, "worst of 2: 8192x28672, M = 16")
    assert found[3] == (pytest.approx(500 / 520), True, "worst of 1: 14336x4096, M = 2048")
    assert found[4] == (pytest.approx(0.95), False, "worst of 2: 14336x4096, M = 1")
    assert found[5] == (pytest.approx(10 / 9), False, "worst of 2: 14336x4096, M = 1")
    assert found[6] == (pytest.approx(10 / 9.5), True, "worst of 1: 14336x4096, M = 1")


def test_goals_without_rows_are_not_measured(run_facts, timed_row):
    rows = [timed_row("sliderquant", 1.0)]
    for runs, kept in (({0: run_facts()}, []), ({0: run_facts(device="cpu")}, rows)):
        assert {measured for measured, _, _ in _measured(goals(derive(kept, runs, OPS), runs)).values()} == {None}
