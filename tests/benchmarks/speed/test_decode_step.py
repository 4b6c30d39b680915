"""What a token takes, with a replay that is a call of the step."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.speed import decode_step
from sliderquant.decoding import attach_decode_runner
from sliderquant.decoding.runner import _Graph
from sliderquant.evaluation.bench_worker import Job, Worker
from sliderquant.pipeline import quantize


@pytest.fixture
def worker(tmp_path: Path, random_model: Callable[..., Path]) -> Worker:
    quantize(random_model(tmp_path / "source"), tmp_path / "out", scheme="W4A16-g32", method="rtn")
    found = Worker(Job(str(tmp_path / "out"), "cpu", new_tokens=6))
    found.load()
    return found


def test_every_figure(worker: Worker) -> None:
    replays = 0

    def capture(step: Callable[[], Tensor]) -> _Graph:
        graph = _Graph(lambda: None, torch.empty(0))

        def replay() -> None:
            nonlocal replays
            replays += 1
            graph.logits = step()

        graph.replay = replay
        return graph

    attach_decode_runner(worker.model, capture=capture)
    rows = decode_step.measure(worker, [1, 3], rounds=2)
    assert [(row["what"], row["batch"]) for row in rows] == [
        *[(what, batch) for batch in (1, 3) for what in ("by a graph", "without")],
        *[("graph alone", batch) for batch in (1, 3) for _ in range(3)],
    ]
    assert all(row["ms"] > 0 for row in rows)
    # Of 6 tokens the prompt gives one; the first generation captures the next; half of the timed ones take graphs.
    assert replays == 2 * (4 + 2 * 5) + 2 * 3 * 20
    assert worker.model.generation_config.disable_compile is False


def test_a_model_without_graphs(worker: Worker) -> None:
    def refuse(step: Callable[[], Tensor]) -> _Graph:
        raise RuntimeError("no")

    attach_decode_runner(worker.model, capture=refuse)
    with pytest.raises(SystemExit, match="captured no graph"):
        decode_step.measure(worker, [1], rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        decode_step.run(argparse.Namespace(folder=tmp_path))
