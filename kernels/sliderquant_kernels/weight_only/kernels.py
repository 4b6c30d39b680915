"""Triton kernels of the weight-only ops, all over the packed order of `fragments`.

Every matmul computes Y^T = W X^T: the weight is the left operand of the matrix instruction, which may stay in registers
once it is dequantized, and the tokens M become the instruction's small dimension. The kernels multiply the integers
q - z, which float16 and bfloat16 hold exactly, and apply the scale to the fp32 accumulator once per group: weights are
never rounded, and the error against exact arithmetic is that of fp32 accumulation and of the result's own rounding.
"""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiling import NOT_SPECIALIZED, join_planes, store_tile, tile_of
from .unpack import unpack_planes


@triton.jit
def _fragments(words, W: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    """Words `[W, ROW_BLOCKS, 512]` in stored order -> `[W, rows, 32]`; see `fragments`."""
    words = tl.reshape(words, (W, ROW_BLOCKS, 2, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(words, (0, 1, 6, 3, 2, 5, 4, 7)), (W, ROW_BLOCKS * 16, 32))


@triton.jit
def _load_words(weight_ptr, row_block, k_block, k_blocks, W: tl.constexpr, ROW_BLOCKS: tl.constexpr,
                BITS: tl.constexpr):  # fmt: skip
    """Blocks (row_block int64 `[ROW_BLOCKS]`, k_block `[W]`) -> words and, in the low 8 of 16 bits, the bytes beside
    them, uint16 `[W, rows, 32]`."""
    BYTES: tl.constexpr = 1536 if BITS == 3 else 1024
    inside = tl.arange(0, 512)[None, None, :]
    block = row_block[None, :, None] * (k_blocks * BYTES) + k_block[:, None, None] * BYTES
    word_ptrs = (weight_ptr + block).to(tl.pointer_type(tl.uint16)) + inside
    words = _fragments(tl.load(word_ptrs, eviction_policy="evict_first"), W, ROW_BLOCKS)
    beside = words
    if BITS == 3:
        # Two bytes at a time: a load of single bytes would make Triton choose another order of the operands. What the
        # upper 8 bits hold nobody reads.
        pair_ptrs = (weight_ptr + block + 1024).to(tl.pointer_type(tl.uint16)) + tl.arange(0, 256)[None, None, :]
        pairs = tl.load(pair_ptrs, eviction_policy="evict_first")
        beside = _fragments(tl.join(pairs, pairs >> 8), W, ROW_BLOCKS)
    return words, beside


@triton.jit
def _load_scales(scale_ptr, group, row_block, row_blocks, W: tl.constexpr, ROW_BLOCKS: tl.constexpr,
                 SYMMETRIC: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """Scales fp32 and biased zero-points of the groups `group` `[W]`, both `[W, rows]`; see `fragments`."""
    DTYPE: tl.constexpr = scale_ptr.dtype.element_ty
    if tl.float32 == DTYPE:
        row = row_block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        if SYMMETRIC:
            row = row_block[None, :, None] * 16 + (tl.arange(0, 16) % 8 * 2 + tl.arange(0, 16) // 8)[None, None, :]
            scale = tl.load(scale_ptr + group[:, None, None] * (row_blocks * 16) + row)
            zero = tl.full((W, ROW_BLOCKS, 16), ZERO, tl.float32).to(DTYPE)
        else:
            pair_ptrs = scale_ptr + (group[:, None, None] * (row_blocks * 16) + row) * 2
            scale, zero = tl.load(pair_ptrs), tl.load(pair_ptrs + 1)
        scale, zero = scale.reshape(W, ROW_BLOCKS * 16), zero.reshape(W, ROW_BLOCKS * 16)
    else:
        pairs_ptr = scale_ptr.to(tl.pointer_type(tl.uint32))
        if SYMMETRIC:
            # A pair is the scales of rows g and g + 8.
            inside = row_block[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
            pairs = tl.load(pairs_ptr + group[:, None, None] * (row_blocks * 8) + inside)
            low, high = pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)
            scale = tl.permute(tl.join(low, high), (0, 1, 3, 2)).reshape(W, ROW_BLOCKS * 16)
            scale = scale.to(DTYPE, bitcast=True)
            zero = tl.full((W, ROW_BLOCKS * 16), ZERO, tl.float32).to(DTYPE)
        else:
            inside = row_block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
            pairs = tl.load(pairs_ptr + group[:, None, None] * (row_blocks * 16) + inside)
            pairs = pairs.reshape(W, ROW_BLOCKS * 16)
            scale = pairs.to(tl.uint16).to(DTYPE, bitcast=True)
            zero = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return scale.to(tl.float32), zero


@triton.jit
def _finish(value, y_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr, offs_n, offs_m, M, N,
            SPLIT: tl.constexpr):  # fmt: skip
    """Store a tile. With SPLIT > 1 every program leaves its sum in `partial` `[SPLIT, M, N]` fp32, and the last one of
    a tile adds them up in the order of the splits: whichever that is, the result is the same. Its counter goes back
    to 0 for the next launch."""
    if SPLIT == 1:
        store_tile(value, y_ptr, bias_ptr, residual_ptr, offs_n, offs_m, M, N)
    else:
        mask = (offs_n[:, None] < N) & (offs_m[None, :] < M)
        size = M.to(tl.int64) * N
        offset = offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
        counter = counter_ptr + tl.program_id(0)
        tl.store(partial_ptr + tl.program_id(1) * size + offset, value, mask)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros_like(value)
            for split in tl.static_range(SPLIT):
                total += tl.load(partial_ptr + split * size + offset, mask, 0.0, cache_modifier=".cg")
            store_tile(total, y_ptr, bias_ptr, residual_ptr, offs_n, offs_m, M, N)
            tl.store(counter, 0)


@triton.jit
def _load_groups(scale_ptr, block, row_block, row_blocks, W: tl.constexpr, ROW_BLOCKS: tl.constexpr,
                 GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, SYMMETRIC: tl.constexpr,
                 ZERO: tl.constexpr):  # fmt: skip
    """Scales and zero-points of every group in the blocks `block` `[W]`: two tuples of `[W, rows]`."""
    scales, zeros = (), ()
    if GROUP_SIZE >= BLOCK_K:
        scale, zero = _load_scales(scale_ptr, block // (GROUP_SIZE // BLOCK_K), row_block, row_blocks, W, ROW_BLOCKS,
                                   SYMMETRIC, ZERO)  # fmt: skip
        scales, zeros = (scale,), (zero[:, :, None],)
    else:
        for i in tl.static_range(BLOCK_K // GROUP_SIZE):
            scale, zero = _load_scales(scale_ptr, block * (BLOCK_K // GROUP_SIZE) + i, row_block, row_blocks, W,
                                       ROW_BLOCKS, SYMMETRIC, ZERO)  # fmt: skip
            scales, zeros = scales + (scale,), zeros + (zero[:, :, None],)
    return scales, zeros


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def warp_k_kernel(x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, partial_ptr, counter_ptr,
                  M, N, K, row_blocks, k_blocks,
                  BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO_BIAS: tl.constexpr,
                  K_EDGE: tl.constexpr, BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, W: tl.constexpr,
                  SPLIT: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, BF16: tl.constexpr,
                  ARCH: tl.constexpr):  # fmt: skip
    """y `[M, N]` = x `[M, K]` @ ((codes - zero) * scale)^T for few tokens. Grid (tiles of N and M, SPLIT).

    Each of the W warps owns all rows of the tile and its own blocks along K, by a dot whose batch dimension lies
    across the warps: no fragment of x is loaded twice, and the sum over K is split without leaving the program.

    K_EDGE: 0 when W * SPLIT divides the blocks along K and these divide K; 1 when only the latter; 2 when the planes of
    32 inputs divide K, so that each of them is inside or outside as a whole; 3 otherwise.
    GROUP_SIZE 0 means per channel. `unpack` has ARCH, `fragments` ZERO_BIAS and the shapes.
    """
    PLANES: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    BLOCK_K: tl.constexpr = 32 * PLANES
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    ZERO: tl.constexpr = ZERO_BIAS + 2 ** (BITS - 1)
    offs_m, offs_n, row_block = tile_of(M, BLOCK_M, ROW_BLOCKS, row_blocks)
    warp = tl.arange(0, W)
    x_rows = x_ptr + offs_m[None, None, :].to(tl.int64) * K
    inside = tl.arange(0, 32)[None, :, None]
    # Tokens beyond the end are not loaded: they would cost as much of the L2 cache's bandwidth as the weights.
    mask_m = offs_m[None, None, :] < M
    steps = tl.cdiv(k_blocks, W * SPLIT)
    first = tl.program_id(1) * steps * W
    acc = tl.zeros((W, ROWS, BLOCK_M), tl.float32)
    if GROUP_SIZE == 0:
        scale, zero = _load_scales(scale_ptr, warp * 0, row_block, row_blocks, W, ROW_BLOCKS, SYMMETRIC, ZERO)
    for step in tl.range(0, steps, num_stages=STAGES):
        k_block = first + step * W + warp
        block = k_block if K_EDGE == 0 else tl.minimum(k_block, k_blocks - 1)
        words, beside = _load_words(weight_ptr, row_block, block, k_blocks, W, ROW_BLOCKS, BITS)
        if GROUP_SIZE == 0:
            scales, zeros = (scale,), (zero[:, :, None],)
        else:
            scales, zeros = _load_groups(scale_ptr, block, row_block, row_blocks, W, ROW_BLOCKS, GROUP_SIZE, BLOCK_K,
                                         SYMMETRIC, ZERO)  # fmt: skip
        planes = unpack_planes(words, beside, zeros, BITS, SYMMETRIC, OPERAND, BF16, ZERO_BIAS, ARCH)
        GROUPS: tl.constexpr = len(scales)
        SHARE: tl.constexpr = PLANES // GROUPS
        for group in tl.static_range(GROUPS):
            part = acc if GROUP_SIZE == 0 else tl.zeros((W, ROWS, BLOCK_M), tl.float32)
            for i in tl.static_range(SHARE):
                offs_k = k_block[:, None, None] * BLOCK_K + (group * SHARE + i) * 32 + inside
                mask = mask_m
                if K_EDGE == 1:
                    mask = mask_m & (k_block[:, None, None] < k_blocks)
                elif K_EDGE == 2:
                    mask = mask_m & (k_block[:, None, None] * BLOCK_K + (group * SHARE + i) * 32 < K)
                elif K_EDGE == 3:
                    mask = mask_m & (offs_k < K)
                x = tl.load(x_rows + offs_k, mask, 0.0).to(OPERAND)
                part = tl.dot(planes[group * SHARE + i], x, part, input_precision="ieee")
            if GROUP_SIZE == 0:
                acc = part
            else:
                acc += part * scales[group][:, :, None]
    if GROUP_SIZE == 0:
        acc *= scale[:, :, None]
    _finish(tl.sum(acc, 0), y_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr, offs_n, offs_m, M, N, SPLIT)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rows_kernel(x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, partial_ptr, counter_ptr,
                M, N, K, row_blocks, k_blocks,
                BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO_BIAS: tl.constexpr,
                K_EDGE: tl.constexpr, BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr,
                JOINED: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
                BF16: tl.constexpr, ARCH: tl.constexpr):  # fmt: skip
    """As `warp_k_kernel`, for more tokens: the warps lie side by side along N, and all walk the same blocks of K.

    JOINED: planes of a group that are one left operand, if there are so many. On sm_90 the matrix instruction is that
    of a warp group, which has to end before the registers of its weight are written again: the more inputs, the fewer
    waits. A warp's own instruction takes fewer registers of x with one plane.
    """
    PLANES: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    BLOCK_K: tl.constexpr = 32 * PLANES
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    ZERO: tl.constexpr = ZERO_BIAS + 2 ** (BITS - 1)
    offs_m, offs_n, row_block = tile_of(M, BLOCK_M, ROW_BLOCKS, row_blocks)
    # Tokens beyond the end are computed from the last one and not stored.
    x_rows = x_ptr + tl.minimum(offs_m, M - 1)[None, :].to(tl.int64) * K
    steps = tl.cdiv(k_blocks, SPLIT)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, k_blocks)
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
    if GROUP_SIZE == 0:
        scale, zero = _load_scales(scale_ptr, tl.arange(0, 1), row_block, row_blocks, 1, ROW_BLOCKS, SYMMETRIC, ZERO)
    for k_block in tl.range(first, last, num_stages=STAGES):
        block = k_block + tl.arange(0, 1)
        words, beside = _load_words(weight_ptr, row_block, block, k_blocks, 1, ROW_BLOCKS, BITS)
        if GROUP_SIZE == 0:
            scales, zeros = (scale,), (zero[:, :, None],)
        else:
            scales, zeros = _load_groups(scale_ptr, block, row_block, row_blocks, 1, ROW_BLOCKS, GROUP_SIZE, BLOCK_K,
                                         SYMMETRIC, ZERO)  # fmt: skip
        planes = unpack_planes(words, beside, zeros, BITS, SYMMETRIC, OPERAND, BF16, ZERO_BIAS, ARCH)
        GROUPS: tl.constexpr = len(scales)
        SHARE: tl.constexpr = PLANES // GROUPS
        SPAN: tl.constexpr = JOINED if JOINED < SHARE else SHARE
        for group in tl.static_range(GROUPS):
            part = acc if GROUP_SIZE == 0 else tl.zeros((ROWS, BLOCK_M), tl.float32)
            for i in tl.static_range(0, SHARE, SPAN):
                offs_k = k_block * BLOCK_K + (group * SHARE + i) * 32 + tl.arange(0, SPAN * 32)[:, None]
                if K_EDGE >= 2:
                    x = tl.load(x_rows + offs_k, (offs_k < K) & (offs_m[None, :] >= 0), 0.0).to(OPERAND)
                else:
                    x = tl.load(x_rows + offs_k).to(OPERAND)
                beside_each_other = ()
                for plane in tl.static_range(SPAN):
                    beside_each_other = beside_each_other + (planes[group * SHARE + i + plane],)
                part = tl.dot(join_planes(beside_each_other), x, part, input_precision="ieee")
            if GROUP_SIZE == 0:
                acc = part
            else:
                acc += part * tl.reshape(scales[group], (ROWS, 1))
    if GROUP_SIZE == 0:
        acc *= tl.reshape(scale, (ROWS, 1))
    _finish(acc, y_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr, offs_n, offs_m, M, N, SPLIT)


@triton.jit(do_not_specialize=NOT_SPECIALIZED[1:])
def dequantize_kernel(weight_ptr, scale_ptr, out_ptr, N, K, row_blocks, k_blocks,
                      BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO_BIAS: tl.constexpr,
                      W: tl.constexpr, ROW_BLOCKS: tl.constexpr):  # fmt: skip
    """out `[N, K]` = (codes - zero) * scale, rounded once. Grid: tiles of N and of W blocks of K."""
    PLANES: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    BLOCK_K: tl.constexpr = 32 * PLANES
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    ZERO: tl.constexpr = ZERO_BIAS + 2 ** (BITS - 1)
    k_tiles = tl.cdiv(k_blocks, W)
    tile_n = tl.program_id(0) // k_tiles
    offs_n = tile_n * ROWS + tl.arange(0, ROWS)
    row_block = tl.minimum(tile_n * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS), row_blocks - 1).to(tl.int64)
    k_block = (tl.program_id(0) % k_tiles) * W + tl.arange(0, W)
    block = tl.minimum(k_block, k_blocks - 1)
    words, beside = _load_words(weight_ptr, row_block, block, k_blocks, W, ROW_BLOCKS, BITS)
    if GROUP_SIZE == 0:
        scale, zero = _load_scales(scale_ptr, block * 0, row_block, row_blocks, W, ROW_BLOCKS, SYMMETRIC, ZERO)
        scales, zeros = (scale,), (zero[:, :, None],)
    else:
        scales, zeros = _load_groups(scale_ptr, block, row_block, row_blocks, W, ROW_BLOCKS, GROUP_SIZE, BLOCK_K,
                                     SYMMETRIC, ZERO)  # fmt: skip
    planes = unpack_planes(words, beside, zeros, BITS, SYMMETRIC, tl.float32, False, ZERO_BIAS, 0)
    SHARE: tl.constexpr = PLANES // len(scales)
    values = ()
    for i in tl.static_range(PLANES):
        values = values + ((planes[i] * scales[i // SHARE][:, :, None]).to(out_ptr.dtype.element_ty),)
    out = join_planes(values)  # whole lines of the output are written at once
    offs_k = (tl.program_id(0) % k_tiles) * (W * BLOCK_K) + tl.arange(0, W * BLOCK_K)
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    tl.store(out_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :], out, mask)
