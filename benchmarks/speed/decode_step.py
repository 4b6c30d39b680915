"""What a token of `generate` takes on a GPU: by a CUDA graph, without, and the graph alone, kernel by kernel.

`sliderquant bench` compares a checkpoint with the original. This takes its time apart: what is above the graph alone is
transformers' loop.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from sliderquant.decoding import DecodeRunner
from sliderquant.evaluation.bench_worker import Job, Worker

COLUMNS = ["what", "batch", "positions", "ms", "quartiles"]
KERNELS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a quantized checkpoint, such as one of `random-model` by rtn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="that each sequence decodes")
    parser.add_argument("--rounds", type=int, default=5, help="times that with and without take turns")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("decode-step needs a CUDA GPU, torch finds none; `sliderquant bench` measures a CPU")
    worker = Worker(Job(str(arguments.folder), "cuda", new_tokens=arguments.tokens))
    worker.load()
    rows = measure(worker, arguments.batches, arguments.rounds)
    shared = {"model": arguments.folder.name, "tokens": arguments.tokens}
    path = results.write("decode-step", [shared | row for row in rows], arguments.out)
    print(results.markdown(rows, COLUMNS))
    print(f"written to {path}")


def measure(worker: Worker, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per token of a loaded model, for every batch, and what its graph spends them on.

    Raises:
        SystemExit: no graph was captured.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        found: dict[str, list[float]] = {"by a graph": [], "without": []}
        worker.decode(batch)
        for _ in range(rounds):
            found["by a graph"].append(1e3 * batch / worker.decode(batch))
            with _without_graphs(worker.model):
                found["without"].append(1e3 * batch / worker.decode(batch))
        rows += [_row(what, batch, None, values) for what, values in found.items()]
    runner: DecodeRunner = worker.model.get_compiled_call.__self__
    if not runner.slots or not all(slot.graphs for slot in runner.slots):
        raise SystemExit("generate captured no graph for this model; its log says why")
    for slot in runner.slots:
        (length, graph), *_ = slot.graphs.items()
        for positions in (16, length // 2, length - 1):
            rows.append(_row("graph alone", slot.batch, positions, list(_replays(slot, graph, positions))))
    if worker.device.type == "cuda":
        rows += _kernels(runner.slots[0])
    return rows


def _row(what: str, batch: int, positions: int | None, values: list[float]) -> dict[str, Any]:
    quartiles = [round(value, 4) for value in statistics.quantiles(values, n=4)] if len(values) > 3 else values
    return {"what": what, "batch": batch, "positions": positions or "", "ms": statistics.median(values),
            "quartiles": quartiles}  # fmt: skip


@contextmanager
def _without_graphs(model: Any) -> Iterator[None]:
    model.generation_config.disable_compile = True
    try:
        yield
    finally:
        model.generation_config.disable_compile = False


def _replays(slot: Any, graph: Any, positions: int, count: int = 20) -> Iterator[float]:
    """Milliseconds of replays that attend over `positions`."""
    for _ in range(count):
        slot.index.fill_(positions - 1)
        _wait(slot)
        start = time.perf_counter()
        graph.replay()
        _wait(slot)
        yield 1e3 * (time.perf_counter() - start)


def _wait(slot: Any) -> None:
    if slot.index.is_cuda:
        torch.cuda.synchronize(slot.index.device)


def _kernels(slot: Any) -> list[dict[str, Any]]:
    """The kernels of a replay that take longest, in milliseconds of one replay."""
    (length, graph), *_ = slot.graphs.items()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            slot.index.fill_(length // 2)
            graph.replay()
        _wait(slot)
    events = sorted(profile.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return [
        {"what": f"{event.count // 4} times {event.key[:60]}", "batch": slot.batch, "positions": length // 2,
         "ms": event.self_device_time_total / 4e3, "quartiles": ""}
        for event in events[:KERNELS]
        if event.self_device_time_total
    ]  # fmt: skip
