"""Random activations, and what quantizing them must return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...case import DTYPES, Case, Prepared
from ...checking import Expected, sample_rows
from ...weight_only.operands import generator
from .. import inputs
from ..linear.operands import LowBitArithmetic
from ..schemes import ActivationScheme

__all__ = ["Activations", "activations", "expected", "operands"]


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


def activations(case: Case, given: Activations) -> Tensor:
    """What a call reads; its tensors are copies of it."""
    return given.x


def expected(given: Activations, x: Tensor, prepared: Prepared) -> Expected:
    """Of a token, side by side: codes less the zero-point; by what the sum of the codes is off; the scale; unless
    symmetric, the zero-point. Of a copy, what was copied."""
    m, arithmetic = x.shape[-2], prepared.arithmetic(x.shape[-2])
    rows = sample_rows(m, torch.Generator(x.device).manual_seed(m))
    if not isinstance(arithmetic, LowBitArithmetic):
        copied = x.flatten(0, -2)[rows].double()
        return Expected(rows, copied, torch.zeros_like(copied), 0.0)
    found = inputs.codes(x, given.norm_weight, given.scheme, rows, arithmetic.rounded_once)
    want = [found.steps, torch.zeros_like(found.scale), found.scale]
    off = [found.steps_off, torch.zeros_like(found.scale), found.scale_off]
    if not given.scheme.symmetric:
        want.append(found.zero)
        off.append(found.zero_off)
    return Expected(rows, torch.cat(want, -1), torch.cat(off, -1), 0.0)
