"""Compile the kernels for GPUs that are not there, and report what the compiler made of them.

    python -m sliderquant_kernels.inspect [--arch sm_90 ...] [--op weight_only_linear ...] [--match M=1]
                                          [--full | --models [Llama-3-8B ...]] [--keep FILE]

For every problem of a grid it takes the tile that a launch would take, compiles it for each architecture, disassembles,
and prints a row: registers, spilled bytes, shared memory, the programs that a multiprocessor holds, the matrix
instruction, where it takes the weight from and how it is waited for, instructions, those of the main loop per 16 packed
bytes, and the packed bytes that a multiprocessor has in flight. The exit status is 1 if anything fails to compile,
spills, does not fit, or exceeds `budgets.json`.

Launches that differ in sizes alone are mostly the same code, which is compiled once. `--keep` writes what was compiled
to a file, from where the next call takes what an interrupted one had done, and kernels that have not changed since.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..common import choices
from ..common.choices import Choice
from ..common.compiling import Launch, compile_launch, launch_key
from .launches import describe_launch
from .model_problems import MODELS, model_cases
from .problems import GRIDS, Case
from .sass import disassemble

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OPS = tuple(GRIDS)
BUDGETS = Path(__file__).parent / "budgets.json"


@dataclass(frozen=True)
class Row:
    """What one compilation gave. `error` is empty if it compiled; bytes are in bytes.

    Attributes:
        shared: shared memory of one program.
        programs: that run on one multiprocessor at a time.
        weights_from: `registers` or `shared`, see `sass.MachineCode.weights_from`.
        waits: how many groups of products may be under way after each wait, see `sass.MachineCode.waits`.
        per_16_bytes: thread instructions of the main loop per 16 packed bytes of weight; 0 where nothing is streamed.
        in_flight: packed bytes that the pipelines of one multiprocessor have under way.
        per_element: thread instructions per element of x, for ops without a weight; of the main loop if there is one.
    """

    arch: str
    op: str
    shape: str
    choice: Choice
    registers: int = 0
    spills: int = 0
    shared: int = 0
    programs: int = 0
    matrix_instruction: str = ""
    weights_from: str = ""
    waits: str = "-"
    instructions: int = 0
    per_16_bytes: float = 0.0
    in_flight: int = 0
    per_element: float = 0.0
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
    for op in ops:
        yield from GRIDS[op](full)


def inspect(case: Case, arch: str, choice: Choice | None = None) -> Row:
    """Compile one case for one architecture such as `sm_90`; `choice` as for `describe_launch`."""
    launch = describe_launch(case, int(arch.removeprefix("sm_")), choice)
    return _compiled(Row(arch, case.op, case.describe(), launch.choice), launch)


def inspect_grid(grid: Sequence[tuple[Case, str]], keep: Path | None = None) -> list[Row]:
    """Compile pairs of a case and an architecture, in parallel, those that compile to the same once.

    Args:
        keep: a file of rows that are not compiled again, to which new ones are added as they come, but for failures.

    Raises:
        ValueError: `keep` is no such file. OSError: it cannot be written. Both before anything is compiled.
    """
    known = {} if keep is None else _read_kept(keep)
    launches = [describe_launch(case, int(arch.removeprefix("sm_"))) for case, arch in grid]
    rows = [
        Row(arch, case.op, case.describe(), launch.choice) for (case, arch), launch in zip(grid, launches, strict=True)
    ]
    keys = [_key(row.arch, launch) for row, launch in zip(rows, launches, strict=True)]
    missing = {key: i for i, key in enumerate(keys) if key and key not in known}
    # ptxas and the disassembler are processes of their own.
    with (
        nullcontext() if keep is None else keep.open("a", encoding="utf-8") as file,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        tasks = {pool.submit(_compiled, rows[i], launches[i]): key for key, i in missing.items()}
        try:
            for count, task in enumerate(as_completed(tasks), 1):
                made = {name: value for name, value in asdict(task.result()).items() if name not in _OF_THE_CASE}
                known[tasks[task]] = made
                if file is not None and not made["error"]:
                    file.write(json.dumps({"key": tasks[task], **made}) + "\n")
                    file.flush()
                if count % 100 == 0:
                    print(f"{count} of {len(tasks)} compiled", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [
        replace(row, **known[key]) if key else _compiled(row, launch)
        for row, launch, key in zip(rows, launches, keys, strict=True)
    ]


# What launches that compile to the same may differ in.
_OF_THE_CASE = ("arch", "op", "shape", "choice")


def _key(arch: str, launch: Launch) -> str:
    """The same for launches whose rows are the same but for `_OF_THE_CASE`; empty where nothing is compiled."""
    if launch.function is None:
        return ""
    key = launch_key(launch, int(arch.removeprefix("sm_")))
    # What a program takes of x is no matter of the code, but of the figures of an element.
    return f"{key}-{launch.elements}" if launch.elements else key


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their key. A line that an interruption has cut counts as missing."""
    known = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            key = row.pop("key")
            whole = isinstance(key, str) and {name: type(value) for name, value in row.items()} == _KEPT
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            whole = False
        if whole:
            known[key] = row
    if lines and not known:
        raise ValueError(
            f"keep: expected rows that inspect has written, got {lines[0][:80]!r} in {path}; name another file"
        )
    if lines and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return known


