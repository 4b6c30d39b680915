"""Ways to multiply 4-bit codes on sm_90, by what the compiler makes of their loops; no GPU is needed.

    python -m benchmarks.kernels.low_bit.matrix_unit

The kernels are bare loops: both operands through shared memory, sums stored as they are. int8 sums exactly. e4m3 holds
the integers up to 16, but its sums have 14 bits; a loop that moves them to fp32 every 128 products is exact too.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sliderquant_kernels.tools.sass import disassemble

__all__ = ["WAYS", "Figures", "Way", "compile_way"]

ARCH = 90


class Way(NamedTuple):
    """dtype of the operands, tokens x outputs x inputs of a tile, warps, and after how many products sums go to fp32
    (0: never)."""

    dtype: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    promoted: int = 0


WAYS = [
    *(Way("i8", *tile) for tile in ((128, 128, 128, 8), (128, 128, 128, 4), (256, 128, 128, 8))),
    *(Way("fp8e4nv", *tile) for tile in ((128, 128, 128, 8), (256, 128, 128, 8))),
    *(Way("fp8e4nv", *tile, 128) for tile in ((128, 128, 128, 8), (256, 128, 128, 8))),
    *(Way("bf16", *tile) for tile in ((128, 128, 64, 8), (256, 128, 64, 8))),
]


@dataclass(frozen=True)
class Figures:
    """programs: on a multiprocessor at a time; n: columns of the instruction; waits: see `sass.MachineCode.waits`;
    per_1000_products: thread instructions of the main loop."""

    registers: int
    spills: int
    shared: int
    programs: int
    instruction: str
    n: int
    waits: str
    per_1000_products: float


@triton.jit
def _product(x_ptr, w_ptr, y_ptr, M, N, K, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, PROMOTED: tl.constexpr):  # fmt: skip
    """y `[M, N]` = x `[M, K]` times the transpose of w `[N, K]`."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + tl.minimum(offs_n, N - 1)[:, None].to(tl.int64) * K + offs_k[None, :]
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1)[None, :].to(tl.int64) * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for k in tl.range(0, K, BLOCK_K, num_stages=3):
        if PROMOTED:
            acc = tl.dot(tl.load(w_ptrs + k), tl.load(x_ptrs + k), acc, max_num_imprecise_acc=PROMOTED)
        else:
            acc = tl.dot(tl.load(w_ptrs + k), tl.load(x_ptrs + k), acc, out_dtype=ACC)
    tl.store(y_ptr + offs_m[None, :].to(tl.int64) * N + offs_n[:, None], acc)


def compile_way(way: Way) -> Figures:
    """Compile one for sm_90. Raises RuntimeError under Triton's interpreter."""
    if not isinstance(_product, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    sums = tl.int32 if way.dtype == "i8" else tl.float32
    constants = {
        "ACC": sums,
        "BLOCK_M": way.block_m,
        "BLOCK_N": way.block_n,
        "BLOCK_K": way.block_k,
        "PROMOTED": way.promoted,
    }
    signature = dict.fromkeys(("x_ptr", "w_ptr"), f"*{way.dtype}") | {"y_ptr": "*i32" if way.dtype == "i8" else "*fp32"}
    signature |= dict.fromkeys(("M", "N", "K"), "i32")
    aligned = {(position,): [["tt.divisibility", 16]] for position in range(len(signature))}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=_product, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": way.num_warps, "num_stages": 3, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    code = disassemble(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    columns = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k", compiled.asm["ptx"])
    products = way.block_m * way.block_n * way.block_k
    return Figures(
        code.registers,
        code.spilled(),
        shared,
        code.programs_per_sm(ARCH, way.num_warps, shared),
        code.matrix_instruction(),
        int(columns[0]),
        code.waits(),
        round(1000 * code.loop_count() * way.num_warps * 32 / products, 2),
    )


def main() -> int:
    """One JSON object a line."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it", file=sys.stderr)
        return 2
    for way in WAYS:
        print(json.dumps(way._asdict() | asdict(compile_way(way))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
