"""The uniform quantizer and its straight-through gradient: pure functions of tensors.

A weight `[out, in]` is cut into groups of `group_size` inputs of a row (or whole rows). With the range `[low, high]` of
a group, `low <= 0 <= high`, and b bits:

    asymmetric   s = round_to_dtype((high - low) / (2^b - 1))    z = clamp(round(-low / s), 0, 2^b - 1)
    symmetric    s = round_to_dtype(max(-low, high) / ((2^b - 1) / 2))    z = 2^(b-1)
    code         q = clamp(round(w / s) + z, 0, 2^b - 1)
    value        w^ = (q - z) * s

An activation of 4 or 8 bits is rounded while the model runs, each token `[in]` to its own grid, with an fp32 scale and
codes from -2^(b-1): the formulas of `sliderquant_kernels.activations`, and its bits.

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
    "fake_quantize",
    "fake_quantize_activations",
    "find_grid",
    "quantize",
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
        low, high: fp32 `[out, groups]`, low <= 0 <= high.
        dtype: in which the scale is stored.
    """
    if scheme.symmetric:
        wide = torch.maximum(-low, high) / (scheme.levels / 2)
    else:
        wide = (high - low) / scheme.levels
    # A group of zeros has no range: any scale stores it, 1 does it without a special case in any reader. A range so
    # small that its scale rounds to zero gets the smallest scale there is.
    smallest = torch.finfo(dtype).smallest_normal
    scale = torch.where(wide > 0, wide.clamp(min=smallest), 1.0).to(dtype).float()
    if scheme.symmetric:
        return Grid(scale, torch.full_like(scale, scheme.offset))
    return Grid(scale, torch.round(-low / scale).clamp_(0, scheme.levels))


