"""Random quantized weights and inputs, and what the low-bit linear must return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sliderquant_kernels import HadamardTransform, factor_hadamard, reference

from ... import weight_only
from ...harness.case import Arithmetic, Case, Prepared, generator
from ...harness.checking import SIGMAS, UNIT_ROUNDOFF, Expected, accumulation, sample_rows
from ...shared import inputs
from ...shared.rotations import rotated, rotated_codes
from ...shared.schemes import RMS_NORM, ActivationScheme, LowBitScheme
from ...weight_only.operands import Operands

__all__ = ["LowBitArithmetic", "LowBitOperands", "activations", "expected", "operands"]

# Of the result by its scales and its conversion from int32, all in fp32.
EPILOGUE = 2.0**-21
# What squared errors that all of a token's products share may exceed their mean by, for one token: 3 standard
# deviations of the error itself.
SHARED = 8.0


@dataclass(frozen=True)
class LowBitArithmetic(Arithmetic):
    """quantizes: whether the activations are rounded to the scheme's grid, or multiplied in 16 bits.

    rounded_once: whether a norm before it is rounded after its weight only; None: that, or before it too.
    between: how often rotated activations are rounded to 16 bits on their way to the codes.
    grid: how a provider quantizes activations that does it in a way of its own.
    """

    quantizes: bool = True
    rounded_once: bool | None = False
    between: int = 0
    grid: ActivationScheme | None = None


@dataclass(frozen=True, eq=False)
class LowBitOperands:
    """A quantized weight, the weight `[K]` of a norm before it, and how activations are quantized.

    transform: the rotation of the activations, by which the weight's inputs are rotated too; None without one.
    residual: `[M, N]`, added to the product; None without one.
    """

    scheme: LowBitScheme
    weight: Operands
    norm_weight: Tensor
    transform: HadamardTransform | None = None
    residual: Tensor | None = None

    def dense_weight(self) -> Tensor:
        """The dequantized weight `[N, K]` for activations that are not rotated, rounded once to 16 bits."""
        if self.transform is None:
            return self.weight.weight(self.weight.dtype)
        return torch.cat([self.plain_weight(part).to(self.weight.dtype) for part in self.weight.parts()])

    def plain_weight(self, part: slice) -> Tensor:
        """Some rows of the weight for activations that are not rotated, fp64."""
        weight = reference.dequantize(*self.weight.part(part), self.weight.scheme.bits)
        return weight if self.transform is None else rotated(weight, self.transform, inverse=True)


def operands(case: Case, device: torch.device) -> LowBitOperands:
    """Weights as those of the weight-only linear."""
    scheme = LowBitScheme.parse(case.scheme)
    weight = weight_only.operands(replace(case, scheme=str(scheme.weight)), device)
    norm_weight = inputs.random_norm_weight(weight.k, weight.dtype, generator(case, device))
    transform = factor_hadamard(weight.k) if scheme.activations.rotated else None
    residual = None
    if scheme.residual:
        random = generator(case, device).manual_seed(case.m)
        residual = torch.randn(case.m, weight.n, device=device, generator=random).to(weight.dtype)
    return LowBitOperands(scheme, weight, norm_weight, transform, residual)


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
        if given.transform is None:
            found = inputs.codes(x, given.norm_weight, arithmetic.grid or scheme, rows, arithmetic.rounded_once)
        else:
            sigmas = 1.0 if arithmetic.between else SIGMAS
            found = rotated_codes(x, scheme, given.transform, rows, arithmetic.between, sigmas)
        values, off = found.values, found.values_off.square()
        if arithmetic.between or (scheme.fused == RMS_NORM and arithmetic.rounded_once is None):
            # Many codes are uncertain, and one that came out differently is so in all products of its token: few tokens
            # average little.
            off *= 1 + SHARED / len(rows) ** 0.5
        whole = (found.scale_off / found.scale).float()
    else:
        values = inputs.prepared_fp64(x, given.norm_weight, scheme, rows)
        off = (values * (2 * u if scheme.fused else 0)).square()
        whole = values.new_zeros(values.shape[0], 1)
    per_product = accumulation(weight.k) ** 2 + (arithmetic.weight_roundings * u) ** 2
    variance = (off + values.square() * per_product).float()
    want, deviation = [], []
    for part in weight.parts():
        if prepared.weight is not None:
            w = prepared.weight[part].double()
        elif arithmetic.quantizes:
            w = reference.dequantize(*weight.part(part), weight.scheme.bits)
        else:
            w = given.plain_weight(part)
        want.append(values @ w.t())
        deviation.append((variance @ w.square().float().t()).sqrt_())
    product = torch.cat(want, 1)
    # An error of a token's scale is the same for all of its products, and adds up.
    error = torch.hypot(torch.cat(deviation, 1), (product * whole).float())
    if given.residual is None:
        return Expected(rows, product, error, u * rounding + EPILOGUE)
    # All roundings but the last one are of the product alone, and of what is computed in fp32 nothing is larger.
    error = torch.hypot(error, (product.abs() * (u * (rounding - 1) + EPILOGUE)).float())
    return Expected(rows, product + given.residual[rows].double(), error, u + EPILOGUE)
