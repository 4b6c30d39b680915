"""Triton kernels of the weight-only ops, and their launch.

`Y^T = W X^T`: the weight is the left operand of the matrix instruction, because that is the one that may stay in
registers after dequantization. The kernel multiplies the integers q - z, which fp16 and bf16 hold exactly, and applies
the scale to the fp32 accumulator once per group: weights are never rounded, and the error against exact arithmetic is
that of fp32 accumulation and of the result's own rounding.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import padded
from .layout import WeightLayout
from .tiles import Tile, choose_dequantize_tile, choose_tile


@triton.jit
def _load_plane(rows, first, end, COLUMNS: tl.constexpr, EVEN_K: tl.constexpr):
    """Bytes `[BLOCK_N, COLUMNS]` of one bit plane. Beyond the end of a row any code will do: its x is 0."""
    columns = first + tl.arange(0, COLUMNS)
    if not EVEN_K:
        columns = tl.minimum(columns, end - 1)
    return tl.load(rows + columns[None, :])


@triton.jit
def _split(values, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, COLUMNS / 2]` values of 2 * WIDTH bits -> `[ROWS, COLUMNS]` values of WIDTH bits, the low one first."""
    return tl.reshape(tl.join(values & (2**WIDTH - 1), values >> WIDTH), (ROWS, COLUMNS))


