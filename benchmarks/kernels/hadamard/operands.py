"""Random activations, and what rotating and quantizing them must return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sliderquant_kernels import HadamardTransform, factor_hadamard

from ..harness.case import DTYPES, Arithmetic, Case, Prepared, generator
from ..harness.checking import UNIT_ROUNDOFF, Expected, sample_rows
from ..shared import inputs
from ..shared.rotations import rotated_codes, rotated_rows
from ..shared.rows import expected_codes, expected_copy
from ..shared.schemes import ActivationScheme

__all__ = ["ROTATE", "HadamardArithmetic", "Rows", "expected", "operands", "scheme_of"]

# The scheme of rotating alone; others are those of quantizing, `A4`, `A8-sym`, `A4+silu_mul`, ...
ROTATE = "rotate"


@dataclass(frozen=True)
class HadamardArithmetic(Arithmetic):
    """between: how often all values are rounded to 16 bits on the way; the result apart."""

    between: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """x `[M, n]`, or `[2, M, n]` before SiLU-mul."""

    scheme: ActivationScheme | None
    transform: HadamardTransform
    x: Tensor


def scheme_of(name: str) -> ActivationScheme | None:
    """None for `ROTATE`. Raises ValueError for what is no scheme of this op."""
    if name == ROTATE:
        return None
    scheme = ActivationScheme.parse(name)
    if scheme.packed or scheme.fused == "rms_norm":
        raise ValueError(f"scheme: expected {ROTATE} or A{{4,8}}[-sym][+silu_mul], got {name!r}")
    return scheme


def operands(case: Case, device: torch.device) -> Rows:
    """Standard normal values."""
    scheme, (n,) = scheme_of(case.scheme), case.shape
    plain = scheme or ActivationScheme(8)
    x = inputs.random_inputs(case.m, n, plain, DTYPES[case.dtype], generator(case, device))
    return Rows(scheme, factor_hadamard(n), x)


def expected(given: Rows, x: Tensor, prepared: Prepared) -> Expected:
    """The rotated rows; quantized, their codes, see `expected_codes`. Of a copy, what was copied."""
    m, arithmetic = x.shape[-2], prepared.arithmetic(x.shape[-2])
    rows = sample_rows(m, torch.Generator(x.device).manual_seed(m))
    if not isinstance(arithmetic, HadamardArithmetic):
        return expected_copy(x, rows)
    if given.scheme is None:
        want, deviation = rotated_rows(x, ActivationScheme(8), given.transform, rows, arithmetic.between)
        return Expected(rows, want, deviation.expand_as(want), UNIT_ROUNDOFF[x.dtype])
    found = rotated_codes(x, given.scheme, given.transform, rows, arithmetic.between)
    return expected_codes(found, rows, given.scheme.symmetric)
