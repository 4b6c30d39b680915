"""Compile the kernels for GPUs that are not there, and report what the compiler made of them.

    python -m sliderquant_kernels.inspect --arch sm_80 --arch sm_90 [--full] [--json]

For every problem of a small grid it takes the tile that a launch would take, compiles for each architecture,
disassembles, and prints registers, spilled bytes, shared memory, the matrix instruction and the instruction count. The
exit status is 1 if anything fails to compile or spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .layout import WeightLayout
from .tiles import Tile, choose_dequantize_tile, choose_tile

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# A weight large enough that no shape class is special, and one whose K is not a multiple of any tile.
_N, _K, _ODD_K = 4096, 4096, 4100
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_MATRIX = re.compile(r"UTC\w*MMA|(?:HG|IG|QG|H|I|Q)MMA")


@dataclass(frozen=True)
class Problem:
    """One thing to compile: an op, a scheme and the number of tokens."""

    op: str
    layout: WeightLayout
    dtype: torch.dtype
    m: int

    def describe(self) -> str:
        """Its shape class in words."""
        scheme = f"W{self.layout.bits}-{'g' + str(self.layout.group_size) if self.layout.group_size else 'channel'}"
        symmetry = "sym" if self.layout.symmetric else "asym"
        tokens = f" M={self.m}" if self.op == "weight_only_linear" else ""
        odd = " odd-K" if self.layout.k == _ODD_K else ""
        return f"{scheme}-{symmetry} {str(self.dtype).removeprefix('torch.')}{tokens}{odd}"


@dataclass(frozen=True)
class Row:
    """What one compilation gave. `error` is empty if it compiled."""

    arch: str
    op: str
    shape: str
    tile: Tile
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix_instruction: str = ""
    instructions: int = 0
    error: str = ""

    @property
    def passed(self) -> bool:
        """Compiled without spilling."""
        return not self.error and self.spills == 0


def problems(full: bool = False) -> Iterator[Problem]:
    """The grid: by default each width, dtype, grouping, symmetry and M class at least once; everything with `full`."""

    def make(bits: int, group_size: int | None, symmetric: bool, k: int = _K) -> WeightLayout:
        return WeightLayout("triton", bits, _N, k, group_size, symmetric)

    widths, half = (2, 3, 4, 8), torch.float16
    if full:
        schemes = itertools.product(widths, (32, 64, 128, None), (True, False), _POINTER, (1, 32, 64))
        for bits, group_size, symmetric, dtype, m in schemes:
            yield Problem("weight_only_linear", make(bits, group_size, symmetric), dtype, m)
        for bits, dtype in itertools.product(widths, _POINTER):
            yield Problem("weight_only_linear", make(bits, None, False, _ODD_K), dtype, 1)
            yield Problem("dequantize", make(bits, 128, False), dtype, 1)
        return
    for bits in widths:
        yield Problem("weight_only_linear", make(bits, 128, True), torch.bfloat16, 1)
        yield Problem("weight_only_linear", make(bits, 128, False), torch.bfloat16, 64)
    yield Problem("weight_only_linear", make(3, 32, False), half, 32)
    yield Problem("weight_only_linear", make(4, None, True), half, 1)
    yield Problem("weight_only_linear", make(3, None, False, _ODD_K), torch.bfloat16, 1)
    yield Problem("weight_only_linear", make(4, 128, False), torch.float32, 32)
    yield Problem("dequantize", make(3, 128, False), torch.bfloat16, 1)


def inspect(problem: Problem, arch: str) -> Row:
    """Compile one problem for one architecture such as `sm_90`."""
    layout = problem.layout
    if problem.op == "dequantize":
        tile = choose_dequantize_tile(layout.k, layout.group_size)
    else:
        tile = choose_tile(problem.m, layout.n, layout.k, layout.bits, layout.group_size, problem.dtype)
    row = Row(arch, problem.op, problem.describe(), tile)
    try:
        compiled = _compile(problem, tile, arch)
    except Exception as error:  # whatever the compiler throws is this row's result
        return replace(row, error=f"{type(error).__name__}: {error}".splitlines()[0])
    opcodes, registers, stack = _disassemble(compiled.asm["cubin"])
    matrix = sorted({match[0] for match in map(_MATRIX.match, opcodes) if match})
    return replace(
        row,
        registers=registers,
        spills=stack,
        shared=compiled.metadata.shared,
        matrix_instruction="+".join(matrix) or "none",
        instructions=sum(opcode != "NOP" for opcode in opcodes),
    )


def _compile(problem: Problem, tile: Tile, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import weight_only_triton as kernels

    if kernels.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    layout, values = problem.layout, _POINTER[problem.dtype]
    zero = {} if layout.symmetric else {"zero_ptr": "*u8"}
    if problem.op == "dequantize":
        function = kernels.dequantize_kernel
        constants = kernels.dequantize_constants(layout, tile)
        types = {"weight_ptr": "*u8", "scale_ptr": values, **zero, "out_ptr": values}
    else:
        function = kernels.weight_only_kernel
        constants = kernels.weight_only_constants(layout, tile, problem.dtype)
        types = {"x_ptr": values, "weight_ptr": "*u8", "scale_ptr": values, **zero, "bias_ptr": values, "y_ptr": values}
    # What the launcher's specialization would find: torch aligns tensors, and these sizes are multiples of 16 or not.
    sizes = {"M": problem.m, "N": layout.n, "K": layout.k, "padded_k": -(-layout.k // 32) * 32, "groups": layout.groups}
    signature, divisible = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in types:
            signature[name] = types[name]
            divisible[(position,)] = [["tt.divisibility", 16]]
        elif name in sizes and sizes[name] != 1:
            signature[name] = "i32"
            if sizes[name] % 16 == 0:
                divisible[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, sizes.get(name))
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    options = kernels.launch_options(tile)
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def _disassemble(cubin: bytes) -> tuple[list[str], int, int]:
    """A cubin -> (opcodes in order, registers per thread, stack bytes per thread: what spilled)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        runs = [subprocess.run([tool, flag, file], capture_output=True, text=True) for flag in ("-sass", "-res-usage")]
    for run in runs:
        if run.returncode:
            raise RuntimeError(f"cuobjdump failed: {run.stderr.strip()}")
    opcodes = [match[1] for match in map(_INSTRUCTION.match, runs[0].stdout.splitlines()) if match]
    usage = runs[1].stdout + runs[1].stderr
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    if not opcodes or registers is None or stack is None:
        raise RuntimeError("cuobjdump printed no code or no resource usage: its output format has changed")
    return opcodes, int(registers[1]), int(stack[1])


def _print_table(rows: list[Row]) -> None:
    header = ("arch", "op", "shape", "tile NxKxM", "w", "st", "regs", "spill", "shared", "matrix", "instr")
    table = [header]
    for r in rows:
        t = r.tile
        tile = (f"{t.block_n}x{t.block_k}x{t.block_m}", str(t.num_warps), str(t.num_stages))
        figures = (str(r.registers), str(r.spills), str(r.shared), r.matrix_instruction, str(r.instructions))
        table.append((r.arch, r.op, r.shape, *tile, *(("error", r.error, "", "", "") if r.error else figures)))
    widths = [max(len(line[i]) for line in table if len(line[i]) < 60) for i in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all of them")
    parser.add_argument("--full", action="store_true", help="every combination instead of a quick selection")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    rows = [inspect(problem, arch) for arch in options.arch or ARCHITECTURES for problem in problems(options.full)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print_table(rows)
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows)} compiled, {len(failed)} failed or spilled", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
