"""Launching the kernels of `hadamard_triton` and `hadamard_axis_triton`: constants, operands, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import devices, hadamard_axis_triton, hadamard_cpu
from .activations import prepared
from .activations_triton import quantize_activations
from .hadamard_matrix import HadamardTransform, kronecker
from .hadamard_tiles import HadamardChoice, choose_hadamard, padded
from .hadamard_triton import row_kernel
from .launch_plan import Grid, Launcher, PlanCache, launcher_for
from .weight_only_triton import INTERPRETED, device_at, device_of, launch_options, operand_dtype
from .workspace import outside_pools

ROWS = 64
COLUMNS = 64
ROWS_OPTIONS = launch_options(num_warps=4, num_stages=1)
_LEADING_STAGES = 2
# The interpreter, which has nothing to pin, would do it element by element.
_PIN = not INTERPRETED

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


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
    y = x.new_empty(x.shape)
    if x.numel():
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
    fused = transform.blocks == 1 and _choice(x, gate, signs, transform).variant != "matmul"
    if not fused and x.numel():
        # The scale of a token takes all of its blocks.
        rotated = hadamard(prepared(x, None, 0.0, gate), signs, transform, False)
        return quantize_activations(rotated, bits, symmetric, None, 0.0, None, False, clip)
    tokens = x.shape[:-1]
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32)
    zero, total = x.new_empty(tokens, dtype=torch.int32), x.new_empty(tokens, dtype=torch.int32)
    if x.numel():
        outputs = (codes, scale, None if symmetric else zero, total)
        _rotate(x, gate, signs, transform, False, outputs, bits, symmetric, clip)
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
    """x `[..., n]`, not empty, into the outputs: y, or codes, scale, zero and sum."""
    if not x.is_contiguous():
        x = x.contiguous()
    if gate is not None and not gate.is_contiguous():
        gate = gate.contiguous()
    if signs is not None and not signs.is_contiguous():
        signs = signs.contiguous()
    before, after = (None, signs) if inverse else (signs, None)
    m, index = x.numel() // transform.block, x.get_device()
    limits = (None, None) if clip is None else (clip[0], clip[1])
    with devices.on_device(index):
        # Tests put other functions in the places of these two, which have to get plans of their own.
        key = (transform, m, x.dtype, index, inverse, gate is None, signs is None, bits, symmetric, clip is None,
               choose_hadamard, device_of)  # fmt: skip
        plan = _plans.get(key)
        if plan is None:
            plan = _plan(x, gate, before, after, outputs, transform, m, inverse, bits, symmetric, limits)
            _plans[key] = plan
        first, second = plan
        if first is None:
            y = outputs[0]
            assert y is not None
            y.copy_(hadamard_cpu.rotate(x.view(m, -1), signs, transform, inverse).view(y.shape))
            return
        if second is None:
            first.launcher(first.grid, (x, gate, before, after, *first.matrices, *outputs), (*first.numbers, *limits))
            return
        between = x.new_empty(x.shape)
        first.launcher(first.grid, (x, gate, before, None, *first.matrices, between, None, None, None),
                       (*first.numbers, None, None))  # fmt: skip
        second.launcher(second.grid, (between, after, *second.matrices, *outputs), limits)


def _plan(
    x: Tensor,
    gate: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    transform: HadamardTransform,
    m: int,
    inverse: bool,
    bits: int,
    symmetric: bool,
    limits: tuple[float | None, float | None],
) -> RotationPlan:
    """The plan for m rows of a block; of the tensors only their dtypes, device and absence count."""
    choice = _choice(x, gate, before if after is None else after, transform)
    if choice.variant == "matmul":
        return RotationPlan()
    scheme = {"BITS": bits, "SYMMETRIC": symmetric, "IEEE": INTERPRETED}
    if choice.leading == 1:
        tensors = (x, gate, before, after)
        return RotationPlan(_first(tensors, outputs, choice, inverse, m, transform.blocks, scheme, limits))
    between, rest = x.new_empty(0), transform.block // choice.leading
    period = transform.blocks * choice.leading
    first = _first((x, gate, before, None), (between, None, None, None), choice, inverse, m * choice.leading, period,
                   {**scheme, "BITS": 0}, (None, None))  # fmt: skip
    left = _leading_matrix(choice, inverse, x.dtype, x.device)
    constants = {**leading_constants(choice.leading, rest, x.dtype), "PERIOD": transform.blocks, **scheme}
    launcher = launcher_for(hadamard_axis_triton.leading_kernel, constants, leading_options(choice.leading),
                            x.get_device(), (between, after, left, *outputs), limits)  # fmt: skip
    grid = (m, 1 if bits else triton.cdiv(rest, COLUMNS), 1)
    return RotationPlan(first, _Step(launcher, grid, (left,), ()))


def _first(
    tensors: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    choice: HadamardChoice,
    inverse: bool,
    m: int,
    period: int,
    scheme: dict[str, Any],
    limits: tuple[float | None, float | None],
) -> _Step:
    """The launch over m rows of x `[M, A Q B]`. tensors: x, gate, signs before, signs after."""
    x = tensors[0]
    assert x is not None
    matrices = _matrices(choice, inverse, x.dtype, x.device)
    if choice.variant == "rows":
        kernel, programs, options = hadamard_axis_triton.rows_kernel, triton.cdiv(m, ROWS), ROWS_OPTIONS
        constants = rows_constants(choice, x.dtype)
    else:
        kernel, options = row_kernel, row_options(choice)
        programs = min(m, choice.programs * device_of(x).sm_count) if choice.num_stages else m
        constants = row_constants(choice, x.dtype)
    launcher = launcher_for(kernel, {**constants, "PERIOD": period, **scheme}, options, x.get_device(),
                            (*tensors, *matrices, *outputs), (m, *limits))  # fmt: skip
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
