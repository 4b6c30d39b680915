"""Times of a call whose weights do not lie in the cache.

Calls rotate over copies of their tensors: before one is used again, twice the cache's size of other tensors has been
read. Nothing else runs between two calls, so that their time is the kernels' alone, with the gap that a GPU needs from
one kernel to the next; benchmarks measure that gap apart. Activations stay in the cache, where the kernel before
would have left them.

On CUDA the calls are captured in a graph whose replays are timed with events: no launch from Python is in the time.
Candidates for one job have a graph each, and their replays take turns, so that a drift of the clocks hits all of them.
On a CPU, which other programs share, a call and its baseline take turns, so that the machine's changes hit both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Cuda",
    "Device",
    "Graph",
    "Settings",
    "Timing",
    "capture_rounds",
    "copies_needed",
    "copy_tensors",
    "graphs_in_turns",
    "in_graphs",
    "in_turns",
    "quantiles",
]

Call = Callable[[], Any]
# How many times the cache's size lies between two uses of a tensor.
CACHE_FACTOR = 2


class Settings(NamedTuple):
    """How long to measure. A sample is one replay of a graph on CUDA, one call on a CPU."""

    graph_us: float = 1000.0
    most_calls: int = 512
    warm_us: float = 20_000.0
    budget_us: float = 100_000.0
    fewest_samples: int = 7
    most_samples: int = 40


class Timing(NamedTuple):
    """Microseconds per call of each sample, and of the baseline where it took turns; how they came about."""

    samples: list[float]
    baseline: list[float] | None
    calls_per_sample: int
    method: str


class Device(Protocol):
    """What timing needs of a GPU."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """A function that replays the calls."""

    def elapsed_us(self, replays: Sequence[Call]) -> list[float]:
        """Microseconds of each of several replays in a row."""


class Graph(NamedTuple):
    """Captured calls: what replays them, and how many they are."""

    replay: Call
    calls: int


def copies_needed(tensor_bytes: int, cache_bytes: int) -> int:
    """How many sets of tensors to rotate over, at least 2, so that each is cold when its turn comes."""
    if tensor_bytes <= 0:
        raise ValueError(f"tensor_bytes: expected at least 1, got {tensor_bytes}; there is nothing to rotate")
    return max(2, 1 + -(-CACHE_FACTOR * cache_bytes // tensor_bytes))


def copy_tensors(tensors: tuple[Tensor, ...], copies: int) -> list[tuple[Tensor, ...]]:
    """The tensors and copies - 1 clones of them."""
    return [tensors] + [tuple(tensor.clone() for tensor in tensors) for _ in range(copies - 1)]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20%, 50% and 80% quantiles."""
    if len(samples) == 1:
        return (samples[0],) * 3
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def capture_rounds(calls: Sequence[Call], floor_us: float, device: Device, settings: Settings) -> Graph:
    """Capture calls that rotate; floor_us, the least that a call can take, decides how many go into the graph.

    The graph holds whole rounds over the calls, and lasts long enough that what an event costs does not count.
    """
    wanted = min(settings.most_calls, settings.graph_us / max(floor_us, 1e-3))
    rounds = max(1, -(-int(wanted) // len(calls)))
    count = rounds * len(calls)
    return Graph(device.capture(list(islice(cycle(calls), count))), count)


def in_graphs(calls: Sequence[Call], floor_us: float, device: Device, settings: Settings) -> Timing:
    """Time calls that rotate, in a graph as `capture_rounds` makes it."""
    replay, count = capture_rounds(calls, floor_us, device, settings)
    # The first replays tell how many samples fit; further ones bring the clocks up.
    longest = max(device.elapsed_us([replay] * 3))
    device.elapsed_us([replay] * (1 + int(settings.warm_us / max(longest, 1e-3))))
    samples = int(settings.budget_us / max(longest, 1e-3))
    samples = min(max(samples, settings.fewest_samples), settings.most_samples)
    times = [value / count for value in device.elapsed_us([replay] * samples)]
    return Timing(times, None, count, f"{samples} replays of a CUDA graph of {count} calls")


def graphs_in_turns(graphs: Sequence[Graph], device: Device, settings: Settings) -> list[list[float]]:
    """Microseconds per call of each graph: `fewest_samples` samples, or as many as the budget of one graph holds.

    Every round replays each graph once, the first one first and last in turns. A round is queued at once, after a
    replay that is thrown away: it takes the time that the GPU waits for the first launch.
    """
    replays = [graph.replay for graph in graphs]
    longest = max(sum(device.elapsed_us(replays)), 1e-3)
    for _ in range(1 + int(settings.warm_us / longest)):
        device.elapsed_us(replays)
    rounds = int(settings.budget_us * len(graphs) / longest)
    rounds = min(max(rounds, settings.fewest_samples), settings.most_samples)
    samples: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds):
        order = range(len(graphs)) if turn % 2 == 0 else range(len(graphs))[::-1]
        row = [replays[number] for number in order]
        for number, elapsed in zip(order, device.elapsed_us([row[0], *row])[1:], strict=True):
            samples[number].append(elapsed / graphs[number].calls)
    return samples


def in_turns(
    calls: Sequence[Call],
    baseline: Sequence[Call] | None,
    settings: Settings,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time single calls, and the baseline's in turns with them."""
    sides = [cycle(calls)] + ([] if baseline is None else [cycle(baseline)])
    times: list[list[float]] = [[] for _ in sides]
    warm_up, spent, turn = 2, 0.0, 0
    while len(times[0]) < settings.most_samples:
        if spent > settings.budget_us and len(times[0]) >= settings.fewest_samples:
            break
        # Who goes first changes, because the first one finds the caches as the other left them.
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for side in order:
            call = next(sides[side])
            start = clock()
            call()
            elapsed = 1e6 * (clock() - start)
            if turn >= warm_up:
                times[side].append(elapsed)
                spent += elapsed
        turn += 1
    turns = "" if baseline is None else ", in turns with the baseline"
    return Timing(times[0], times[1] if baseline is not None else None, 1, f"{len(times[0])} single calls{turns}")


class Cuda:
    """Graphs and events of the current CUDA device."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """Capture the calls; their results share memory, because each is dropped before the next call."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def elapsed_us(self, replays: Sequence[Call]) -> list[float]:
        """All replays are queued at once, so that the GPU never waits for Python."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(replays) + 1)]
        events[0].record()
        for replay, event in zip(replays, events[1:], strict=True):
            replay()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(second) for first, second in pairwise(events)]
