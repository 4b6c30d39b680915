"""How often, over what and in which order calls are timed, with devices and clocks that are made up."""

import pytest
import torch

from sliderquant_kernels.tools.timing import (
    Graph,
    Settings,
    copies_needed,
    copy_tensors,
    graphs_in_turns,
    in_graphs,
    in_turns,
    quantiles,
)

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("tensor", "cache", "copies"),
    [(8.7, 60, 15), (30, 60, 5), (61, 60, 3), (121, 60, 2), (1000, 60, 2), (0.5, 50, 201), (60, 60, 3)],
)
def test_between_two_uses_lies_twice_the_cache(tensor, cache, copies):
    tensor, cache = int(tensor * MEGABYTE), cache * MEGABYTE
    assert copies_needed(tensor, cache) == copies
    assert (copies - 1) * tensor >= 2 * cache
    assert copies == 2 or (copies - 2) * tensor < 2 * cache


def test_nothing_to_rotate_is_an_error():
    with pytest.raises(ValueError, match="tensor_bytes: expected at least 1, got 0"):
        copies_needed(0, MEGABYTE)


def test_copies_are_equal_and_apart():
    tensors = (torch.arange(4), torch.ones(2, 3))
    copies = copy_tensors(tensors, 3)
    assert copies[0] is tensors
    assert len({tensor.data_ptr() for copy in copies for tensor in copy}) == 6
    assert all(torch.equal(copy[0], tensors[0]) and torch.equal(copy[1], tensors[1]) for copy in copies)


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


class FakeGpu:
    """A replay takes `us` microseconds per captured call."""

    def __init__(self, us):
        self.us, self.captured, self.replays = us, None, 0

    def capture(self, calls):
        self.captured = list(calls)
        for call in calls:
            call()
        return self.captured

    def elapsed_us(self, replays):
        self.replays += len(replays)
        return [self.us * len(replay) for replay in replays]


def test_a_graph_holds_whole_rounds_and_lasts_long_enough():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(15)]
    timing = in_graphs(calls, 2.0, gpu := FakeGpu(4.0), Settings(graph_us=1000, budget_us=100_000))
    assert len(gpu.captured) == 510  # the multiple of 15 that comes after 1000 / 2
    assert order == list(range(15)) * 34
    assert timing.samples == [4.0] * 40  # 100 ms hold 49 replays of 2.04 ms; 40 are enough
    assert timing.calls_per_sample == 510
    assert timing.method == "40 replays of a CUDA graph of 510 calls"


def test_a_slow_call_is_captured_once_per_copy_and_measured_a_few_times():
    settings = Settings(graph_us=1000, budget_us=60_000, fewest_samples=7)
    timing = in_graphs([lambda: None] * 2, 5000.0, gpu := FakeGpu(9000.0), settings)
    assert len(gpu.captured) == 2
    assert timing.samples == [9000.0] * 7


def test_a_graph_does_not_grow_without_bound():
    in_graphs([lambda: None] * 200, 0.0, gpu := FakeGpu(1.0), Settings(most_calls=512))
    assert len(gpu.captured) == 600


def test_clocks_are_brought_up_before_the_samples():
    in_graphs([lambda: None], 1000.0, gpu := FakeGpu(1000.0), Settings(warm_us=20_000, budget_us=10_000))
    assert gpu.replays == 3 + 21 + 10


class DriftingGpu:
    """Replays take longer from one to the next, and the first of a row waits for its launch."""

    def __init__(self):
        self.rows, self.now = [], 0

    def elapsed_us(self, replays):
        self.rows.append("".join(replays))
        found = []
        for replay in replays:
            self.now += 1
            found.append({"a": 1000.0, "b": 2000.0, "c": 3000.0}[replay] + self.now + (500 if not found else 0))
        return found


def test_graphs_take_turns_and_a_drift_hits_all_of_them():
    graphs = [Graph("a", 10), Graph("b", 20), Graph("c", 30)]
    settings = Settings(warm_us=13_000, budget_us=8000, fewest_samples=2, most_samples=40)
    a, b, c = graphs_in_turns(graphs, gpu := DriftingGpu(), settings)
    # 6.5 ms a round: three rounds bring up the clocks. 8 ms a graph make 3.7 rounds.
    assert gpu.rows == ["abc"] * 3 + ["aabc", "ccba", "aabc"]
    # No sample holds the wait for the first launch of a row.
    assert a == [pytest.approx((1000 + step) / 10) for step in (11, 17, 19)]
    assert b == [pytest.approx((2000 + step) / 20) for step in (12, 16, 20)]
    assert c == [pytest.approx((3000 + step) / 30) for step in (13, 15, 21)]


def test_graphs_in_turns_have_enough_samples_and_not_too_many():
    graphs = [Graph("a", 1), Graph("b", 1)]
    for budget, samples in ((1.0, 7), (1e9, 40)):
        found = graphs_in_turns(graphs, DriftingGpu(), Settings(budget_us=budget))
        assert [len(times) for times in found] == [samples] * 2


class FakeMachine:
    """Its clock moves by what a call takes."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def call(self, name, us):
        def call():
            self.order.append(name)
            self.now += us * 1e-6

        return call


def test_calls_and_baseline_take_turns_and_rotate():
    machine = FakeMachine()
    calls = [machine.call("a0", 100), machine.call("a1", 300)]
    timing = in_turns(calls, [machine.call("b", 50)], Settings(budget_us=1e9, most_samples=6), lambda: machine.now)
    assert timing.samples == pytest.approx([100, 300] * 3)
    assert timing.baseline == pytest.approx([50] * 6)
    # The two first turns warm up, and who goes first changes.
    assert machine.order == ["b", "a0", "a1", "b"] * 4
    assert "in turns" in timing.method


def test_a_budget_ends_the_turns_but_not_before_enough_samples():
    machine = FakeMachine()
    settings = Settings(budget_us=950, fewest_samples=3, most_samples=50)
    assert len(in_turns([machine.call("a", 100)], None, settings, lambda: machine.now).samples) == 10
    assert len(in_turns([machine.call("a", 5000)], None, settings, lambda: machine.now).samples) == 3
