"""Measure tiles on the GPU at hand, and write the table that goes before the rules of `tiles`.

    python -m sliderquant_kernels.tune [--weight 14336x4096 ...] [--bits 4 ...] [--tokens 1 ...] [--out FILE]

Every candidate is compiled, compared with the dequantized product, and timed: a CUDA graph of launches over copies of
the weight that together exceed the L2 cache, in several rounds in turn, the median counts. A candidate replaces what
the rules say only if it is faster by more than `MARGIN`. An interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from . import estimate, tiles, tuned
from .layout import PackedWeight, WeightLayout
from .tiles import Choice, Device, Problem

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Layers of Llama-3-8B and 70B, single and merged.
WEIGHTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (57344, 8192),
           (8192, 28672))  # fmt: skip
MARGIN = 0.03
ROUNDS = 7
# Where there is an estimate, what it says are the fastest tiles.
MOST_BY_ESTIMATE = 24


def candidates(problem: Problem, device: Device) -> list[Choice]:
    """What is worth measuring for a problem, the rules' own choice first."""
    found = [tiles.choose(problem, device)]
    if tiles.family(device.arch) == 90 and problem.m <= estimate.MAX_TOKENS:
        known = estimate.candidates(problem, device)
        promising = sorted(known, key=lambda choice: estimate.estimate(problem, choice, device).microseconds)
        return _unique([*found, *promising[:MOST_BY_ESTIMATE], Choice("dense")], problem, device)
    block_m = 8 if problem.m <= 8 else 16
    if problem.m <= 64:
        for row_blocks in (1, 2, 4):
            for warps in (4, 8):
                for stages in (2, 3, 4, 5):
                    for split in (1, 2, 4):
                        found.append(Choice("warp_k", block_m, row_blocks, warps, stages, split))
    if problem.m > 4:
        for block in (16, 32, 64, 128):
            if block > 16 and block >= 2 * problem.m:
                continue
            for row_blocks, warps in ((4, 4), (8, 4), (8, 8), (16, 8)):
                for stages in (2, 3, 4):
                    for split in (1, 2, 4):
                        found.append(Choice("rows", block, row_blocks, warps, stages, split))
    found.append(Choice("dense"))
    return _unique(found, problem, device)


def _unique(found: list[Choice], problem: Problem, device: Device) -> list[Choice]:
    unique: dict[Choice, Choice] = {}
    for choice in filter(lambda choice: _sensible(choice, problem, device), found):
        unique.setdefault(replace(choice, reason=""), choice)
    return list(unique.values())


