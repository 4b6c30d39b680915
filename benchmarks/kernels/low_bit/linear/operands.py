"""Random quantized weights and inputs, and what the low-bit linear must return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sliderquant_kernels import reference

from ... import weight_only
from ...case import Arithmetic, Case, Prepared
from ...checking import UNIT_ROUNDOFF, Expected, accumulation, sample_rows
from ...weight_only.operands import Operands, generator
from .. import inputs
from ..schemes import ActivationScheme, LowBitScheme

__all__ = ["LowBitArithmetic", "LowBitOperands", "activations", "expected", "operands"]

# Of the result by its scales and its conversion from int32, all in fp32.
EPILOGUE = 2.0**-21


@dataclass(frozen=True)
class LowBitArithmetic(Arithmetic):
    """quantizes: whether the activations are rounded to the scheme's grid, or multiplied in 16 bits.

    rounded_once: whether a norm before it is rounded after its weight only; None: that, or before it too.
    grid: how a provider quantizes activations that does it in a way of its own.
    """

    quantizes: bool = True
    rounded_once: bool | None = False
    grid: ActivationScheme | None = None


@dataclass(frozen=True, eq=False)
class LowBitOperands:
    """A quantized weight, the weight `[K]` of a norm before it, and how activations are quantized."""

    scheme: LowBitScheme
    weight: Operands
    norm_weight: Tensor


def operands(case: Case, device: torch.device) -> LowBitOperands:
    """Weights as those of the weight-only linear."""
    scheme = LowBitScheme.parse(case.scheme)
    weight = weight_only.operands(replace(case, scheme=str(scheme.weight)), device)
    return LowBitOperands(scheme, weight, inputs.random_norm_weight(weight.k, weight.dtype, generator(case, device)))


def activations(case: Case, given: LowBitOperands) -> Tensor:
    """x `[M, K]`, or `[2, M, K]` before SiLU-mul."""
    random = generator(case, given.norm_weight.device)
    return inputs.random_inputs(case.m, given.weight.k, given.scheme.activations, given.weight.dtype, random)


def expected(given: LowBitOperands, x: Tensor, prepared: Prepared) -> Expected:
    """The product in fp64, with the errors that the provider's roundings can make.

    Of quantized activations, those whose code is certain add none: sums in int32 are exact.
    """
    m, weight, scheme = x.shape[-2], given.weight, given.scheme.activations
    arithmetic = prepared.arithmetic(m)
    assert isinstance(arithmetic, LowBitArithmetic)
    rows = sample_rows(m, torch.Generator(x.device).manual_seed(m))
    u, rounding = UNIT_ROUNDOFF[weight.dtype], arithmetic.output_roundings
    if arithmetic.quantizes:
        found = inputs.codes(x, given.norm_weight, arithmetic.grid or scheme, rows, arithmetic.rounded_once)
        values, off = found.values, found.values_off.square()
    else:
        values = inputs.prepared_fp64(x, given.norm_weight, scheme, rows)
        off = (values * (2 * u if scheme.fused else 0)).square()
    per_product = accumulation(weight.k) ** 2 + (arithmetic.weight_roundings * u) ** 2
    variance = (off + values.square() * per_product).float()
    want, deviation = [], []
    for part in weight.parts():
        if prepared.weight is None:
            w = reference.dequantize(*weight.part(part), weight.scheme.bits)
        else:
            w = prepared.weight[part].double()
        want.append(values @ w.t())
        deviation.append((variance @ w.square().float().t()).sqrt_())
    return Expected(rows, torch.cat(want, 1), torch.cat(deviation, 1), u * rounding + EPILOGUE)
