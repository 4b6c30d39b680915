"""Launching the kernels of `hadamard_triton` and `hadamard_axis_triton`: constants, operands, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hadamard_axis_triton, hadamard_cpu
from .activations import prepared
from .activations_triton import quantize_activations
from .hadamard_matrix import HadamardTransform, kronecker
from .hadamard_tiles import HadamardChoice, choose_hadamard, padded
from .hadamard_triton import row_kernel
from .weight_only_triton import INTERPRETED, device_of, launch_options, operand_dtype

ROWS = 64
COLUMNS = 64
ROWS_OPTIONS = launch_options(num_warps=4, num_stages=1)
_LEADING_STAGES = 2
# The interpreter, which has nothing to pin, would do it element by element.
_PIN = not INTERPRETED

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def hadamard(x: Tensor, signs: Tensor | None, transform: HadamardTransform, inverse: bool) -> Tensor:
    """x `[..., n]` -> the same of the same dtype, contiguous. Arguments have been validated.

    Allocates y, x if it is strided, and between two launches another tensor like x.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        x = x.reshape(-1, transform.block).contiguous()
        _rotate(x, None, signs, transform, inverse, (y, None, None, None), 0, True)
    return y


def hadamard_quantize(
    x: Tensor,
    signs: Tensor | None,
    gate: Tensor | None,
    transform: HadamardTransform,
    bits: int,
    symmetric: bool,
    clip: Sequence[float] | None = None,
) -> Outputs:
    """Codes int8 `[..., n]`, scale fp32, zero (unset when symmetric) and token sum int32 `[...]`."""
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    zero, total = x.new_empty(scale.shape, dtype=torch.int32), x.new_empty(scale.shape, dtype=torch.int32)
    if not x.numel():
        return codes, scale, zero, total
    fused = transform.blocks == 1 and _choice(x, gate, signs, transform).variant != "matmul"
    if not fused:
        # The scale of a token takes all of its blocks.
        rotated = hadamard(prepared(x, None, 0.0, gate), signs, transform, False)
        return quantize_activations(rotated, bits, symmetric, None, 0.0, None, False, clip)
    x = x.reshape(-1, transform.n).contiguous()
    gate = None if gate is None else gate.reshape(-1, transform.n).contiguous()
    outputs = (codes, scale, None if symmetric else zero, total)
    _rotate(x, gate, signs, transform, False, outputs, bits, symmetric, clip)
    return codes, scale, zero, total


def _choice(x: Tensor, gate: Tensor | None, signs: Tensor | None, transform: HadamardTransform) -> HadamardChoice:
    return choose_hadamard(transform.orders, device_of(x), x.dtype, gate is None and signs is None)


