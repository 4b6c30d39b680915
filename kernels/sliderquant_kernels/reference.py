"""The oracle: what every op computes, in a few lines of fp64 torch, from the codes themselves and never from a packing.

    weight[n, k] = (codes[n, k] - zero_point[n, k // group]) * scale[n, k // group]
    y[m, n]      = sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]

Without zero points the weight is symmetric: zero_point = 2^(bits - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation.matrix import HadamardTransform


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Codes `[N, K]` uint8, scale `[N, G]`, zero_point `[N, G]` uint8 or None -> weight `[N, K]` fp64."""
    group_size = codes.shape[1] // scale.shape[1]
    scale = scale.double().repeat_interleave(group_size, dim=1)
    if zero_point is None:
        return (codes.double() - 2 ** (bits - 1)) * scale
    return (codes.double() - zero_point.double().repeat_interleave(group_size, dim=1)) * scale


def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x `[..., K]` times the dequantized weight, plus bias `[N]`, plus residual `[..., N]` -> `[..., N]` fp64."""
    y = x.double() @ dequantize(codes, scale, zero_point, bits).t()
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    return y


def magnitude(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """sum_k |x| |weight| `[..., N]` fp64: what rounding errors of a dot product are proportional to."""
    return torch.matmul(x.double().abs(), dequantize(codes, scale, zero_point, bits).abs().t())


def quantize_activations(
    x: Tensor, bits: int, symmetric: bool, clip: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[..., K]` -> codes, scale, zero-point in fp64: as `activations.op`, with no rounding but its own."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0) * clip[0], x.amax(-1, keepdim=True).clamp(min=0) * clip[1]
    scale = torch.maximum(-low, high) / ((2**bits - 1) / 2) if symmetric else (high - low) / (2**bits - 1)
    empty = scale == 0
    scale = torch.where(empty, 1.0, scale)
    zero = torch.zeros_like(scale) if symmetric else (low_code - low / scale).round().clamp(low_code, high_code)
    zero = torch.where(empty, 0.0, zero)
    codes = ((x / scale).round() + zero).clamp(low_code, high_code)
    return codes, scale.squeeze(-1), zero.squeeze(-1)


def hadamard(x: Tensor, transform: HadamardTransform, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """x `[..., n]` -> `[..., n]` fp64: a token times H diag(signs) / sqrt(b), block by block, by the dense matrix."""
    x, matrix = x.double(), transform.matrix().double()
    if signs is not None and not inverse:
        x = x * signs.double()
    y = x.unflatten(-1, (transform.blocks, transform.block)) @ (matrix if inverse else matrix.t())
    y = y.flatten(-2) / transform.block**0.5
    return y * signs.double() if signs is not None and inverse else y
