"""Random activations, and what quantizing them must return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...harness.case import DTYPES, Case, Prepared, generator
from ...harness.checking import Expected, sample_rows
from ...shared import inputs
from ...shared.rows import expected_codes, expected_copy
from ...shared.schemes import ActivationScheme
from ..linear.operands import LowBitArithmetic

__all__ = ["Activations", "expected", "operands"]


@dataclass(frozen=True, eq=False)
class Activations:
    """x `[M, K]`, or `[2, M, K]` before SiLU-mul, and the weight `[K]` of a norm."""

    scheme: ActivationScheme
    x: Tensor
    norm_weight: Tensor


def operands(case: Case, device: torch.device) -> Activations:
    """Standard normal values."""
    scheme, dtype, (k,) = ActivationScheme.parse(case.scheme), DTYPES[case.dtype], case.shape
    random = generator(case, device)
    x = inputs.random_inputs(case.m, k, scheme, dtype, random)
    return Activations(scheme, x, inputs.random_norm_weight(k, dtype, random))


def expected(given: Activations, x: Tensor, prepared: Prepared) -> Expected:
    """The codes, see `expected_codes`. Of a copy, what was copied."""
    m, arithmetic = x.shape[-2], prepared.arithmetic(x.shape[-2])
    rows = sample_rows(m, torch.Generator(x.device).manual_seed(m))
    if not isinstance(arithmetic, LowBitArithmetic):
        return expected_copy(x, rows)
    found = inputs.codes(x, given.norm_weight, given.scheme, rows, arithmetic.rounded_once)
    return expected_codes(found, rows, given.scheme.symmetric)
