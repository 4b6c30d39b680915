"""What would be launched on a GPU, by source: `python -m benchmarks.gpu.cache.record SOURCE FOLDER`.

Each source writes lines of JSON into the folder: `name`, what ran, and `kernels`, what it would have launched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from .device import ARCH, absent_gpu
from .kernels import text_of
from .plugin import FOLDER_VARIABLE

__all__ = ["SOURCES", "record"]

ROOT = Path(__file__).resolve().parents[3]
# Tests that launch kernels where there is a GPU, and mostly skip where there is none.
TESTS = (
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "sliderquant_kernels").rglob("test_gpu*.py"))),
    "tests/sliderquant_kernels/attention/test_op.py",
    "tests/sliderquant_kernels/elementwise/test_op.py",
    "tests/decoding/test_gpu_decoding.py",
    "tests/modules/test_linear.py::test_a_move_to_a_gpu_packs_again",
    "tests/checkpoint/test_loaded_models.py::test_load_on_a_gpu",
)
DECODED_SHAPES = ("llama-3-8b", "llama-3.2-1b", "1b")
DECODED_BATCHES = (1, 8, 16)
Line = tuple[str, set[str]]


def record(source: str, folder: Path, processes: int = 1) -> None:
    """Write down what a source would launch, in processes of its own.

    Args:
        source: one of `SOURCES`.
        processes: for the tests.

    Raises:
        RuntimeError: nothing was recorded.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    if source == "tests":
        environment[FOLDER_VARIABLE] = str(folder)
        workers = ["-n", str(processes)] if processes > 1 else []
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.cache.plugin", "-p", "no:cacheprovider",
                   "--tb=no", "-q", *workers, *TESTS]  # fmt: skip
    else:
        command = [sys.executable, "-m", "benchmarks.gpu.cache.record", source, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (folder / f"{source}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if not any(folder.glob(f"{source}-*.jsonl")):
        raise RuntimeError(f"{source}: nothing was recorded\n{(done.stdout + done.stderr)[-3000:]}")


def benchmark() -> Iterator[Line]:
    """The plan of `python -m benchmarks kernels --subset quick`, what is installed with the package."""
    from benchmarks.kernels.command import make_plan, settings
    from benchmarks.kernels.measure import Measurer
    from benchmarks.kernels.ops import OPS

    kernels: set[str] = set()
    with absent_gpu(lambda *compiled: kernels.add(text_of(*compiled)), largest=0):
        plan = make_plan(list(OPS), "quick", "cuda", None)
        measurer = Measurer("cuda", OPS, settings("cuda", "quick"))
        tasks = dict.fromkeys(task._replace(kind="warm") for task in (*plan.checks, *plan.timings))
        for task in tasks:
            provider = OPS[task.case.op].PROVIDERS[task.provider]
            if provider.peer or provider.distribution:
                continue
            kernels.clear()
            row = measurer(task)
            name = f"{task.provider} {' '.join(map(str, task.case.columns().values()))}"
            error = f": {row['error']}" if row["status"] != "ok" else ""
            if kernels or error:  # the other calls are torch's own
                yield name + error, set(kernels)


def tune() -> Iterator[Line]:
    """The candidates of the phase `tune`."""
    from benchmarks.gpu.tune import TOKENS, WEIGHTS
    from sliderquant_kernels.common.choices import Device, Problem
    from sliderquant_kernels.common.compiling import compile_launch
    from sliderquant_kernels.tools.launches import describe_launch
    from sliderquant_kernels.tools.problems import Case
    from sliderquant_kernels.tools.tune import candidates

    kernels: set[str] = set()
    with absent_gpu(lambda *compiled: kernels.add(text_of(*compiled))):
        for (n, k), m in itertools.product(WEIGHTS, TOKENS):
            problem = Problem(m, n, k, 4, 128, False, torch.bfloat16)
            case = Case("weight_only_linear", problem)
            kernels.clear()
            compile_launch(describe_launch(Case("dequantize", problem), ARCH), ARCH)
            for choice in candidates(problem, Device.typical(ARCH)):
                if choice.variant != "dense":
                    compile_launch(describe_launch(case, ARCH, choice), ARCH)
            yield f"{n}x{k} M={m}", set(kernels)


def smoke() -> Iterator[Line]:
    """The cases of the phase `smoke`; what torch.compile is to capture launches the same as the graph."""
    from benchmarks.gpu.smoke import Smoke
    from benchmarks.gpu.smoke_cases import CASES

    kernels: set[str] = set()
    with absent_gpu(lambda *compiled: kernels.add(text_of(*compiled))):
        for key, case in CASES.items():
            if case.family != "torch.compile":
                kernels.clear()
                Smoke("cuda", 1)(key)
                yield key, set(kernels)


@torch.no_grad()
def decoding() -> Iterator[Line]:
    """Generating, and prompts, with one layer of the known shapes: other layers launch the same."""
    from sliderquant import load
    from sliderquant.evaluation.bench_worker import Job, Worker
    from sliderquant.warming import TOKENS

    for shape in DECODED_SHAPES:
        kernels: set[str] = set()
        with TemporaryDirectory() as made:
            checkpoint = _checkpoint(Path(made), shape)
            with absent_gpu(lambda *compiled, kernels=kernels: kernels.add(text_of(*compiled)), largest=1 << 30):
                worker = Worker(Job(str(checkpoint), "cuda", new_tokens=6))
                worker.model = load(checkpoint, device="cuda")
                for tokens in TOKENS:
                    worker.model(torch.zeros(1, tokens, dtype=torch.int64, device="cuda"), use_cache=False)
                for batch in DECODED_BATCHES:
                    worker.decode(batch)
        yield f"{shape} W4A16-g128", kernels


def _checkpoint(folder: Path, shape: str) -> Path:
    """One layer of a shape with few words, rounded to 4 bits."""
    from benchmarks.random_model import SHAPES, write
    from sliderquant.pipeline import quantize

    with patch.dict(SHAPES, {shape: {**SHAPES[shape], "num_hidden_layers": 1, "vocab_size": 2048}}):
        write(folder / "model", shape)
    quantize(folder / "model", folder / "out", scheme="W4A16-g128", method="rtn", device="cpu")
    return folder / "out"


_RECORDERS: dict[str, Any] = {"benchmark": benchmark, "smoke": smoke, "tune": tune, "decoding": decoding}
SOURCES = ("tests", *_RECORDERS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cache.record")
    parser.add_argument("source", choices=_RECORDERS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with (arguments.folder / f"{arguments.source}-0.jsonl").open("w", encoding="utf-8") as file:
        for name, kernels in _RECORDERS[arguments.source]():
            file.write(json.dumps({"name": name, "kernels": sorted(kernels)}) + "\n")


if __name__ == "__main__":
    main()