def _sensible(choice: Choice, problem: Problem, device: Device) -> bool:
    if choice.variant == "dense":
        return problem.m >= 16
    k_blocks = -(-problem.k // tiles.block_inputs(problem.bits))
    steps = k_blocks // (choice.split * (choice.num_warps if choice.variant == "warp_k" else 1))
    tiles_m = -(-problem.m // choice.block_m)
    programs = tiles_m * -(-problem.n // (tiles.ROWS * choice.row_blocks)) * choice.split
    # A split for its own sake only moves partial sums.
    return steps >= 1 and (choice.split == 1 or programs <= 4 * device.sm_count)


def fastest(times: dict[Choice, float], default: Choice) -> Choice:
    """The fastest choice, or the rules' own where nothing beats it by more than `MARGIN`. times: seconds."""
    best = min(times, key=lambda choice: times[choice])
    return best if default not in times or times[best] < (1 - MARGIN) * times[default] else default


def tune(
    problems: Iterable[Problem],
    device: Device,
    measure: Callable[[Problem, list[Choice]], dict[Choice, float]],
    out: Path,
    **about: str,
) -> None:
    """Measure problems and write the table after each of them.

    Args:
        measure: the seconds of each choice that computes the right numbers.
        about: with what it is measured, for the file.
    """
    entries = tuned.read(out) if out.is_file() else {}
    for problem in problems:
        key = tuned.key(problem)
        if any(up_to == problem.m for up_to, _ in entries.get(key, [])):
            continue
        found = candidates(problem, device)
        times = measure(problem, found)
        if not times:
            print(f"{problem}: no candidate computed the right numbers", file=sys.stderr)
            continue
        best = fastest(times, found[0])
        ratio = times[best] / times[found[0]] if found[0] in times else float("nan")
        print(f"{problem.n}x{problem.k} W{problem.bits} M={problem.m}: {best} {times[best] * 1e6:.2f} us, {ratio:.2f} "
              f"of the rules' choice", flush=True)  # fmt: skip
        entries.setdefault(key, []).append((problem.m, best))
        tuned.write(out, device, entries, **about)


def measure_on_gpu(problem: Problem, choices: list[Choice]) -> dict[Choice, float]:
    """Seconds of each choice on the current CUDA device, by CUDA graphs with a cold L2 cache."""
    from . import weight_only_triton as launch

    layout = WeightLayout("triton", problem.bits, problem.n, problem.k, problem.group_size, problem.symmetric)
    weights = _weights(layout, problem)
    x = torch.randn(problem.m, problem.k, device="cuda", dtype=problem.dtype)
    want = torch.nn.functional.linear(x, launch.dequantize(*weights[0][:2], layout, problem.dtype)).float()
    graphs = {}
    chosen = launch.choose
    try:
        for choice in choices:
            launch.choose = lambda *_, choice=choice: choice
            try:
                got = launch.weight_only_linear(x, *weights[0][:2], None, None, layout).float()
                if ((got - want).norm() / want.norm()).item() > 0.02:
                    print(f"{choice}: wrong numbers", file=sys.stderr)
                    continue
                graphs[choice] = _captured(launch.weight_only_linear, x, weights, layout)
            except Exception as error:  # a tile that does not fit this GPU
                print(f"{choice}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    finally:
        launch.choose = chosen
    times: dict[Choice, list[float]] = {choice: [] for choice in graphs}
    for _ in range(ROUNDS):
        for choice, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[choice].append(start.elapsed_time(stop) * 1e-3 / len(weights))
    return {choice: statistics.median(found) for choice, found in times.items()}


def _weights(layout: WeightLayout, problem: Problem) -> list[PackedWeight]:
    """Copies of one random packed weight: more than twice the L2 cache, so that none is found there again."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (problem.n, layout.groups)
    codes = torch.randint(
        0, 2**problem.bits, (problem.n, problem.k), dtype=torch.uint8, device="cuda", generator=generator
    )
    scale = torch.rand(shape, device="cuda", generator=generator).add_(0.5).mul_(0.01).to(problem.dtype)
    zero = torch.randint(0, 2**problem.bits, shape, dtype=torch.uint8, device="cuda", generator=generator)
    packed = layout.pack(codes, scale, None if problem.symmetric else zero)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(4, -(-2 * cache // layout.bytes(problem.dtype)) + 1)
    copies = [PackedWeight(packed.weight.clone(), packed.scale.clone(), None) for _ in range(count - 1)]
    return [packed, *copies]


def _captured(op: Callable, x: torch.Tensor, weights: list[PackedWeight], layout: WeightLayout) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight, scale, _ in weights:
            op(x, weight, scale, None, None, layout)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NxK, for example 14336x4096") from None
    return n, k


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--weight", type=_shape, action="append", help="outputs x inputs; repeatable")
    parser.add_argument("--bits", type=int, action="append", choices=(2, 3, 4, 8), help="repeatable; default: 4")
    parser.add_argument("--group-size", type=int, default=128, choices=(0, 32, 64, 128), help="0: per channel")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, action="append", help="repeatable; default: powers of two up to 2048")
    parser.add_argument("--out", type=Path, help="default: the table of this GPU inside the package")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here, and tiles are measured, not guessed", file=sys.stderr)
        return 1
    import triton

    from .weight_only_triton import device_of

    device = device_of(torch.empty(1, device="cuda"))
    problems = [
        Problem(m, n, k, bits, options.group_size or None, options.symmetric, getattr(torch, options.dtype))
        for bits in options.bits or (4,)
        for n, k in options.weight or WEIGHTS
        for m in sorted(options.tokens or TOKENS)
    ]
    out = options.out or tuned.FOLDER / tuned.file_name(device.name)
    tune(problems, device, measure_on_gpu, out, torch=torch.__version__, triton=triton.__version__)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
