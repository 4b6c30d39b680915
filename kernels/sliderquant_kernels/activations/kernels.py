"""The Triton kernel that quantizes activations per token, with RMSNorm or SiLU(gate) * x before it: one read of a row,
one write of its codes. The formulas are in `op`."""

# mypy: allow-incomplete-defs
from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch_plan import Dtypes, Launcher, PlanCache, dtype_of, launcher_for

# Added to an fp32 number below 2^22 it leaves the number's nearest integer, half to even, in the lowest mantissa bits.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
_ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def _quotient(x, scale, IEEE: tl.constexpr):
    """x / scale, correctly rounded. Without IEEE by one correction of x times the reciprocal (Markstein 1990), which
    takes three instructions; the interpreter, which has no fused multiply-add, needs IEEE."""
    if IEEE:
        out = tl.div_rn(x, tl.zeros_like(x) + scale)
    else:
        reciprocal = tl.div_rn(1.0, scale)
        near = x * reciprocal
        out = tl.fma(tl.fma(-near, tl.zeros_like(x) + scale, x), tl.zeros_like(x) + reciprocal, near)
    return out


@triton.jit
def quantize_row(x, padding, clip_low, clip_high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, IEEE: tl.constexpr):
    """x fp32, 0 in its last `padding` values -> codes int32 (the zero-point there), scale fp32, zero and sum int32.

    clip_low, clip_high: factors on the ends of the range, or both None.
    """
    LOW: tl.constexpr = -(2 ** (BITS - 1))
    HIGH: tl.constexpr = 2 ** (BITS - 1) - 1
    if SYMMETRIC:
        if clip_low is not None:
            largest = tl.maximum(tl.minimum(tl.min(x), 0.0) * -clip_low, tl.maximum(tl.max(x), 0.0) * clip_high)
        else:
            largest = tl.max(tl.abs(x))
        scale = tl.div_rn(largest, (2**BITS - 1) / 2.0)
        scale = tl.where(scale > 0, scale, 1.0)
        zero = 0
        clamped = tl.minimum(tl.maximum(_quotient(x, scale, IEEE), LOW), HIGH)
    else:
        low = tl.minimum(tl.min(x), 0.0)
        high = tl.maximum(tl.max(x), 0.0)
        if clip_low is not None:
            low = low * clip_low
            high = high * clip_high
        span = tl.div_rn(high - low, 2.0**BITS - 1)
        scale = tl.where(span > 0, span, 1.0)
        zero = ((LOW - tl.div_rn(low, scale)) + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
        zero = tl.where(span > 0, tl.minimum(tl.maximum(zero, LOW), HIGH), 0)
        # Clamped before it is rounded: the bounds are integers, so that it is the same.
        clamped = tl.minimum(tl.maximum(_quotient(x, scale, IEEE), (LOW - zero).to(tl.float32)),
                             (HIGH - zero).to(tl.float32))  # fmt: skip
    codes = (clamped + _ROUNDER).to(tl.int32, bitcast=True) - (_ROUNDER_BITS - zero)
    return codes, scale, zero, tl.sum(codes) - padding * zero


@triton.jit
def quantize_kernel(x_ptr, norm_ptr, gate_ptr, codes_ptr, scale_ptr, zero_ptr, sum_ptr, K, eps, clip_low,
                    clip_high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
                    IEEE: tl.constexpr):  # fmt: skip
    """One program a token of `[M, K]`; BLOCK is K rounded up to a power of two. Clipping: as in `quantize_row`."""
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
    codes, scale, zero, total = quantize_row(x, BLOCK - K, clip_low, clip_high, BITS, SYMMETRIC, IEEE)
    if PACKED:
        low, high = tl.split(tl.reshape(codes & 15, (BLOCK // 2, 2)))
        pairs = tl.arange(0, BLOCK // 2)
        tl.store(codes_ptr + row * (K // 2) + pairs, (low | (high << 4)).to(tl.uint8), pairs < K // 2)
    else:
        tl.store(codes_ptr + row * K + offsets, codes.to(tl.int8), mask)
    tl.store(scale_ptr + row, scale)
    tl.store(sum_ptr + row, total)
    if not SYMMETRIC:
        tl.store(zero_ptr + row, zero)


# Whether TRITON_INTERPRET was set when the kernel was defined.
INTERPRETED = not isinstance(quantize_kernel, triton.JITFunction)


def quantize_options(k: int) -> dict[str, Any]:
    """Triton's options for rows of `k` values: 32 a thread, up to 16384 of them.

    64 values of each of 512 threads do not fit in registers with Triton 3.9. 128 of each of 256 do, if they have 16
    bits, and are as many bytes on their way.
    """
    block = triton.next_power_of_2(k)
    warps = 8 if block == 1 << 15 else min(max(block // (32 * 32), 1), 16)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def quantize_constants(k: int, bits: int, symmetric: bool, packed: bool) -> dict[str, Any]:
    """The compile-time arguments of `quantize_kernel`; shared by the launch and by `inspect`."""
    block = max(triton.next_power_of_2(k), 2)
    return {"BITS": bits, "SYMMETRIC": symmetric, "PACKED": packed, "BLOCK": block, "IEEE": INTERPRETED}


_plans = PlanCache()


def quantize_activations(
    x: Tensor,
    bits: int,
    symmetric: bool,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    packed: bool,
    clip: Sequence[float] | None = None,
    plans: PlanCache | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scale, zero-point (None when symmetric) and token sum; arguments have been validated.

    plans: of a caller for whom all but the number of tokens stays the same.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    tokens, k = x.shape[:-1], x.shape[-1]
    if packed:
        codes = x.new_empty(*tokens, k // 2, dtype=torch.uint8)
    else:
        codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale, zero, total = token_values(x, symmetric)
    rows = scale.numel()
    if rows == 0:
        return codes, scale, zero, total
    if gate is not None and not gate.is_contiguous():
        gate = gate.contiguous()
    if norm_weight is not None and not norm_weight.is_contiguous():
        norm_weight = norm_weight.contiguous()
    clip_low, clip_high = (None, None) if clip is None else clip
    numbers = (k, norm_eps, clip_low, clip_high)
    # Any number of tokens is the same kernel.
    key: Hashable = None
    if plans is None:
        plans = _plans
        key = (k, x.dtype, x.get_device(), bits, symmetric, packed, norm_weight is None, gate is None, clip is None)
    plan = plans.get(key)
    if plan is None:
        plan = quantize_plan(plans, key, k, x.dtype, x.get_device(), bits, symmetric, packed, dtype_of(norm_weight),
                             dtype_of(gate), clip)  # fmt: skip
    plan.launcher((rows, 1, 1), (x, norm_weight, gate, codes, scale, zero, total), numbers)
    return codes, scale, zero, total


class QuantizePlan(NamedTuple):
    """How activations are quantized, and the dtypes of the tensors of the launch."""

    launcher: Launcher
    dtypes: Dtypes


def quantize_plan(
    plans: PlanCache,
    key: Hashable,
    k: int,
    dtype: torch.dtype,
    index: int,
    bits: int,
    symmetric: bool,
    packed: bool,
    norm: torch.dtype | None,
    gate: torch.dtype | None,
    clip: Sequence[float] | None,
) -> QuantizePlan:
    """A plan, kept in `plans` under `key`; norm, gate: the dtypes of what there is."""
    dtypes = (dtype, norm, gate, torch.uint8 if packed else torch.int8, torch.float32,
              None if symmetric else torch.int32, torch.int32)  # fmt: skip
    limits = (None, None) if clip is None else (clip[0], clip[1])
    constants = quantize_constants(k, bits, symmetric, packed)
    launcher = launcher_for(quantize_kernel, constants, quantize_options(k), index, dtypes, (k, 0.0, *limits))
    return plans.keep(key, QuantizePlan(launcher, dtypes))


def token_values(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Memory for scale fp32, zero-point int32 (None when symmetric) and sum int32 of the tokens of x `[..., K]`."""
    tokens = x.shape[:-1]
    # Sizes one by one: torch takes longer to read them out of a tuple, but it does not take none of them.
    scale = x.new_empty(*tokens, dtype=torch.float32) if tokens else x.new_empty((), dtype=torch.float32)
    total = torch.empty_like(scale, dtype=torch.int32)
    return scale, None if symmetric else torch.empty_like(total), total