def quantize(weight: Tensor, grid: Grid, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round `weight` fp32 `[out, in]` to the grid; dtype: in which the scale is stored."""
    grouped = _grouped(weight, scheme)
    codes = torch.round(grouped / grid.scale[..., None]).add_(grid.zero_point[..., None]).clamp_(0, scheme.levels)
    zero_point = None if scheme.symmetric else grid.zero_point.to(torch.uint8)
    return QuantizedWeight(codes.view_as(weight).to(torch.uint8), grid.scale.to(dtype), zero_point)


def dequantize(quantized: QuantizedWeight, scheme: Scheme) -> Tensor:
    """The stored weight, fp32 `[out, in]`, exactly."""
    codes, scale, zero_point = quantized
    centre = scheme.offset if zero_point is None else zero_point.float()[..., None]
    return ((_grouped(codes, scheme).float() - centre) * scale.float()[..., None]).view(codes.shape)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Quantize `weight` fp32 `[out, in]` with the full range of each group: the RTN baseline."""
    low, high = _grouped(weight, scheme).aminmax(dim=-1)
    return quantize(weight, find_grid(low.clamp(max=0), high.clamp(min=0), scheme, dtype), scheme, dtype)


def fake_quantize(
    weight: Tensor, clip_low: Tensor | None, clip_high: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """The dequantized weight `[out, in]`, differentiable in `weight` and in the clipping.

    The range of a group is `[sigmoid(clip_low) * min, sigmoid(clip_high) * max]`, min and max those of the current
    weight (OmniQuant's learnable weight clipping, arXiv 2308.13137, eq. 2). Rounding of the weight, of the
    scale and of the zero-point passes gradients straight through.

    Args:
        weight: fp32 `[out, in]`.
        clip_low, clip_high: fp32 `[out, groups]` before the sigmoid; None: no clipping.
    """
    return _FakeQuantize.apply(weight, clip_low, clip_high, scheme, dtype)


def clipped_grid(
    weight: Tensor, clip_low: Tensor | None, clip_high: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> Grid:
    """The grid that `fake_quantize` uses for these arguments."""
    low, high = _grouped(weight, scheme).aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip_low is not None and clip_high is not None:
        low, high = low * torch.sigmoid(clip_low), high * torch.sigmoid(clip_high)
    return find_grid(low, high, scheme, dtype)


def fake_quantize_activations(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x `[..., in]` with every row rounded to the grid of its own range, in fp32, then in the dtype of x.

    On a CPU equal bit for bit to `sliderquant_kernels.quantize_activations(x, ...).dequantize(x.dtype)`.
    Differentiable: rounding of x and of the zero-point passes gradients straight through; the range is that of the
    current x.

    Args:
        x: a row is the input of a linear for a token, or a query, key or value of a head.
        bits: 4 or 8.
        symmetric: without zero-points.
    """
    return _FakeQuantizeActivations.apply(x, bits, symmetric)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    out_features, in_features = weight.shape
    groups = scheme.groups(in_features)
    return weight.reshape(out_features, groups, in_features // groups)


class _FakeQuantize(torch.autograd.Function):
    """With s the scale, z the zero-point, t = w / s and q the clamped code: dw^/dw is 1 inside the range and 0 where
    the code was clamped; dw^/ds is (q - z) - t inside, q - z outside; dw^/dz is 0 inside and -s outside. With
    z = -bottom / s, scale and zero-point pass their gradients to the ends of the range, and those to the clipping and
    to the weights that are the minimum and the maximum of their group."""

    @staticmethod
    def forward(ctx, weight, clip_low, clip_high, scheme, dtype):
        grouped = _grouped(weight, scheme)
        low, low_at = grouped.min(dim=-1)
        high, high_at = grouped.max(dim=-1)
        low_inside, high_inside = low < 0, high > 0
        low, high = low.clamp(max=0), high.clamp(min=0)
        shrink_low = torch.sigmoid(clip_low) if clip_low is not None else torch.ones_like(low)
        shrink_high = torch.sigmoid(clip_high) if clip_high is not None else torch.ones_like(high)
        bottom, top = low * shrink_low, high * shrink_high
        scale, zero_point = find_grid(bottom, top, scheme, dtype)
        steps = grouped / scale[..., None]
        code = torch.round(steps).add_(zero_point[..., None])
        inside = (code >= 0) & (code <= scheme.levels)
        code = code.clamp_(0, scheme.levels).sub_(zero_point[..., None])
        # torch.addcmul and the like would save a pass, but not the bits: keep w^ = (q - z) * s.
        value = code * scale[..., None]
        by_scale = code.sub_(steps.mul_(inside))
        ctx.scheme = scheme
        ctx.save_for_backward(
            inside, by_scale, scale, low, high, low_at, high_at, low_inside, high_inside, shrink_low, shrink_high,
            bottom, top,
        )  # fmt: skip
        ctx.clips = clip_low is not None
        return value.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (
            inside, by_scale, scale, low, high, low_at, high_at, low_inside, high_inside, shrink_low, shrink_high,
            bottom, top,
        ) = ctx.saved_tensors  # fmt: skip
        scheme = ctx.scheme
        grouped = _grouped(grad, scheme)
        grad_scale = (grouped * by_scale).sum(dim=-1)
        grad_weight = grouped * inside
        if scheme.symmetric:
            per_end = grad_scale / (scheme.levels / 2)
            high_wins = top >= -bottom
            grad_top, grad_bottom = per_end * high_wins, -per_end * ~high_wins
        else:
            grad_steps = grad_weight.sum(dim=-1) - grouped.sum(dim=-1)  # of z, divided by s
            grad_top = (grad_scale + grad_steps * bottom / scale) / scheme.levels
            grad_bottom = -grad_top - grad_steps
        # The end of a range is the weight at its minimum or maximum, unless the range was extended to hold 0.
        grad_weight.scatter_add_(-1, low_at[..., None], (grad_bottom * shrink_low * low_inside)[..., None])
        grad_weight.scatter_add_(-1, high_at[..., None], (grad_top * shrink_high * high_inside)[..., None])
        grad_low = grad_bottom * low * shrink_low * (1 - shrink_low) if ctx.clips else None
        grad_high = grad_top * high * shrink_high * (1 - shrink_high) if ctx.clips else None
        return grad_weight.view_as(grad), grad_low, grad_high, None, None


class _FakeQuantizeActivations(torch.autograd.Function):
    """The gradients of `_FakeQuantize`, for a grid per token and without clipping."""

    @staticmethod
    def forward(ctx, x, bits, symmetric):
        lowest, highest, levels = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits - 1
        wide = x.float()
        low, low_at = wide.min(dim=-1, keepdim=True)
        high, high_at = wide.max(dim=-1, keepdim=True)
        low_inside, high_inside = low < 0, high > 0
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = torch.maximum(-low, high) / (levels / 2) if symmetric else (high - low) / levels
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = torch.zeros_like(scale)
        if not symmetric:
            # Not round(-low / scale) + lowest: in fp32 the two may round differently.
            zero_point = torch.round(lowest - low / scale).clamp_(lowest, highest)
        steps = wide / scale
        code = torch.round(steps).add_(zero_point)
        inside = (code >= lowest) & (code <= highest)
        code = code.clamp_(lowest, highest).sub_(zero_point)
        value = (code * scale).to(x.dtype)
        by_scale = code.sub_(steps.mul_(inside))
        ctx.save_for_backward(inside, by_scale, scale, low, high, low_at, high_at, low_inside, high_inside)
        ctx.symmetric, ctx.levels = symmetric, levels
        return value

    @staticmethod
    def backward(ctx, grad):
        inside, by_scale, scale, low, high, low_at, high_at, low_inside, high_inside = ctx.saved_tensors
        wide = grad.float()
        grad_scale = (wide * by_scale).sum(dim=-1, keepdim=True)
        grad_x = wide * inside
        if ctx.symmetric:
            per_end = grad_scale / (ctx.levels / 2)
            high_wins = high >= -low
            grad_high, grad_low = per_end * high_wins, -per_end * ~high_wins
        else:
            grad_steps = grad_x.sum(dim=-1, keepdim=True) - wide.sum(dim=-1, keepdim=True)
            grad_high = (grad_scale + grad_steps * low / scale) / ctx.levels
            grad_low = -grad_high - grad_steps
        grad_x.scatter_add_(-1, low_at, grad_low * low_inside)
        grad_x.scatter_add_(-1, high_at, grad_high * high_inside)
        return grad_x.to(grad.dtype), None, None