_KEPT = {name: type(value) for name, value in asdict(Row("", "", "", Choice(""))).items() if name not in _OF_THE_CASE}


def _compiled(row: Row, launch: Launch) -> Row:
    """The row with what the compiler made of the launch."""
    number = int(row.arch.removeprefix("sm_"))
    if launch.function is None:
        return replace(row, matrix_instruction="cuBLAS", weights_from="-")
    try:
        compiled = compile_launch(launch, number)
        code = disassemble(compiled.asm["cubin"])
    except Exception as error:  # whatever the compiler throws is this row's result
        return replace(row, error=f"{type(error).__name__}: {error}".splitlines()[0])
    shared = compiled.metadata.shared
    limit = choices.SHARED_LIMIT[choices.family(number)]
    programs = code.programs_per_sm(choices.family(number), launch.num_warps, shared)
    row = replace(
        row,
        registers=code.registers,
        spills=code.spilled(),
        shared=shared,
        programs=programs,
        matrix_instruction=code.matrix_instruction(),
        weights_from=code.weights_from(),
        waits=code.waits(),
        instructions=code.count(),
        error=f"takes {shared} bytes of shared memory, {limit} are there" if shared > limit else "",
    )
    threads = launch.num_warps * 32
    if launch.elements:
        row = replace(row, per_element=round(code.loop_count() * threads / launch.elements, 1))
    if launch.packed_bytes:
        row = replace(
            row,
            per_16_bytes=round(code.loop_count() * threads * 16 / launch.packed_bytes, 1),
            in_flight=programs * (launch.choice.num_stages - 1) * launch.packed_bytes,
        )
    return row


# What budgets are for, and in which unit.
_MEASURES = {"per_16_bytes": "instructions per 16 packed bytes", "per_element": "instructions per element"}


def over_budget(rows: list[Row], budgets: dict[str, Any]) -> list[str]:
    """A sentence for every row that takes more instructions than its budget. Figures of another Triton version than the
    one that made the budgets may differ by a tenth; what differs by more is under `common.releases`."""
    import triton

    slack = 1.0 if budgets.get("triton") == triton.__version__ else 1.1
    own = budgets.get("releases", {}).get(".".join(triton.__version__.split(".")[:2]), {})
    found = []
    for measure, unit in _MEASURES.items():
        for row in rows:
            budget, allowed = own.get(measure, {}).get(row.key), 1.0
            if budget is None:
                budget, allowed = budgets.get(measure, {}).get(row.key), slack
            taken = getattr(row, measure)
            if budget is not None and taken > budget * allowed:
                found.append(f"{row.key}: {taken} {unit}, the budget is {budget}")
    return found


def write_budgets(rows: list[Row], path: Path = BUDGETS) -> None:
    """Lower the budgets to what the rows took; never raise one."""
    import triton

    budgets = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content: dict[str, Any] = {"triton": triton.__version__}
    if "releases" in budgets:
        content["releases"] = budgets["releases"]
    for measure in _MEASURES:
        old = budgets.get(measure, {})
        taken = {row.key: getattr(row, measure) for row in rows if getattr(row, measure)}
        new = {key: min(figure, old.get(key, figure)) for key, figure in taken.items()}
        content[measure] = dict(sorted((old | new).items()))
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _print_table(rows: list[Row]) -> None:
    header = ("arch", "op", "shape", "variant", "MxN", "w", "st", "split", "regs", "spill", "shared", "programs",
              "matrix", "W from", "waits", "instr", "/16B", "in flight", "/element")  # fmt: skip
    table = [header]
    for r in rows:
        c = r.choice
        tile = (c.variant, f"{c.block_m}x{c.row_blocks * 16}", str(c.num_warps), str(c.num_stages), str(c.split))
        figures = (str(r.registers), str(r.spills), str(r.shared), str(r.programs), r.matrix_instruction,
                   r.weights_from, r.waits, str(r.instructions), str(r.per_16_bytes), str(r.in_flight),
                   str(r.per_element))  # fmt: skip
        table.append((r.arch, r.op, r.shape, *tile, *((("error", r.error) + ("",) * 9) if r.error else figures)))
    widths = [max(len(line[i]) for line in table if len(line[i]) < 60) for i in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all of them")
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable; default: all of them")
    parser.add_argument("--match", type=_expression, help="only cases whose shape this regular expression finds")
    grids = parser.add_mutually_exclusive_group()
    grids.add_argument("--full", action="store_true", help="every combination instead of a quick selection")
    grids.add_argument("--models", nargs="*", choices=MODELS, metavar="MODEL",
                       help=f"what the layers of known models launch, of all or some: {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FILE", help="rows to take, and to add to, instead of compiling")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.add_argument("--write-budgets", action="store_true", help="lower budgets.json to what was found")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    ops = tuple(options.op or OPS)
    found = cases(ops, options.full) if options.models is None else model_cases(tuple(options.models or MODELS), ops)
    chosen = [case for case in found if options.match is None or options.match.search(case.describe())]
    if not chosen:
        parser.error("nothing fits --op and --match; leave --match out to see the shapes")
    try:
        rows = inspect_grid([(case, arch) for arch in options.arch or ARCHITECTURES for case in chosen], options.keep)
    except OSError as error:
        parser.error(f"--keep {options.keep}: {error.strerror}; name a file that can be written")
    except ValueError as error:
        parser.error(str(error))
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
