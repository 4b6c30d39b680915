"""Compile the kernels for GPUs that are not there, and report what the compiler made of them.

    python -m sliderquant_kernels.inspect [--arch sm_90 ...] [--op weight_only_linear ...] [--full] [--json]

For every problem of a grid it takes the tile that a launch would take, compiles it for each architecture, disassembles,
and prints a row: registers, spilled bytes, shared memory, the matrix instruction and where it takes the weight from,
instructions, those of the main loop per 16 packed bytes, and the packed bytes that a multiprocessor has in flight. The
exit status is 1 if anything fails to compile, spills, does not fit, or exceeds `budgets.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import tiles
from .fragments import block_bytes, weight_shape
from .layout import WeightLayout
from .problems import Case, dequantize_cases, weight_only_cases
from .sass import MachineCode, disassemble
from .tiles import Choice, Device

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OPS = ("weight_only_linear", "dequantize")
BUDGETS = Path(__file__).parent / "budgets.json"
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Row:
    """What one compilation gave. `error` is empty if it compiled; bytes are in bytes.

    Attributes:
        shared: shared memory of one program.
        weights_from: `registers` or `shared`, see `sass.MachineCode.weights_from`.
        per_16_bytes: thread instructions of the main loop per 16 packed bytes of weight; 0 where nothing is streamed.
        in_flight: packed bytes that the pipelines of one multiprocessor have under way.
    """

    arch: str
    op: str
    shape: str
    choice: Choice
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix_instruction: str = ""
    weights_from: str = ""
    instructions: int = 0
    per_16_bytes: float = 0.0
    in_flight: int = 0
    error: str = ""

    @property
    def passed(self) -> bool:
        """Compiled without spilling, and fits."""
        return not self.error and self.spills == 0

    @property
    def key(self) -> str:
        """What its budget is filed under."""
        return f"{self.arch} {self.op} {self.shape}"


def cases(ops: tuple[str, ...], full: bool = False) -> Iterator[Case]:
    """The grid: by default every variant, width, dtype, grouping and symmetry at least once; all of it with `full`."""
    if "weight_only_linear" in ops:
        yield from weight_only_cases(full)
    if "dequantize" in ops:
        yield from dequantize_cases(full)


def inspect(case: Case, arch: str) -> Row:
    """Compile one case for one architecture such as `sm_90`."""
    number = int(arch.removeprefix("sm_"))
    choice = Choice("dequantize", num_warps=4, num_stages=1)
    if case.op == "weight_only_linear":
        problem = replace(case.problem, m=max(case.problem.m, fewest_tokens()))
        choice = tiles.choose(problem, Device.typical(number), case.variant)
    row = Row(arch, case.op, case.describe(), choice)
    if choice.variant == "dense":
        return replace(row, matrix_instruction="cuBLAS", weights_from="-")
    try:
        compiled = _compile(case, choice, number)
        code = disassemble(compiled.asm["cubin"])
    except Exception as error:  # whatever the compiler throws is this row's result
        return replace(row, error=f"{type(error).__name__}: {error}".splitlines()[0])
    shared = compiled.metadata.shared
    limit = tiles.SHARED_LIMIT[tiles.family(number)]
    row = replace(
        row,
        registers=code.registers,
        spills=code.spilled(),
        shared=shared,
        matrix_instruction=code.matrix_instruction(),
        weights_from=code.weights_from(),
        instructions=code.count(),
        error=f"takes {shared} bytes of shared memory, {limit} are there" if shared > limit else "",
    )
    return _with_rates(row, case, code, number) if case.op == "weight_only_linear" else row


def _with_rates(row: Row, case: Case, code: MachineCode, arch: int) -> Row:
    choice, bits = row.choice, case.problem.bits
    blocks = choice.row_blocks * (choice.num_warps if choice.variant == "warp_k" else 1)
    units = blocks * block_bytes(bits) / 16
    programs = code.programs_per_sm(tiles.family(arch), choice.num_warps, row.shared)
    return replace(
        row,
        per_16_bytes=round(code.loop_count() * choice.num_warps * 32 / units, 1),
        in_flight=tiles.bytes_in_flight(choice, bits, programs),
    )


def _compile(case: Case, choice: Choice, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import matmul_triton as kernels
    from . import weight_only_triton as launch

    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    problem, values = case.problem, _POINTER[case.problem.dtype]
    row_blocks, k_blocks, _ = weight_shape(problem.n, problem.k, problem.bits)
    sizes = {"M": problem.m, "N": problem.n, "K": problem.k, "row_blocks": row_blocks, "k_blocks": k_blocks}
    if case.op == "dequantize":
        function, options = kernels.dequantize_kernel, launch.DEQUANTIZE_OPTIONS
        layout = WeightLayout("triton", problem.bits, problem.n, problem.k, problem.group_size, problem.symmetric)
        constants = launch.dequantize_constants(layout, problem.dtype)
        types = {"weight_ptr": "*u8", "scale_ptr": values, "out_ptr": values}
    else:
        function = kernels.warp_k_kernel if choice.variant == "warp_k" else kernels.rows_kernel
        constants = launch.matmul_constants(problem, choice, arch)
        options = launch.launch_options(choice.num_warps, choice.num_stages)
        types = {"weight_ptr": "*u8", "partial_ptr": "*fp32", "counter_ptr": "*i32"}
        types |= dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "residual_ptr", "y_ptr"), values)
        if not case.epilogue:
            del types["bias_ptr"], types["residual_ptr"]
        if choice.split == 1:
            del types["partial_ptr"], types["counter_ptr"]
    # What the launcher's specialization would find: torch aligns tensors, and these sizes are multiples of 16 or not.
    signature: dict[str, str] = {}
    divisible: dict[tuple[int], Any] = {}
    for position, name in enumerate(function.arg_names):
        if name in types:
            signature[name] = types[name]
            divisible[(position,)] = [["tt.divisibility", 16]]
        elif name in sizes:
            signature[name] = "i32"
            if sizes[name] % 16 == 0 and name not in kernels.NOT_SPECIALIZED:
                divisible[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def fewest_tokens() -> int:
    """What the launch takes for fewer tokens, see there."""
    from .weight_only_triton import FEWEST_TOKENS

    return FEWEST_TOKENS


def over_budget(rows: list[Row], budgets: dict[str, Any]) -> list[str]:
    """A sentence for every row whose main loop has more instructions than its budget. Figures of another Triton version
    than the one that made the budgets may differ by a tenth."""
    import triton

    slack = 1.0 if budgets.get("triton") == triton.__version__ else 1.1
    found = []
    for row in rows:
        budget = budgets["per_16_bytes"].get(row.key)
        if budget is not None and row.per_16_bytes > budget * slack:
            found.append(f"{row.key}: {row.per_16_bytes} instructions per 16 packed bytes, the budget is {budget}")
    return found


def write_budgets(rows: list[Row], path: Path = BUDGETS) -> None:
    """Lower the budgets to what the rows took; never raise one."""
    import triton

    old = json.loads(path.read_text(encoding="utf-8"))["per_16_bytes"] if path.is_file() else {}
    new = {row.key: min(row.per_16_bytes, old.get(row.key, row.per_16_bytes)) for row in rows if row.per_16_bytes}
    content = {"triton": triton.__version__, "per_16_bytes": dict(sorted((old | new).items()))}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _print_table(rows: list[Row]) -> None:
    header = ("arch", "op", "shape", "variant", "MxN", "w", "st", "split", "regs", "spill", "shared", "matrix",
              "W from", "instr", "/16B", "in flight")  # fmt: skip
    table = [header]
    for r in rows:
        c = r.choice
        tile = (c.variant, f"{c.block_m}x{c.row_blocks * 16}", str(c.num_warps), str(c.num_stages), str(c.split))
        figures = (str(r.registers), str(r.spills), str(r.shared), r.matrix_instruction, r.weights_from,
                   str(r.instructions), str(r.per_16_bytes), str(r.in_flight))  # fmt: skip
        table.append((r.arch, r.op, r.shape, *tile, *((("error", r.error) + ("",) * 6) if r.error else figures)))
    widths = [max(len(line[i]) for line in table if len(line[i]) < 60) for i in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all of them")
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable; default: all of them")
    parser.add_argument("--full", action="store_true", help="every combination instead of a quick selection")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.add_argument("--write-budgets", action="store_true", help="lower budgets.json to what was found")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    grid = [
        (case, arch) for arch in options.arch or ARCHITECTURES for case in cases(tuple(options.op or OPS), options.full)
    ]
    # ptxas and the disassembler are processes of their own.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = list(pool.map(lambda item: inspect(*item), grid))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print_table(rows)
    failed = [row for row in rows if not row.passed]
    if options.write_budgets and not failed:
        write_budgets(rows)
    exceeded = over_budget(rows, json.loads(BUDGETS.read_text(encoding="utf-8"))) if BUDGETS.is_file() else []
    for line in exceeded:
        print(line, file=sys.stderr)
    print(f"{len(rows)} compiled, {len(failed)} failed or spilled, {len(exceeded)} over budget", file=sys.stderr)
    return 1 if failed or exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
