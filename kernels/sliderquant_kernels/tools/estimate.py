"""Print what `weight_only.estimate` says of shapes, and compile the table that it reads.

python -m sliderquant_kernels.estimate [--shape 14336x4096 ...] [--bits 4 ...] [--tokens 1 ...]
python -m sliderquant_kernels.estimate --write-resources
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ..common.choices import Choice, Device, Problem
from ..weight_only.estimate import FIELDS, MAX_SPLIT, MAX_TOKENS, MEMORY, RESOURCES, estimate, scale_share
from ..weight_only.fragments import ROWS, block_inputs
from ..weight_only.tiles import choose
from .inspect import inspect
from .problems import Case


def _tiles_to_compile(bits: int) -> Iterator[Choice]:
    for block_m, row_blocks, warps in itertools.product((8, 16), (1, 2, 4, 8), (2, 4, 8)):
        yield Choice("warp_k", block_m, row_blocks, warps, 3)
    for block_m, (row_blocks, warps) in itertools.product((16, 32, 64), ((4, 4), (8, 4), (8, 8), (16, 8))):
        yield Choice("rows", block_m, row_blocks, warps, 4)


def _compiled(job: tuple[int, int, Choice]) -> list[Any] | None:
    """A row of `resources.json`; None for a tile that spills."""
    bits, groups, choice = job
    # There are no larger groups: one for a block of 256 inputs is one for all of them.
    group_size = block_inputs(bits) // groups if block_inputs(bits) // groups <= 128 else None
    case = Case("weight_only_linear", Problem(choice.block_m, 4096, 4096, bits, group_size, False, torch.bfloat16))
    # A split's own epilogue takes registers too.
    whole, split = (inspect(case, "sm_90", replace(choice, split=split)) for split in (1, MAX_SPLIT))
    print(f"W{bits}, {groups} groups, {choice}: {whole.registers} and {split.registers} registers, {whole.spills} and "
          f"{split.spills} spilled {whole.error}", flush=True)  # fmt: skip
    if not whole.passed:
        return None
    tile = (choice.block_m, choice.row_blocks, choice.num_warps)
    shared = split.registers if split.passed else 0
    return [choice.variant, bits, groups, *tile, whole.registers, shared, whole.per_16_bytes]


def write_resources() -> None:
    """Compile every tile for sm_90 and write those that do not spill to `resources.json`."""
    import triton

    jobs = [
        (bits, groups, choice)
        for bits, groups in itertools.product((2, 3, 4, 8), (1, 2, 4, 8))
        if block_inputs(bits) // groups >= 32
        for choice in _tiles_to_compile(bits)
    ]
    with ProcessPoolExecutor() as pool:
        rows = [row for row in pool.map(_compiled, jobs) if row is not None]
    if not rows:
        raise SystemExit(f"no tile compiled without spilling: {RESOURCES} stays as it is; the lines above say why")
    lines = ",\n".join(json.dumps(row) for row in rows)
    content = f'{{"triton": "{triton.__version__}", "fields": {json.dumps(FIELDS)}, "tiles": [\n{lines}\n]}}\n'
    temporary = RESOURCES.with_suffix(".partial")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(RESOURCES)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0) or int(k) % 128:
        raise argparse.ArgumentTypeError(f"expected NxK such as 14336x4096, K a multiple of 128, got {text!r}")
    return int(n), int(k)


def main() -> None:
    """Print the estimate of what the rules choose."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.estimate", description=__doc__.split("\n")[0])
    shapes = ["8192x28672", "28672x4096", "14336x4096", "4096x4096"]
    parser.add_argument("--shape", nargs="+", type=_shape, default=list(map(_shape, shapes)), metavar="NxK",
                        help=f"of weights, K a multiple of 128 (default: {' '.join(shapes)})")  # fmt: skip
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4], help="default: 4")
    parser.add_argument("--tokens", nargs="+", type=int, choices=range(1, MAX_TOKENS + 1), metavar="M",
                        default=[1, 8, 16, 32, 64], help=f"1 to {MAX_TOKENS} (default: 1 8 16 32 64)")  # fmt: skip
    parser.add_argument("--write-resources", action="store_true", help="compile all tiles anew; takes minutes")
    arguments = parser.parse_args()
    if arguments.write_resources:
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
        write_resources()
        return
    device = Device.typical(90)
    print(f"groups of 128, bf16, 132 multiprocessors, memory of an H200; share of {MEMORY / 1e6:.2f} TB/s")
    for (n, k), bits, m in itertools.product(arguments.shape, arguments.bits, arguments.tokens):
        problem = Problem(m, n, k, bits, 128, False, torch.bfloat16)
        choice = choose(problem, device)
        found = estimate(problem, replace(choice, reason=""), device)
        share = n * k * bits / 8 * (1 + scale_share(problem)) / MEMORY / found.microseconds
        tile = f"{choice.variant} {choice.block_m} x {choice.row_blocks * ROWS}, {choice.num_warps} warps"
        print(
            f"{f'{n}x{k}':>12} W{bits} M={m:<3} {found.microseconds:7.1f} us {share:5.0%}  {tile}, "
            f"{choice.num_stages} stages, split {choice.split}, {found.programs} a multiprocessor, "
            f"{found.rounds} rounds, {found.bound}"
        )
