"""The uniform quantizer: pure functions of tensors. Its straight-through gradient is in `fake_quantize`.

A weight `[out, in]` is cut into groups of `group_size` inputs of a row (or whole rows). With the range `[low, high]` of
a group, `low <= 0 <= high`, and b bits:

    asymmetric   s = round_to_dtype((high - low) / (2^b - 1))    z = clamp(round(-low / s), 0, 2^b - 1)
    symmetric    s = round_to_dtype(max(-low, high) / ((2^b - 1) / 2))    z = 2^(b-1)
    code         q = clamp(round(w / s) + z, 0, 2^b - 1)
    value        w^ = (q - z) * s

Activations of 4 or 8 bits are rounded while the model runs, each token `[in]` to its own grid, with an fp32 scale and
codes from -2^(b-1): by the formulas of `sliderquant_kernels.activations.op`.

Invariant: the scale is rounded to the dtype in which it is stored *before* it is used and the zero-point is a code, so
that what is trained is what is stored. `(q - z) * s` is exact in fp32: |q - z| < 2^8 and s has at most 11 bits of
mantissa when it is stored in 16 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sliderquant.schemes import Scheme

__all__ = [
    "Grid",
    "QuantizedWeight",
    "clipped_grid",
    "dequantize",
    "find_grid",
    "free_ends",
    "in_groups",
    "quantize",
    "ranges",
    "round_to_nearest",
]


class Grid(NamedTuple):
    """scale `[out, groups]` fp32, already rounded to the stored dtype; zero_point `[out, groups]` fp32, integers."""

    scale: Tensor
    zero_point: Tensor


class QuantizedWeight(NamedTuple):
    """A weight as it is stored: codes uint8 `[out, in]`, scale `[out, groups]` in the stored dtype, zero_point uint8
    `[out, groups]`, or None for a symmetric scheme."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def find_grid(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of groups with the ranges `[low, high]`.

    Args:
        low, high: fp32, one for each group, low <= 0 <= high.
        dtype: in which the scale is stored.
    """
    levels = scheme.levels
    wide = torch.maximum(-low, high) / (levels / 2) if scheme.symmetric else (high - low) / levels
    smallest, largest = _scale_limits(scheme.bits, dtype)
    if dtype == torch.float16:
        if not scheme.symmetric:
            # The outermost values lie up to half a step beyond the range, and must not overflow.
            end = torch.finfo(dtype).max * (1 - 2**-10) - wide / 2
            low, high = torch.maximum(low, -end), torch.minimum(high, end)
            wide = (high - low) / levels
        # Of a scale below the normal numbers up to half would be rounded away, and the ends of the range with it: up.
        tight = torch.ceil(wide / smallest) * smallest
        wide = torch.where(wide < torch.finfo(dtype).smallest_normal, tight, wide)
    # A group of zeros has no range: any scale stores it, 1 does it without a special case in any reader.
    scale = torch.where(wide > 0, wide.clamp(min=smallest, max=largest), 1.0).to(dtype).float()
    if scheme.symmetric:
        return Grid(scale, torch.full_like(scale, scheme.offset))
    return Grid(scale, torch.round(-low / scale).clamp_(0, levels))


def _scale_limits(bits: int, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest scale of a range that is not 0, and the largest that keeps codes times scale finite in `dtype`."""
    info = torch.finfo(dtype)
    # Small weights of a float16 model need scales below 6e-5, its smallest normal number. The other dtypes have none
    # that matter, and fp32 arithmetic may flush theirs to 0.
    smallest = info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal
    return smallest, info.max / 2 ** (bits - 1)


def quantize(weight: Tensor, grid: Grid, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round `weight` fp32 `[out, in]` to the grid; dtype: in which the scale is stored."""
    grouped = in_groups(weight, scheme)
    codes = torch.round(grouped / grid.scale[..., None]).add_(grid.zero_point[..., None]).clamp_(0, scheme.levels)
    zero_point = None if scheme.symmetric else grid.zero_point.to(torch.uint8)
    return QuantizedWeight(codes.view_as(weight).to(torch.uint8), grid.scale.to(dtype), zero_point)


def dequantize(quantized: QuantizedWeight, scheme: Scheme) -> Tensor:
    """The stored weight, fp32 `[out, in]`, exactly."""
    codes, scale, zero_point = quantized
    centre = scheme.offset if zero_point is None else zero_point.float()[..., None]
    return ((in_groups(codes, scheme).float() - centre) * scale.float()[..., None]).view(codes.shape)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Quantize `weight` fp32 `[out, in]` with the full range of each group: the RTN baseline."""
    return quantize(weight, clipped_grid(weight, None, None, scheme, dtype), scheme, dtype)


def clipped_grid(
    weight: Tensor, clip_low: Tensor | None, clip_high: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> Grid:
    """The grid that `fake_quantize.fake_quantize` uses for these arguments."""
    low, high = ranges(weight, scheme)
    if clip_low is not None and clip_high is not None:
        low, high = low * torch.sigmoid(clip_low), high * torch.sigmoid(clip_high)
    return find_grid(low, high, scheme, dtype)


def ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group and 0, `[out, groups]`."""
    grouped = in_groups(weight, scheme)
    # On a CPU aminmax is far slower than both.
    return grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)


def free_ends(low: Tensor, high: Tensor, log_low: Tensor, log_high: Tensor) -> tuple[Tensor, Tensor]:
    """The range `[exp(log_low) * low, exp(log_high) * high]` of each group: free of the weights that are in it."""
    return low * log_low.exp(), high * log_high.exp()


def in_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """`[out, in]` -> `[out, groups, in / groups]`."""
    out_features, in_features = weight.shape
    groups = scheme.groups(in_features)
    return weight.reshape(out_features, groups, in_features // groups)
