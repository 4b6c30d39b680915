"""Triton kernels of the Hadamard rotation along one axis by one product: of short rows, and of the leading axis of rows
that are too long for `kernels.row_kernel`. Values are split as there."""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

from .kernels import codes_of, grid_of, load_values, operand_parts, store_values


@triton.jit
def rows_kernel(x_ptr, gate_ptr, before_ptr, after_ptr, right_ptr, y_ptr, scale_ptr, zero_ptr, sum_ptr, M,
                clip_low, clip_high, FACTOR: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, ROWS: tl.constexpr,
                X_PARTS: tl.constexpr, VALUES: tl.constexpr, X_OPERAND: tl.constexpr, BITS: tl.constexpr,
                SYMMETRIC: tl.constexpr, IEEE: tl.constexpr, PERIOD: tl.constexpr):  # fmt: skip
    """ROWS rows of `[M, N]` times right `[PADDED_N, PADDED_N]` and FACTOR; arguments as of `row_kernel`."""
    n = tl.arange(0, PADDED_N)
    right = tl.load(right_ptr + n[:, None] * PADDED_N + n[None, :])
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * N + n[None, :]
    sign_offsets = (row % PERIOD)[:, None] * N + n[None, :]
    mask = (row < M)[:, None] & (n < N)[None, :]
    values = load_values(x_ptr, gate_ptr, before_ptr, offsets, sign_offsets, mask, False, VALUES)
    parts = operand_parts(values, X_PARTS, X_OPERAND, False)
    out = tl.dot(parts[0], right)
    for i in tl.static_range(1, X_PARTS):
        out = tl.dot(parts[i], right, out)
    out = out * FACTOR
    if BITS == 0:
        store_values(y_ptr, after_ptr, offsets, sign_offsets, mask, out, False)
    else:
        # Beyond N `right` has zeros, and so has `out`.
        BELOW: tl.constexpr = not SYMMETRIC or clip_low is not None
        high = tl.max(out, 1) if BELOW else tl.max(tl.abs(out), 1)
        scale, reciprocal, zero = grid_of(tl.min(out, 1), high, clip_low, clip_high, BITS, SYMMETRIC, IEEE)
        codes = codes_of(out, reciprocal[:, None], zero[:, None], BITS, BELOW)
        store_values(y_ptr, None, offsets, sign_offsets, mask, codes, False)
        tl.store(scale_ptr + row, scale, row < M)
        tl.store(sum_ptr + row, tl.sum(codes, 1) - zero * (PADDED_N - N), row < M)
        if not SYMMETRIC:
            tl.store(zero_ptr + row, zero, row < M)


@triton.jit
def _leading_tile(x_ptr, left, start, L: tl.constexpr, PADDED_L: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
                  FACTOR: tl.constexpr, X_PARTS: tl.constexpr, X_OPERAND: tl.constexpr,
                  PINNED: tl.constexpr):  # fmt: skip
    """Columns from `start` on of left times x `[L, R]`, times FACTOR: fp32 `[PADDED_L, COLUMNS]`, offsets, mask."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    axis = tl.arange(0, PADDED_L)[:, None]
    offsets = axis * R + column
    mask = (axis < L) & (column < R)
    parts = operand_parts(tl.load(x_ptr + offsets, mask, 0.0), X_PARTS, X_OPERAND, PINNED)
    out = tl.dot(left, parts[0])
    for i in tl.static_range(1, X_PARTS):
        out = tl.dot(left, parts[i], out)
    return out * FACTOR, offsets, mask


@triton.jit
def leading_kernel(x_ptr, after_ptr, left_ptr, y_ptr, scale_ptr, zero_ptr, sum_ptr, clip_low, clip_high,
                   FACTOR: tl.constexpr, L: tl.constexpr, PADDED_L: tl.constexpr, R: tl.constexpr,
                   COLUMNS: tl.constexpr, X_PARTS: tl.constexpr, X_OPERAND: tl.constexpr, PINNED: tl.constexpr,
                   BITS: tl.constexpr, SYMMETRIC: tl.constexpr, IEEE: tl.constexpr,
                   PERIOD: tl.constexpr):  # fmt: skip
    """x `[M, L, R]` -> y[m] = FACTOR left x[m], times the signs `[PERIOD, L, R]`. A program takes COLUMNS columns of a
    row; with BITS all of them: once for the scale, and once more, from the cache, for the codes."""
    axis = tl.arange(0, PADDED_L)
    left = tl.load(left_ptr + axis[:, None] * PADDED_L + axis[None, :])
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * (L * R)
    y_ptr += row * (L * R)
    if after_ptr is not None:
        after_ptr += row % PERIOD * (L * R)
    if BITS == 0:
        out, offsets, mask = _leading_tile(x_ptr, left, tl.program_id(1) * COLUMNS, L, PADDED_L, R, COLUMNS, FACTOR,
                                           X_PARTS, X_OPERAND, PINNED)  # fmt: skip
        store_values(y_ptr, after_ptr, offsets, offsets, mask, out, False)
    else:
        BELOW: tl.constexpr = not SYMMETRIC or clip_low is not None
        low = tl.zeros((PADDED_L, COLUMNS), tl.float32)
        high = tl.zeros((PADDED_L, COLUMNS), tl.float32)
        for start in range(0, R, COLUMNS):
            out, offsets, mask = _leading_tile(x_ptr, left, start, L, PADDED_L, R, COLUMNS, FACTOR, X_PARTS,
                                               X_OPERAND, PINNED)  # fmt: skip
            if BELOW:
                high = tl.maximum(high, out)
                low = tl.minimum(low, out)
            else:
                high = tl.maximum(high, tl.abs(out))
        high = tl.max(tl.max(high, 1), 0)
        low = tl.min(tl.min(low, 1), 0)
        scale, reciprocal, zero = grid_of(low, high, clip_low, clip_high, BITS, SYMMETRIC, IEEE)
        sums = tl.zeros((PADDED_L, COLUMNS), tl.int32)
        for start in range(0, R, COLUMNS):
            out, offsets, mask = _leading_tile(x_ptr, left, start, L, PADDED_L, R, COLUMNS, FACTOR, X_PARTS,
                                               X_OPERAND, PINNED)  # fmt: skip
            codes = codes_of(out, reciprocal, zero, BITS, BELOW)
            sums += codes
            store_values(y_ptr, None, offsets, offsets, mask, codes, False)
        PADDING: tl.constexpr = PADDED_L * ((R + COLUMNS - 1) // COLUMNS * COLUMNS) - L * R
        tl.store(scale_ptr + row, scale)
        tl.store(sum_ptr + row, tl.sum(tl.sum(sums, 1), 0) - zero * PADDING)
        if not SYMMETRIC:
            tl.store(zero_ptr + row, zero)