@triton.jit
def _load_codes(rows, k_start, padded_k, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                EVEN_K: tl.constexpr):  # fmt: skip
    """Codes `[BLOCK_N, BLOCK_K]` uint8 from `bits.pack_rows(planar=False)`; rows are pointers `[BLOCK_N, 1]`."""
    if BITS == 8:
        return _load_plane(rows, k_start, padded_k, BLOCK_K, EVEN_K)
    if BITS == 4:
        nibbles = _load_plane(rows, k_start // 2, padded_k // 2, BLOCK_K // 2, EVEN_K)
        return _split(nibbles, 4, BLOCK_N, BLOCK_K)
    low = _load_plane(rows, k_start // 4, padded_k // 4, BLOCK_K // 4, EVEN_K)
    low = _split(_split(low, 4, BLOCK_N, BLOCK_K // 2), 2, BLOCK_N, BLOCK_K)
    if BITS == 3:
        high = _load_plane(rows + padded_k // 4, k_start // 8, padded_k // 8, BLOCK_K // 8, EVEN_K)
        high = _split(_split(high, 4, BLOCK_N, BLOCK_K // 4), 2, BLOCK_N, BLOCK_K // 2)
        low = low | (_split(high, 1, BLOCK_N, BLOCK_K) << 2)
    return low


@triton.jit
def weight_only_kernel(x_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, N, K, padded_k, groups,
                       BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, EVEN_K: tl.constexpr, OPERAND: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """y `[M, N]` = x `[M, K]` @ ((codes - zero) * scale)^T + bias.

    GROUP_SIZE 0 means per channel, zero_ptr None symmetric.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    # Tiles of the same rows of W run next to each other, so that W is read from memory once.
    offs_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows beyond the end are computed from the last one and not stored: no masks in the loop. 64-bit offsets.
    row_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    row_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + row_m[None, :] * K + offs_k[:, None]
    weight_rows = weight_ptr + row_n[:, None] * (padded_k // 8 * BITS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.full((BLOCK_N,), 2 ** (BITS - 1), tl.int16)
    if zero_ptr is not None and GROUP_SIZE == 0:
        zero = tl.load(zero_ptr + row_n).to(tl.int16)
    for k_start in range(0, K, BLOCK_K):
        codes = _load_codes(weight_rows, k_start, padded_k, BITS, BLOCK_N, BLOCK_K, EVEN_K)
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k_start + offs_k[:, None] < K) & (row_m[None, :] >= 0), other=0.0)
        x_ptrs += BLOCK_K
        if GROUP_SIZE == 0:
            w = (codes.to(tl.int16) - zero[:, None]).to(OPERAND)
            acc = tl.dot(w, x.to(OPERAND), acc, input_precision="ieee")
        else:
            group = row_n * groups + k_start // GROUP_SIZE
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group).to(tl.int16)
            w = (codes.to(tl.int16) - zero[:, None]).to(OPERAND)
            scale = tl.load(scale_ptr + group).to(tl.float32)
            acc += tl.dot(w, x.to(OPERAND), input_precision="ieee") * scale[:, None]
    if GROUP_SIZE == 0:
        acc *= tl.load(scale_ptr + row_n).to(tl.float32)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row_n).to(tl.float32)[:, None]
    y_ptrs = y_ptr + row_m[None, :] * N + row_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_n[:, None] < N) & (offs_m[None, :] < M))


@triton.jit
def dequantize_kernel(weight_ptr, scale_ptr, zero_ptr, out_ptr, N, K, padded_k, groups,
                      BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, EVEN_K: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """out `[N, K]` = (codes - zero) * scale, rounded once."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    k_start = (tl.program_id(0) % tiles_k) * BLOCK_K
    offs_n = (tl.program_id(0) // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    row_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    weight_rows = weight_ptr + row_n[:, None] * (padded_k // 8 * BITS)
    codes = _load_codes(weight_rows, k_start, padded_k, BITS, BLOCK_N, BLOCK_K, EVEN_K)
    group = row_n * groups
    if GROUP_SIZE != 0:
        group += k_start // GROUP_SIZE
    zero = tl.full((BLOCK_N,), 2 ** (BITS - 1), tl.int16)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + group).to(tl.int16)
    scale = tl.load(scale_ptr + group).to(tl.float32)
    w = (codes.to(tl.int16) - zero[:, None]).to(tl.float32) * scale[:, None]
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    tl.store(out_ptr + row_n[:, None] * K + offs_k[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)


# Whether TRITON_INTERPRET was set when the kernels above were defined; decided for the life of the process.
INTERPRETED = not isinstance(weight_only_kernel, triton.JITFunction)
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def operand_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the matrix instruction's operands: that of x, except that the interpreter cannot multiply bf16."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]


def weight_only_constants(layout: WeightLayout, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `weight_only_kernel`; shared by the launch and by `inspect`."""
    return {
        "BITS": layout.bits,
        "GROUP_SIZE": layout.group_size or 0,
        "EVEN_K": layout.k % tile.block_k == 0,
        "OPERAND": operand_dtype(dtype),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_M": tile.block_m,
    }


def dequantize_constants(layout: WeightLayout, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of `dequantize_kernel`; shared by the launch and by `inspect`."""
    return {
        "BITS": layout.bits,
        "GROUP_SIZE": layout.group_size or 0,
        "EVEN_K": layout.k % tile.block_k == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def launch_options(tile: Tile) -> dict[str, Any]:
    """Triton's options for a tile. FP fusion is named because its default differs between Triton versions."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, layout: WeightLayout
) -> Tensor:
    """x `[..., K]` -> `[..., N]`, contiguous. Arguments have been validated; allocates y, and x if strided."""
    y = x.new_empty(*x.shape[:-1], layout.n)
    x = x.reshape(-1, layout.k).contiguous()
    m, n, k = x.shape[0], layout.n, layout.k
    if m == 0:
        return y
    tile = choose_tile(m, n, k, layout.bits, layout.group_size, x.dtype)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    with _on_device_of(x):
        weight_only_kernel[grid](
            x, weight, scale, zero_point, bias, y, m, n, k, padded(k), layout.groups,
            **weight_only_constants(layout, tile, x.dtype), **launch_options(tile),
        )  # fmt: skip
    return y


def dequantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout, dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once. Arguments have been validated."""
    n, k = layout.n, layout.k
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    tile = choose_dequantize_tile(k, layout.group_size)
    grid = (triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k),)
    with _on_device_of(weight):
        dequantize_kernel[grid](
            weight, scale, zero_point, out, n, k, padded(k), layout.groups,
            **dequantize_constants(layout, tile), **launch_options(tile),
        )  # fmt: skip
    return out


def _on_device_of(tensor: Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
