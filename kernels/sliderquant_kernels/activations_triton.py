"""The Triton kernel that quantizes activations per token, with RMSNorm or SiLU(gate) * x before it: one read of a row,
one write of its codes. The formulas are in `activations`."""

# mypy: allow-incomplete-defs
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Adding and subtracting 1.5 * 2^23 rounds an fp32 number below 2^22 to an integer, half to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """fp32, |x| < 2^22. Holds as long as the compiler does not take floating-point arithmetic for real arithmetic,
    which Triton's does not."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def quantize_row(x, mask, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """fp32 `[BLOCK]`, 0 where not mask -> codes fp32 (0 there), scale fp32, zero fp32, sum int32."""
    LOW: tl.constexpr = -(2 ** (BITS - 1))
    HIGH: tl.constexpr = 2 ** (BITS - 1) - 1
    if SYMMETRIC:
        scale = tl.div_rn(tl.max(tl.abs(x), 0), (2**BITS - 1) / 2.0)
        scale = tl.where(scale > 0, scale, 1.0)
        zero = 0.0
        codes = round_half_even(tl.div_rn(x, scale))
    else:
        low = tl.minimum(tl.min(x, 0), 0.0)
        high = tl.maximum(tl.max(x, 0), 0.0)
        scale = tl.div_rn(high - low, 2.0**BITS - 1)
        scale = tl.where(scale > 0, scale, 1.0)
        zero = tl.minimum(tl.maximum(round_half_even(LOW - tl.div_rn(low, scale)), LOW), HIGH)
        codes = round_half_even(tl.div_rn(x, scale)) + zero
    codes = tl.minimum(tl.maximum(codes, LOW), HIGH)
    codes = tl.where(mask, codes, 0.0)
    return codes, scale, zero, tl.sum(codes.to(tl.int32), 0)


@triton.jit
def quantize_kernel(x_ptr, norm_ptr, gate_ptr, codes_ptr, scale_ptr, zero_ptr, sum_ptr, K, eps,
                    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PACKED: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """One program a token of `[M, K]`; BLOCK is K rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < K
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * K + offsets, mask, 0.0).to(tl.float32)
    if norm_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        weight = tl.load(norm_ptr + offsets, mask, 0.0).to(tl.float32)
        # Rounded where Llama's RMSNorm rounds.
        x = (x.to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * K + offsets, mask, 0.0).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
        x = (silu * x).to(DTYPE).to(tl.float32)
    codes, scale, zero, total = quantize_row(x, mask, BITS, SYMMETRIC)
    if PACKED:
        low, high = tl.split(tl.reshape(codes.to(tl.int32) & 15, (BLOCK // 2, 2)))
        pairs = tl.arange(0, BLOCK // 2)
        tl.store(codes_ptr + row * (K // 2) + pairs, (low | (high << 4)).to(tl.uint8), pairs < K // 2)
    else:
        tl.store(codes_ptr + row * K + offsets, codes.to(tl.int8), mask)
    tl.store(scale_ptr + row, scale)
    tl.store(sum_ptr + row, total)
    if not SYMMETRIC:
        tl.store(zero_ptr + row, zero.to(tl.int32))


def quantize_options(k: int) -> dict[str, Any]:
    """Triton's options for rows of `k` values: up to 32 a thread, 64 in the longest."""
    warps = min(max(triton.next_power_of_2(k) // (32 * 32), 1), 16)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def quantize_activations(
    x: Tensor,
    bits: int,
    symmetric: bool,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero-point (unset when symmetric) and token sum; arguments have been validated."""
    shape, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*shape, k // 2) if packed else x.shape, dtype=torch.uint8 if packed else torch.int8)
    scale = x.new_empty(shape, dtype=torch.float32)
    zero, total = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)
    rows = scale.numel()
    if rows == 0:
        return codes, scale, zero, total
    x = x.reshape(-1, k).contiguous()
    gate = None if gate is None else gate.reshape(-1, k).contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        quantize_kernel[(rows,)](
            x, norm_weight, gate, codes, scale, None if symmetric else zero, total, k, norm_eps,
            BITS=bits, SYMMETRIC=symmetric, PACKED=packed, BLOCK=max(triton.next_power_of_2(k), 2),
            **quantize_options(k),
        )  # fmt: skip
    return codes, scale, zero, total
