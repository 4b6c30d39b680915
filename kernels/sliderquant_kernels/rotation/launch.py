"""Launching rotations on CUDA: constants, operands, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations.kernels import quantize_activations, token_values
from ..activations.op import prepared
from ..common.launch_plan import Dtypes, Grid, Launcher, PlanCache, dtype_of, launcher_for
from ..common.launching import INTERPRETED, device_at, device_of, launch_options, operand_dtype
from ..common.workspace import outside_pools
from . import axis_kernels as hadamard_axis_triton
from . import cpu as hadamard_cpu
from .kernels import row_kernel
from .matrix import HadamardTransform, kronecker
from .tiles import HadamardChoice, choose_hadamard, padded

ROWS = 64
COLUMNS = 64
ROWS_OPTIONS = launch_options(num_warps=4, num_stages=1)
_LEADING_STAGES = 2
# The interpreter, which has nothing to pin, would do it element by element.
_PIN = not INTERPRETED

_NO_LIMITS = (None, None)

Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


class _Step(NamedTuple):
    """One launch: its launcher, grid and operands, x's matrices."""

    launcher: Launcher
    grid: Grid
    matrices: tuple[Tensor, ...]
    numbers: tuple[Any, ...]


class RotationPlan(NamedTuple):
    """The launches that rotate some rows; none: torch's matrix products do."""

    first: _Step | None = None
    second: _Step | None = None


_plans = PlanCache()