def _rotate(
    x: Tensor,
    gate: Tensor | None,
    signs: Tensor | None,
    transform: HadamardTransform,
    inverse: bool,
    outputs: tuple[Tensor | None, ...],
    bits: int,
    symmetric: bool,
    clip: Sequence[float] | None = None,
) -> None:
    """x `[M, block]`, contiguous, into the outputs: y, or codes, scale, zero and sum."""
    choice = _choice(x, gate, signs, transform)
    signs = None if signs is None else signs.contiguous()
    before, after = (None, signs) if inverse else (signs, None)
    if choice.variant == "matmul":
        y = outputs[0]
        assert y is not None
        y.copy_(hadamard_cpu.rotate(x, signs, transform, inverse).view(y.shape))
        return
    clip_low, clip_high = (None, None) if clip is None else clip
    scheme = {"BITS": bits, "SYMMETRIC": symmetric, "IEEE": INTERPRETED, "clip_low": clip_low, "clip_high": clip_high}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if choice.leading == 1:
            _first(x, gate, before, after, outputs, choice, inverse, transform.blocks, scheme)
            return
        between = torch.empty_like(x)
        first = {**scheme, "BITS": 0, "clip_low": None, "clip_high": None}
        rows = x.view(-1, transform.block // choice.leading)
        period = transform.blocks * choice.leading
        _first(rows, gate, before, None, (between, None, None, None), choice, inverse, period, first)
        rest = transform.block // choice.leading
        left = operand((choice.leading,), (padded(choice.leading),), inverse, x_operand(x.dtype), x.device)
        grid = (x.shape[0], 1 if bits else triton.cdiv(rest, COLUMNS))
        hadamard_axis_triton.leading_kernel[grid](
            between, after, left, *outputs, **leading_constants(choice.leading, rest, x.dtype),
            PERIOD=transform.blocks, **scheme, **leading_options(choice.leading),
        )  # fmt: skip


def _first(
    x: Tensor,
    gate: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    choice: HadamardChoice,
    inverse: bool,
    period: int,
    scheme: dict[str, Any],
) -> None:
    """The launch over rows of x `[M, A Q B]`."""
    m = x.shape[0]
    if choice.variant == "rows":
        right = operand(choice.right, (choice.padded_b,), not inverse, x_operand(x.dtype), x.device)
        hadamard_axis_triton.rows_kernel[(triton.cdiv(m, ROWS),)](
            x, gate, before, after, right, *outputs, m, **rows_constants(choice, x.dtype), PERIOD=period, **scheme,
            **ROWS_OPTIONS,
        )  # fmt: skip
        return
    left = operand(choice.left, choice.sizes, inverse, x_operand(x.dtype), x.device)
    right = operand(choice.right, (choice.padded_b,), not inverse, part_operand(), x.device)
    programs = min(m, choice.programs * device_of(x).sm_count) if choice.num_stages else m
    row_kernel[(programs,)](
        x, gate, before, after, left, right, *outputs, m, **row_constants(choice, x.dtype), PERIOD=period, **scheme,
        **row_options(choice),
    )  # fmt: skip


def row_constants(choice: HadamardChoice, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `row_kernel` that a choice decides; shared by the launch and by `inspect`."""
    return {
        "FACTOR": (choice.a * choice.q * choice.b) ** -0.5,
        "A": choice.a,
        "STARTS": choice.starts,
        "SIZES": choice.sizes,
        "Q": choice.q,
        "B": choice.b,
        "PADDED_B": choice.padded_b,
        "X_PARTS": _x_parts(dtype),
        "PARTS": 3 if dtype == torch.float32 else 2,
        "VALUES": operand_dtype(dtype),
        "X_OPERAND": _TRITON[x_operand(dtype)],
        "OPERAND": _TRITON[part_operand()],
        "PINNED": choice.pinned and _PIN,
        "AGAIN": choice.again,
        "STAGES": choice.num_stages,
    }


def row_options(choice: HadamardChoice) -> dict[str, Any]:
    """Triton's options of `row_kernel`."""
    return launch_options(choice.num_warps, max(choice.num_stages, 1))


def rows_constants(choice: HadamardChoice, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `rows_kernel`."""
    return {
        "FACTOR": choice.b**-0.5,
        "N": choice.b,
        "PADDED_N": choice.padded_b,
        "ROWS": ROWS,
        "X_PARTS": _x_parts(dtype),
        "VALUES": operand_dtype(dtype),
        "X_OPERAND": _TRITON[x_operand(dtype)],
    }


def leading_constants(leading: int, rest: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `leading_kernel`."""
    return {
        "FACTOR": leading**-0.5,
        "L": leading,
        "PADDED_L": padded(leading),
        "R": rest,
        "COLUMNS": COLUMNS,
        "PINNED": dtype == torch.float32 and _PIN,
        "X_PARTS": _x_parts(dtype),
        "X_OPERAND": _TRITON[x_operand(dtype)],
    }


def leading_options(leading: int) -> dict[str, Any]:
    """Triton's options of `leading_kernel`."""
    return launch_options(num_warps=max(padded(leading) // 16, 1), num_stages=_LEADING_STAGES)


def x_operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype`, and what multiplies them, go to the matrix unit."""
    return torch.float16 if dtype == torch.float16 else part_operand()


def part_operand() -> torch.dtype:
    """That of the parts into which fp32 values are split: bf16, which the interpreter cannot multiply."""
    return torch.float32 if INTERPRETED else torch.bfloat16


def _x_parts(dtype: torch.dtype) -> int:
    return 3 if dtype == torch.float32 else 1


_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@lru_cache(maxsize=256)
def operand(
    orders: tuple[int, ...], sizes: tuple[int, ...], transposed: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The Kronecker product of the matrices of `orders`, or its transpose, with zeros up to sum(sizes), on a device."""
    hadamard_cpu.refuse_capture(device)
    matrix = kronecker(orders)
    matrix = matrix.t() if transposed else matrix
    size = sum(sizes)
    out = torch.zeros(size, size, dtype=dtype)
    out[: math.prod(orders), : math.prod(orders)] = matrix
    return out.to(device)
