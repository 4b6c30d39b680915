"""The Triton kernels of `elementwise`: one read of every input, one write, with the roundings of the plain steps."""

# mypy: allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch_plan import PlanCache, dtype_of, launch, launcher_for

# Without fused multiply-adds: each step is rounded as torch rounds it.
UNFUSED = {"enable_fp_fusion": False}
# Numbers beyond take another kernel.
_INT32 = 1 << 31
# Values that a program takes of a row of `silu_mul`.
COLUMNS = 1024


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, CUT: tl.constexpr):
    """x fp32 rounded to DTYPE, half to even, as fp32. CUT: casts to bf16 cut off instead, as the interpreter's do."""
    if CUT and tl.bfloat16 == DTYPE:
        word = x.to(tl.int32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
        out = word.to(tl.float32, bitcast=True)
    else:
        out = x.to(DTYPE).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["outer", "inner", "heads"])
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, K, outer, inner, heads, eps, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """One program a row: row r of x begins at (r // heads) * outer + (r % heads) * inner; y `[rows, K]`."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < K
    start = (row // heads) * outer + (row % heads) * inner
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + offsets, mask, 0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    weight = tl.load(weight_ptr + offsets, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + row * K + offsets, _rounded(_rounded(x, DTYPE, CUT) * weight, DTYPE, CUT), mask)


@triton.jit(do_not_specialize=["gate_stride", "up_stride"])
def silu_mul_kernel(gate_ptr, up_ptr, y_ptr, K, gate_stride, up_stride, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """y `[rows, K]` = silu(gate) * up, rows of both at strides of their own. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < K
    DTYPE: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + offsets, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offsets, mask, 0.0).to(tl.float32)
    silu = _rounded(gate / (1.0 + tl.exp(-gate)), DTYPE, CUT)
    tl.store(y_ptr + row * K + offsets, _rounded(silu * up, DTYPE, CUT), mask)


@triton.jit(do_not_specialize=["tokens", "q_heads", "k_heads", "q_batch", "q_head", "q_token", "k_batch", "k_head",
                                "k_token", "cos_batch", "cos_token"])  # fmt: skip
def rotary_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads,
                  q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, cos_token,
                  D: tl.constexpr, HALF: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """One program for a head of a token, queries first. D: head size; HALF: its half, rounded up to a power of two.
    Outputs `[batch, tokens, heads, D]`."""
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = item // tokens
    token = item % tokens
    offsets = tl.arange(0, HALF)
    mask = offsets < D // 2
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    if head < q_heads:
        source = q_ptr + batch * q_batch + head * q_head + token * q_token
        target = q_out_ptr + (item * q_heads + head) * D
    else:
        source = k_ptr + batch * k_batch + (head - q_heads) * k_head + token * k_token
        target = k_out_ptr + (item * k_heads + head - q_heads) * D
    angle = batch * cos_batch + token * cos_token + offsets
    low = tl.load(source + offsets, mask, 0.0).to(tl.float32)
    high = tl.load(source + D // 2 + offsets, mask, 0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + angle, mask, 0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + D // 2 + angle, mask, 0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + angle, mask, 0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + D // 2 + angle, mask, 0.0).to(tl.float32)
    # Every product is rounded before they are added, as torch does it.
    first = _rounded(low * cos_low, DTYPE, CUT) + _rounded(-high * sin_low, DTYPE, CUT)
    second = _rounded(high * cos_high, DTYPE, CUT) + _rounded(low * sin_high, DTYPE, CUT)
    tl.store(target + offsets, _rounded(first, DTYPE, CUT), mask)
    tl.store(target + D // 2 + offsets, _rounded(second, DTYPE, CUT), mask)


# Whether TRITON_INTERPRET was set when the kernels were defined.
INTERPRETED = not isinstance(rms_norm_kernel, triton.JITFunction)
_norms, _products = PlanCache(), PlanCache()


def rms_norm_options(k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `rms_norm_kernel` and Triton's options; shared by the launch and by `inspect`."""
    block = triton.next_power_of_2(k)
    return {"BLOCK": block, "CUT": INTERPRETED}, {"num_warps": min(max(block // 512, 1), 16), **UNFUSED}


def silu_mul_options() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of `silu_mul_kernel`."""
    return {"BLOCK": COLUMNS, "CUT": INTERPRETED}, {"num_warps": 4, **UNFUSED}


def rotary_options(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of `rotary_kernel`, for heads of a size."""
    constants = {"D": size, "HALF": triton.next_power_of_2(size // 2), "CUT": INTERPRETED}
    return constants, {"num_warps": 1, **UNFUSED}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x `[..., K]` -> the same shape, contiguous. Arguments have been validated."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    k = x.shape[-1]
    rows = y.numel() // k if k else 0
    if rows == 0:
        return y
    strides = _rows(x)
    if strides is None:
        x, strides = x.contiguous(), (0, k, rows)
    outer, inner, heads = strides
    tensors, numbers = (x, weight, y), (k, outer, inner, heads, eps)
    key = (k, x.dtype, x.get_device(), outer < _INT32)
    launcher = _norms.get(key)
    if launcher is None:
        dtypes = tuple(map(dtype_of, tensors))
        launcher = launcher_for(rms_norm_kernel, *rms_norm_options(k), key[2], dtypes, numbers)
        _norms[key] = launcher
    launcher((rows, 1, 1), tensors, numbers)
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up `[..., K]` -> the same shape, contiguous. Arguments have been validated."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    k = gate.shape[-1]
    gate, up = (x.reshape(-1, k) for x in (gate, up))
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    tensors, numbers = (gate, up, y), (k, gate.stride(0), up.stride(0))
    key = (k, gate.dtype, gate.get_device(), max(numbers) < _INT32)
    launcher = _products.get(key)
    if launcher is None:
        dtypes = tuple(map(dtype_of, tensors))
        launcher = launcher_for(silu_mul_kernel, *silu_mul_options(), key[2], dtypes, numbers)
        _products[key] = launcher
    launcher((gate.shape[0], triton.cdiv(k, COLUMNS), 1), tensors, numbers)
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q `[batch, heads, tokens, D]`, k with its own heads, cos and sin `[batch or 1, tokens, D]` -> views of
    `[batch, tokens, heads, D]` in the shapes of q and k. Arguments have been validated."""
    batch, q_heads, tokens, size = q.shape
    k_heads = k.shape[1]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    outputs = [x.new_empty(batch, tokens, x.shape[1], size) for x in (q, k)]
    if batch * tokens:
        grid = (batch * tokens, q_heads + k_heads, 1)
        strides = (*q.stride()[:3], *k.stride()[:3], *cos.stride()[:2])
        numbers = (tokens, q_heads, k_heads, *strides)
        launch(rotary_kernel, grid, (q, k, cos, sin, *outputs), numbers, *rotary_options(size))
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


def _rows(x: Tensor) -> tuple[int, int, int] | None:
    """Where the rows of x `[..., K]` lie: outer and inner stride, and rows of the inner one; None: not so simply."""
    if x.is_contiguous():
        return 0, x.shape[-1], x.numel() // x.shape[-1]
    if x.stride(-1) != 1 or x.ndim < 2:
        return None
    if x.ndim == 2:
        return 0, x.stride(0), x.shape[0]
    for dim in range(x.ndim - 3):
        if x.stride(dim) != x.stride(dim + 1) * x.shape[dim + 1] and x.shape[dim] != 1:
            return None
    return x.stride(-3), x.stride(-2), x.shape[-2]
