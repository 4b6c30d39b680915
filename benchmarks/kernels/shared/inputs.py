"""Random activations, what comes before they are quantized, and their codes in fp64: the oracle of both ops.

Rounding to a grid makes a step of an error however small, so that the oracle says for every token which codes are
right. What the kernels compute in fp32 may be off by a few of its roundings: where a 16-bit rounding, a token's scale
or a code depends on that, everything between the two ends is right, and only there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from .schemes import RMS_NORM, SILU_MUL, ActivationScheme

__all__ = [
    "NORM_EPS", "Codes", "before", "candidates", "codes", "codes_of", "prepared_fp64", "random_inputs",
    "random_norm_weight",
]  # fmt: skip

NORM_EPS = 1e-5
# Of sums over a token by trees, of reciprocal square roots and exponentials of a GPU: relative.
FP32 = 2.0**-20
# Of a scale, a quotient by it, and a zero-point's sum.
SCALE, OFFSET = 2.0**-22, 2.0**-16


def random_inputs(m: int, k: int, scheme: ActivationScheme, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x `[M, K]`, standard normal; with SiLU-mul `[2, M, K]`: gate, and what it multiplies."""
    shape = (2, m, k) if scheme.fused == SILU_MUL else (m, k)
    return torch.randn(shape, device=generator.device, generator=generator).to(dtype)


def random_norm_weight(k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`[K]`, around 1."""
    return torch.rand(k, device=generator.device, generator=generator).add_(0.5).to(dtype)


def before(x: Tensor, norm_weight: Tensor, scheme: ActivationScheme) -> Tensor:
    """What is quantized `[M, K]`, by torch's own operators."""
    if scheme.fused == RMS_NORM:
        return rms_norm(x, norm_weight.shape, norm_weight, NORM_EPS)
    if scheme.fused == SILU_MUL:
        return silu(x[0]) * x[1]
    return x


def prepared_fp64(x: Tensor, norm_weight: Tensor, scheme: ActivationScheme, rows: Tensor) -> Tensor:
    """What is quantized, in fp64 and never rounded: `[R, K]`, some rows."""
    x = x[..., rows, :].double()
    if scheme.fused == RMS_NORM:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * norm_weight.double()
    if scheme.fused == SILU_MUL:
        return silu(x[0]) * x[1]
    return x


@dataclass(frozen=True)
class Codes:
    """Tokens on the grid, fp64, and how far each may be off.

    steps: codes less the zero-point `[R, K]`; scale, zero: `[R, 1]`; values: steps * scale.
    """

    steps: Tensor
    steps_off: Tensor
    scale: Tensor
    scale_off: Tensor
    zero: Tensor
    zero_off: Tensor
    values: Tensor
    values_off: Tensor


def codes(
    x: Tensor, norm_weight: Tensor, scheme: ActivationScheme, rows: Tensor, rounded_once: bool | None = False
) -> Codes:
    """The codes of some rows. rounded_once: whether a norm is rounded after its weight only, as torch's operator may
    do, or before it too, as Llama's is; None: either is right."""
    return codes_of(candidates(x, norm_weight, scheme, rows, rounded_once), scheme)


def codes_of(values: list[Tensor], scheme: ActivationScheme) -> Codes:
    """The codes of tokens fp64 `[R, K]`: first as they are, then with errors that are no fault."""
    value, *others = values
    lowest, highest = value, value
    for other in others:
        lowest, highest = torch.minimum(lowest, other), torch.maximum(highest, other)
    levels = 2**scheme.bits - (2 if scheme.narrow else 1)
    low_code, high_code = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1

    def scale_of(low: Tensor, high: Tensor) -> Tensor:
        span = torch.maximum(-low, high) * 2 if scheme.symmetric else high - low
        return torch.where(span > 0, span / levels, 1.0)

    def ends(of: Tensor) -> tuple[Tensor, Tensor]:
        return of.amin(-1, keepdim=True).clamp(max=0), of.amax(-1, keepdim=True).clamp(min=0)

    (low, high), (low_first, high_first), (low_last, high_last) = ends(value), ends(lowest), ends(highest)
    scale = scale_of(low, high)
    # A token's lowest value is between those of its lowest and highest ends, and so is its highest.
    largest = scale_of(low_first, high_last) * (1 + SCALE)
    smallest = scale_of(low_last, high_first) * (1 - SCALE)
    zero = first_zero = last_zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        zero = (low_code - low / scale).round().clamp(low_code, high_code)
        first_zero = (low_code - low_last / largest - OFFSET).round().clamp(low_code, high_code)
        last_zero = (low_code - low_first / smallest + OFFSET).round().clamp(low_code, high_code)

    steps = (value / scale).round().clamp(low_code - zero, high_code - zero)
    first = (
        torch.minimum(lowest / smallest, lowest / largest).round().clamp(low_code - last_zero, high_code - last_zero)
    )
    last = torch.maximum(highest / smallest, highest / largest).round()
    last = last.clamp(low_code - first_zero, high_code - first_zero)
    values = steps * scale
    corners = [bound * factor for bound in (first, last) for factor in (smallest, largest)]
    return Codes(
        steps, torch.maximum(last - steps, steps - first),
        scale, torch.maximum(largest - scale, scale - smallest),
        zero, torch.maximum(last_zero - zero, zero - first_zero),
        values, torch.stack([(corner - values).abs() for corner in corners]).amax(0),
    )  # fmt: skip


def candidates(
    x: Tensor, norm_weight: Tensor, scheme: ActivationScheme, rows: Tensor, rounded_once: bool | None
) -> list[Tensor]:
    """What may be quantized, fp64 `[R, K]`: with no error first, then with the ends of the errors of fp32."""
    dtype, x = x.dtype, x[..., rows, :].double()
    if scheme.fused is None:
        return [x]
    found = []
    for error in (0.0, -FP32, FP32):
        if scheme.fused == SILU_MUL:
            gate = (silu(x[0]) * (1 + error)).to(dtype).double()
            found.append((gate * x[1]).to(dtype).double())
            continue
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * (1 + error)
        if rounded_once is not True:
            found.append((normalized.to(dtype).double() * norm_weight.double()).to(dtype).double())
        if rounded_once is not False:
            found.append((normalized * norm_weight.double()).to(dtype).double())
    return found