def hadamard(x: Tensor, signs: Tensor | None, transform: HadamardTransform, inverse: bool) -> Tensor:
    """x `[..., n]` -> the same of the same dtype, contiguous. Arguments have been validated.

    Allocates y, x if it is strided, and between two launches another tensor like x.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        plan = _plan_for(x, None, signs, transform, inverse, 0, True, None)
        if plan.first is None:
            rows = x.reshape(-1, transform.block).contiguous()
            signs = None if signs is None else signs.contiguous()
            y.copy_(hadamard_cpu.rotate(rows, signs, transform, inverse).view(y.shape))
        else:
            _launch(plan, x, None, signs, inverse, (y, None, None, None), None)
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
    """Codes int8 `[..., n]`, scale fp32, zero (None when symmetric) and token sum int32 `[...]`."""
    plan = RotationPlan()
    # The scale of a token takes all of its blocks.
    if transform.blocks == 1 and x.numel():
        plan = _plan_for(x, gate, signs, transform, False, bits, symmetric, clip)
    if plan.first is None:
        rotated = hadamard(prepared(x, None, 0.0, gate), signs, transform, False)
        return quantize_activations(rotated, bits, symmetric, None, 0.0, None, False, clip)
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale, zero, total = token_values(x, symmetric)
    _launch(plan, x, gate, signs, False, (codes, scale, zero, total), clip)
    return codes, scale, zero, total


def prepare(transform: HadamardTransform, device: torch.device, dtype: torch.dtype) -> None:
    """Make the matrices that rotating rows of `dtype` on a device takes, in either direction."""
    found = device_at(device.index if device.type == "cuda" else -1)
    for inverse in (False, True):
        for plain in (False, True):
            choice = choose_hadamard(transform.orders, found, dtype, plain)
            if choice.variant == "matmul":
                hadamard_cpu.factors(transform, inverse, device)
                continue
            _matrices(choice, inverse, dtype, device)
            if choice.leading > 1:
                _leading_matrix(choice, inverse, dtype, device)


def _launch(
    plan: RotationPlan,
    x: Tensor,
    gate: Tensor | None,
    signs: Tensor | None,
    inverse: bool,
    outputs: tuple[Tensor | None, ...],
    clip: Sequence[float] | None,
) -> None:
    """x `[..., n]`, not empty, into the outputs: y, or codes, scale, zero and sum."""
    first, second = plan
    assert first is not None
    if not x.is_contiguous():
        x = x.contiguous()
    if gate is not None and not gate.is_contiguous():
        gate = gate.contiguous()
    if signs is not None and not signs.is_contiguous():
        signs = signs.contiguous()
    before, after = (None, signs) if inverse else (signs, None)
    limits = _NO_LIMITS if clip is None else (clip[0], clip[1])
    if second is None:
        first.launcher(first.grid, (x, gate, before, after, *first.matrices, *outputs), (*first.numbers, *limits))
        return
    between = torch.empty_like(x)
    first.launcher(first.grid, (x, gate, before, None, *first.matrices, between, None, None, None),
                   (*first.numbers, *_NO_LIMITS))  # fmt: skip
    second.launcher(second.grid, (between, after, *second.matrices, *outputs), limits)


def _plan_for(
    x: Tensor,
    gate: Tensor | None,
    signs: Tensor | None,
    transform: HadamardTransform,
    inverse: bool,
    bits: int,
    symmetric: bool,
    clip: Sequence[float] | None,
) -> RotationPlan:
    """The plan for x `[..., n]`, not empty; with bits 0 the result is not rounded."""
    # Other functions in the places of the last two get plans of their own.
    key = (transform, x.numel(), x.dtype, x.get_device(), inverse, gate is None, signs is None, bits, symmetric,
           clip is None, choose_hadamard, device_of)  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        choice = choose_hadamard(transform.orders, device_of(x), x.dtype, gate is None and signs is None)
        plan = _plans.keep(key, _plan(choice, x, gate, signs, transform, inverse, bits, symmetric, clip))
    return plan


def _plan(
    choice: HadamardChoice,
    x: Tensor,
    gate: Tensor | None,
    signs: Tensor | None,
    transform: HadamardTransform,
    inverse: bool,
    bits: int,
    symmetric: bool,
    clip: Sequence[float] | None,
) -> RotationPlan:
    if choice.variant == "matmul":
        return RotationPlan()
    m, dtype, index = x.numel() // transform.block, x.dtype, x.get_device()
    before, after = (None, dtype_of(signs)) if inverse else (dtype_of(signs), None)
    limits = _NO_LIMITS if clip is None else (clip[0], clip[1])
    scheme = {"BITS": bits, "SYMMETRIC": symmetric, "IEEE": INTERPRETED}
    outputs: Dtypes = (dtype, None, None, None)
    if bits:
        outputs = (torch.int8, torch.float32, None if symmetric else torch.int32, torch.int32)
    if choice.leading == 1:
        tensors = (dtype, dtype_of(gate), before, after)
        return RotationPlan(_first(choice, x, tensors, outputs, inverse, m, transform.blocks, scheme, limits))
    rest, period = transform.block // choice.leading, transform.blocks * choice.leading
    first = _first(choice, x, (dtype, dtype_of(gate), before, None), (dtype, None, None, None), inverse,
                   m * choice.leading, period, {**scheme, "BITS": 0}, _NO_LIMITS)  # fmt: skip
    left = _leading_matrix(choice, inverse, dtype, x.device)
    constants = {**leading_constants(choice.leading, rest, dtype), "PERIOD": transform.blocks, **scheme}
    launcher = launcher_for(hadamard_axis_triton.leading_kernel, constants, leading_options(choice.leading), index,
                            (dtype, after, left.dtype, *outputs), limits)  # fmt: skip
    grid = (m, 1 if bits else triton.cdiv(rest, COLUMNS), 1)
    return RotationPlan(first, _Step(launcher, grid, (left,), ()))


def _first(
    choice: HadamardChoice,
    x: Tensor,
    tensors: Dtypes,
    outputs: Dtypes,
    inverse: bool,
    m: int,
    period: int,
    scheme: dict[str, Any],
    limits: tuple[float | None, float | None],
) -> _Step:
    """The launch over m rows of `[M, A Q B]`. tensors: the dtypes of x, gate, signs before and signs after."""
    matrices = _matrices(choice, inverse, x.dtype, x.device)
    if choice.variant == "rows":
        kernel, programs, options = hadamard_axis_triton.rows_kernel, triton.cdiv(m, ROWS), ROWS_OPTIONS
        constants = rows_constants(choice, x.dtype)
    else:
        kernel, options = row_kernel, row_options(choice)
        programs = min(m, choice.programs * device_of(x).sm_count) if choice.num_stages else m
        constants = row_constants(choice, x.dtype)
    dtypes = (*tensors, *(matrix.dtype for matrix in matrices), *outputs)
    constants = {**constants, "PERIOD": period, **scheme}
    launcher = launcher_for(kernel, constants, options, x.get_device(), dtypes, (m, *limits))
    return _Step(launcher, (programs, 1, 1), matrices, (m,))


def _matrices(choice: HadamardChoice, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The operands of the first launch: right, or left and right."""
    if choice.variant == "rows":
        return (operand(choice.right, (choice.padded_b,), not inverse, x_operand(dtype), device),)
    left = operand(choice.left, choice.sizes, inverse, x_operand(dtype), device)
    return left, operand(choice.right, (choice.padded_b,), not inverse, part_operand(), device)


def _leading_matrix(choice: HadamardChoice, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The operand of the second launch."""
    return operand((choice.leading,), (padded(choice.leading),), inverse, x_operand(dtype), device)


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


# Without a limit: graphs and plans keep the addresses of what is in it.
@cache
def operand(
    orders: tuple[int, ...], sizes: tuple[int, ...], transposed: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The Kronecker product of the matrices of `orders`, or its transpose, with zeros up to sum(sizes), on a device."""
    hadamard_cpu.refuse_capture(device)

    def make() -> Tensor:
        matrix = kronecker(orders)
        matrix = matrix.t() if transposed else matrix
        size = sum(sizes)
        out = torch.zeros(size, size, dtype=dtype)
        out[: math.prod(orders), : math.prod(orders)] = matrix
        return out.to(device)

    return outside_pools(make, device)
