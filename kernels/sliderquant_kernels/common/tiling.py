"""Device functions that the matmul kernels share: which tile a program computes, and how it is stored."""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

# One compilation serves every number of tokens; these sizes have nothing to gain from what they are divisible by.
NOT_SPECIALIZED = ["M", "row_blocks", "k_blocks"]


@triton.jit
def store_tile(value, y_ptr, bias_ptr, residual_ptr, offs_n, offs_m, M, N):
    """value fp32 `[rows, tokens]` + bias + residual -> y `[M, N]`, rounded once."""
    mask = (offs_n[:, None] < N) & (offs_m[None, :] < M)
    offset = offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    if bias_ptr is not None:
        value += tl.load(bias_ptr + offs_n, offs_n < N, 0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offset, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + offset, value.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def tile_of(M, BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, row_blocks):
    """Tokens `[BLOCK_M]`, rows `[16 ROW_BLOCKS]` and row blocks `[ROW_BLOCKS]` of this program. The tiles of the same
    rows run next to each other, so that the weight is read from memory once."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    offs_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * (ROW_BLOCKS * 16) + tl.arange(0, ROW_BLOCKS * 16)
    # Rows beyond the end are computed from the last block and not stored: no masks in the loop.
    row_block = tl.minimum(tile_n * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS), row_blocks - 1).to(tl.int64)
    return offs_m, offs_n, row_block


@triton.jit
def join_planes(planes):
    """A tuple of P planes `[W, rows, 32]` -> `[rows, W * P * 32]`, in the order of K and in the same threads."""
    P: tl.constexpr = len(planes)
    W: tl.constexpr = planes[0].shape[0]
    ROWS: tl.constexpr = planes[0].shape[1]
    if P == 1:
        joined = planes[0]
    elif P == 2:
        joined = tl.join(planes[0], planes[1])
    elif P == 4:
        joined = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    else:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
        joined = tl.join(even, odd)
    return tl.reshape(tl.permute(tl.reshape(joined, (W, ROWS, 32, P)), (1, 0, 3, 2)), (ROWS, W * P * 32))
