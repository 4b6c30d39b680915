"""Random quantized weights and activations, and what their product must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sliderquant_kernels import reference

from ..harness.case import DTYPES, Arithmetic, Case, Prepared, generator
from ..harness.checking import UNIT_ROUNDOFF, Expected, accumulation, sample_rows
from ..shared.schemes import WeightScheme

__all__ = ["Operands", "activations", "expected", "operands"]

# Weights that are dequantized to fp64 at a time: 128 MB.
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Operands:
    """Codes `[N, K]` uint8, scale `[N, G]` of dtype, zero_point `[N, G]` uint8 or None if symmetric."""

    scheme: WeightScheme
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale: K per channel."""
        return self.scheme.group_size or self.k

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight `[N, K]`, rounded once to dtype."""
        return torch.cat([reference.dequantize(*self.part(rows), self.scheme.bits).to(dtype) for rows in self.parts()])

    def offsets(self) -> Tensor:
        """What the zero-points add to a weight: (2^(bits - 1) - zero_point) * scale `[N, G]` fp64, 0 if symmetric."""
        if self.zero_point is None:
            return torch.zeros_like(self.scale, dtype=torch.float64)
        return (2 ** (self.scheme.bits - 1) - self.zero_point.double()) * self.scale.double()

    def parts(self) -> Iterator[slice]:
        """The rows, some at a time."""
        step = max(1, CHUNK // self.k)
        return (slice(start, start + step) for start in range(0, self.n, step))

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and zero_point of some rows."""
        return self.codes[rows], self.scale[rows], None if self.zero_point is None else self.zero_point[rows]


def operands(case: Case, device: torch.device) -> Operands:
    """Uniformly random codes and zero-points; weights are of the size of a model's."""
    scheme, dtype = WeightScheme.parse(case.scheme), DTYPES[case.dtype]
    n, k = case.shape
    random = generator(case, device)
    groups = k // scheme.group_size if scheme.group_size else 1
    codes = torch.randint(0, 2**scheme.bits, (n, k), dtype=torch.uint8, device=device, generator=random)
    scale = torch.rand(n, groups, device=device, generator=random).add_(0.5).mul_(0.02 / 2 ** (scheme.bits - 1))
    zero_point = None
    if not scheme.symmetric:
        zero_point = torch.randint(0, 2**scheme.bits, (n, groups), dtype=torch.uint8, device=device, generator=random)
    return Operands(scheme, dtype, codes, scale.to(dtype), zero_point)


def activations(case: Case, weight: Operands) -> Tensor:
    """x `[M, K]`, standard normal: neither timing nor checking is done on zeros."""
    random = generator(case, weight.codes.device)
    x = torch.randn(case.m, weight.k, device=weight.codes.device, generator=random)
    return x.to(weight.dtype)


def expected(weight: Operands, x: Tensor, prepared: Prepared) -> Expected:
    """x W^T in fp64, with the errors that the provider's roundings can make."""
    rows = sample_rows(x.shape[0], torch.Generator(x.device).manual_seed(x.shape[0]))
    chosen = x[rows].double()
    squares = chosen.square().float()
    u, arithmetic = UNIT_ROUNDOFF[weight.dtype], prepared.arithmetic(x.shape[0])
    want, deviation = [], []
    for part in weight.parts():
        if prepared.weight is None:
            w = reference.dequantize(*weight.part(part), weight.scheme.bits)
        else:
            w = prepared.weight[part].double()
        want.append(chosen @ w.t())
        variance = _variance(weight, w, part, u, arithmetic)
        deviation.append((squares @ variance.float().t()).sqrt_())
    return Expected(rows, torch.cat(want, 1), torch.cat(deviation, 1), u * arithmetic.output_roundings)


def _variance(weight: Operands, w: Tensor, part: slice, u: float, arithmetic: Arithmetic) -> Tensor:
    """Squared error of a product over the squared activation, for each weight of a chunk."""
    per_weight = accumulation(weight.k) ** 2 + (arithmetic.weight_roundings * u) ** 2
    variance = w.square() * per_weight
    if arithmetic.offset_roundings:
        offsets = weight.offsets()[part].square() * (arithmetic.offset_roundings * u) ** 2
        variance += offsets.repeat_interleave(weight.group_size, 1)
    return variance
