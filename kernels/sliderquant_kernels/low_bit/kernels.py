"""Triton kernels of low-bit linears: int8 activations times 2, 4 or 8-bit weights on the int8 matrix units.

    y[m, n] = s_x[m] s_w[n] sum_k (q_x - z_x)(q_w - z_w)
            = s_x s_w (sum_k q_x q_w - z_w sum_k q_x - z_x (sum_k q_w - K z_w))

The first sum is what the matrix units do, exactly in int32; the second comes with the activations, the third with the
weight. In groups, z_w is subtracted before the product (4 codes at a time in a register) and every group's int32 sum is
converted and scaled: about two instructions per output and group, which eats much of the gain.
"""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiling import NOT_SPECIALIZED, join_planes, store_tile, tile_of


def plane_ptx(bits: int, i: int, subtract: bool) -> str:
    """PTX from a register of four stored bytes ($1) to one of four codes ($0), less the zero-points in $2."""
    mask = (2**bits - 1) * 0x01010101
    shifted = f".reg .b32 t; shr.u32 t, $1, {bits * i};"
    if not subtract:
        return f"{{ {shifted} and.b32 $0, t, 0x{mask:08X}; }}"
    # (q | 128) - z takes nothing from its neighbour, since q < 128 and z < 128; the 128 goes again.
    return (
        f"{{ {shifted} lop3.b32 t, t, 0x{mask:08X}, 0x80808080, 0xEA; sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }}"
    )


_PTX: tl.constexpr = tl.constexpr(
    {
        1000 * subtract + 10 * bits + i: plane_ptx(bits, i, subtract)
        for bits in (2, 4)
        for i in range(8 // bits)
        for subtract in (False, True)
    }
)


@triton.jit
def _load_bytes(weight_ptr, row_block, k_block, k_blocks, W: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    """Blocks (row_block int64 `[ROW_BLOCKS]`, k_block `[W]`) -> bytes `[W, rows, 32]`; see `fragments`."""
    block = row_block[None, :, None] * (k_blocks * 512) + k_block[:, None, None] * 512
    stored = tl.load(weight_ptr + block + tl.arange(0, 512)[None, None, :], eviction_policy="evict_first")
    stored = tl.reshape(stored, (W, ROW_BLOCKS, 8, 4, 2, 2, 4))
    return tl.reshape(tl.permute(stored, (0, 1, 5, 2, 4, 3, 6)), (W, ROW_BLOCKS * 16, 32))


@triton.jit
def _plane(stored, zero, i: tl.constexpr, BITS: tl.constexpr, SUBTRACT: tl.constexpr, ASM: tl.constexpr):
    """Plane i of the stored bytes as int8; with SUBTRACT less `zero`, uint8 and broadcastable."""
    if BITS == 8:
        out = stored.to(tl.int8, bitcast=True)
    elif not ASM:
        code = (stored.to(tl.int32) >> (BITS * i)) & (2**BITS - 1)
        if SUBTRACT:
            code -= zero.to(tl.int32)
        out = code.to(tl.int8)
    elif SUBTRACT:
        out = tl.inline_asm_elementwise(_PTX[1000 + 10 * BITS + i], "=r,r,r", [stored, zero], tl.int8, True, 4)
    else:
        out = tl.inline_asm_elementwise(_PTX[10 * BITS + i], "=r,r", [stored], tl.int8, True, 4)
    return out


@triton.jit
def _joined(stored, BITS: tl.constexpr, ASM: tl.constexpr):
    """Stored bytes `[W, rows, 32]` -> codes of W consecutive blocks, int8 `[rows, inputs]`, in the same threads."""
    planes = ()
    for i in tl.static_range(8 // BITS):
        planes = planes + (_plane(stored, stored, i, BITS, False, ASM),)
    return join_planes(planes)


@triton.jit
def _scaled(acc, x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, offs_n, offs_m, M, NP, groups,
            GROUPED: tl.constexpr):  # fmt: skip
    """The sum over K (int32, or fp32 with GROUPED) -> y fp32 `[rows, tokens]`, by the formula at the top."""
    last = tl.load(constant_ptr + groups * NP + offs_n, offs_n < NP, 0)
    mask_m = offs_m < M
    x_scale = tl.load(x_scale_ptr + offs_m, mask_m, 0.0)[None, :]
    if GROUPED:
        y = acc
        if x_zero_ptr is not None:
            x_zero = tl.load(x_zero_ptr + offs_m, mask_m, 0).to(tl.float32)
            y -= last.to(tl.float32, bitcast=True)[:, None] * x_zero[None, :]
        y = y * x_scale
    else:
        x_sum = tl.load(x_sum_ptr + offs_m, mask_m, 0)
        zero = tl.load(constant_ptr + offs_n, offs_n < NP, 0)
        total = acc - zero[:, None] * x_sum[None, :]
        if x_zero_ptr is not None:
            total -= last[:, None] * tl.load(x_zero_ptr + offs_m, mask_m, 0)[None, :]
        scale = tl.load(scale_ptr + offs_n, offs_n < NP, 0.0)
        y = total.to(tl.float32) * (scale[:, None] * x_scale)
    return y


@triton.jit
def _halves(tile):
    """`[rows, tokens]` -> its left and its right half; every thread has its own of both."""
    ROWS: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, WIDTH)), (0, 2, 1)))
    return left, right


@triton.jit
def _store_in_parts(acc, x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, bias_ptr, residual_ptr, y_ptr,
                    offs_n, first_m, M, N, NP, groups, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """`_scaled` and `store_tile` of 16 or 32 tokens at a time: with the scales, zero-points, sums and addresses of 128
    tokens a program takes the registers of two, and then nothing runs on a multiprocessor while it waits for products.
    In groups, where tiles have 64 tokens, the main loop needs the registers anyway."""
    HALVINGS: tl.constexpr = 0 if GROUPED or BLOCK_M < 64 else 1 if BLOCK_M == 64 else 3
    WIDTH: tl.constexpr = BLOCK_M // 2**HALVINGS
    parts = (acc,)
    for level in tl.static_range(HALVINGS):
        halved = ()
        for i in tl.static_range(2**level):
            halved = halved + _halves(parts[i])
        parts = halved
    for i in tl.static_range(2**HALVINGS):
        offs_m = first_m + i * WIDTH + tl.arange(0, WIDTH)
        y = _scaled(parts[i], x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, offs_n, offs_m, M, NP,
                    groups, GROUPED)  # fmt: skip
        store_tile(y, y_ptr, bias_ptr, residual_ptr, offs_n, offs_m, M, N)


@triton.jit
def _group_zero(constant_ptr, group, row_block, NP, W: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    """Zero-points of the groups `group` `[W]`: uint8 `[W, rows, 1]`."""
    row = row_block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    zero = tl.load(constant_ptr + group[:, None, None] * NP + row)
    return tl.reshape(zero, (W, ROW_BLOCKS * 16)).to(tl.uint8)[:, :, None]


@triton.jit
def _group_scale(scale_ptr, group, row_block, NP, W: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    """Scales of the groups `group` `[W]`: fp32 `[W, rows]`."""
    row = row_block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    return tl.reshape(tl.load(scale_ptr + group[:, None, None] * NP + row), (W, ROW_BLOCKS * 16))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def low_bit_warp_k_kernel(x_ptr, x_scale_ptr, x_zero_ptr, x_sum_ptr, weight_ptr, scale_ptr, constant_ptr, bias_ptr,
                          residual_ptr, y_ptr, M, N, K, row_blocks, k_blocks, groups,
                          BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, K_EDGE: tl.constexpr,
                          BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
                          ASM: tl.constexpr):  # fmt: skip
    """y `[M, N]` for few tokens: every warp owns the rows of the tile and its own blocks along K. Grid (tiles).

    x_ptr int8 `[M, K]`; x_scale fp32, x_zero and x_sum int32 `[M]`; GROUP_SIZE 0 means per channel. K_EDGE: 0 when W
    divides the blocks along K and these divide K; 1 when only the latter; 2 otherwise.
    """
    PLANES: tl.constexpr = 8 // BITS
    BLOCK_K: tl.constexpr = 32 * PLANES
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    GROUPED: tl.constexpr = GROUP_SIZE != 0
    offs_m, offs_n, row_block = tile_of(M, BLOCK_M, ROW_BLOCKS, row_blocks)
    NP = row_blocks * 16
    warp = tl.arange(0, W)
    x_rows = x_ptr + offs_m[None, None, :].to(tl.int64) * K
    inside = tl.arange(0, 32)[None, :, None]
    mask_m = offs_m[None, None, :] < M
    acc = tl.zeros((W, ROWS, BLOCK_M), tl.float32 if GROUPED else tl.int32)
    for step in tl.range(0, tl.cdiv(k_blocks, W), num_stages=STAGES):
        k_block = step * W + warp
        block = k_block if K_EDGE == 0 else tl.minimum(k_block, k_blocks - 1)
        stored = _load_bytes(weight_ptr, row_block, block, k_blocks, W, ROW_BLOCKS)
        zero = stored
        for i in tl.static_range(PLANES):
            offs_k = k_block[:, None, None] * BLOCK_K + i * 32 + inside
            mask = mask_m
            if K_EDGE == 1:
                mask = mask_m & (k_block[:, None, None] < k_blocks)
            elif K_EDGE == 2:
                mask = mask_m & (offs_k < K)
            x = tl.load(x_rows + offs_k, mask, 0)
            if GROUPED:
                group = (block * BLOCK_K + i * 32) // GROUP_SIZE
                if i == 0 or i * 32 % GROUP_SIZE == 0:
                    part = tl.zeros((W, ROWS, BLOCK_M), tl.int32)
                    if not SYMMETRIC or BITS != 8:
                        zero = _group_zero(constant_ptr, group, row_block, NP, W, ROW_BLOCKS)
                plane = _plane(stored, zero, i, BITS, True, ASM)
                part = tl.dot(plane, x, part, out_dtype=tl.int32)
                if i == PLANES - 1 or (i + 1) * 32 % GROUP_SIZE == 0:
                    scale = _group_scale(scale_ptr, group, row_block, NP, W, ROW_BLOCKS)
                    acc += part.to(tl.float32) * scale[:, :, None]
            else:
                acc = tl.dot(_plane(stored, zero, i, BITS, False, ASM), x, acc, out_dtype=tl.int32)
    y = _scaled(tl.sum(acc, 0), x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, offs_n, offs_m, M, NP,
                groups, GROUPED)  # fmt: skip
    store_tile(y, y_ptr, bias_ptr, residual_ptr, offs_n, offs_m, M, N)


@triton.jit
def _sum_of_planes(acc, x_rows, weight_ptr, scale_ptr, constant_ptr, offs_m, row_block, K, NP, k_blocks,
                   BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, K_EDGE: tl.constexpr,
                   ROW_BLOCKS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """The sum over K of `low_bit_rows_kernel`, plane by plane."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCK_K: tl.constexpr = 32 * PLANES
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    GROUPED: tl.constexpr = GROUP_SIZE != 0
    inside = tl.arange(0, 32)[:, None]
    for k_block in tl.range(0, k_blocks, num_stages=STAGES):
        block = k_block + tl.arange(0, 1)
        stored = _load_bytes(weight_ptr, row_block, block, k_blocks, 1, ROW_BLOCKS)
        zero = stored
        for i in tl.static_range(PLANES):
            offs_k = k_block * BLOCK_K + i * 32 + inside
            if K_EDGE == 2:
                x = tl.load(x_rows + offs_k, (offs_k < K) & (offs_m[None, :] >= 0), 0)
            else:
                x = tl.load(x_rows + offs_k)
            if GROUPED:
                group = (block * BLOCK_K + i * 32) // GROUP_SIZE
                if i == 0 or i * 32 % GROUP_SIZE == 0:
                    part = tl.zeros((ROWS, acc.shape[1]), tl.int32)
                    if not SYMMETRIC or BITS != 8:
                        zero = _group_zero(constant_ptr, group, row_block, NP, 1, ROW_BLOCKS)
                plane = tl.reshape(_plane(stored, zero, i, BITS, True, ASM), (ROWS, 32))
                part = tl.dot(plane, x, part, out_dtype=tl.int32)
                if i == PLANES - 1 or (i + 1) * 32 % GROUP_SIZE == 0:
                    scale = _group_scale(scale_ptr, group, row_block, NP, 1, ROW_BLOCKS)
                    acc += part.to(tl.float32) * tl.reshape(scale, (ROWS, 1))
            else:
                plane = tl.reshape(_plane(stored, zero, i, BITS, False, ASM), (ROWS, 32))
                acc = tl.dot(plane, x, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def low_bit_rows_kernel(x_ptr, x_scale_ptr, x_zero_ptr, x_sum_ptr, weight_ptr, scale_ptr, constant_ptr, bias_ptr,
                        residual_ptr, y_ptr, M, N, K, row_blocks, k_blocks, groups,
                        BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, K_EDGE: tl.constexpr,
                        BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, JOINED: tl.constexpr, STAGES: tl.constexpr,
                        ASM: tl.constexpr):  # fmt: skip
    """As `low_bit_warp_k_kernel`, for more tokens: the warps lie side by side along N.

    JOINED: blocks along K whose codes are one left operand, per channel; 0: every plane of a block is one. A warp-group
    instruction that takes it from registers has to end before these are written again: one wait in a step, not one for
    every 32 inputs. Where a warp multiplies, the planes' columns of x come in fewer instructions. K_EDGE with JOINED: 0
    where the blocks of a step divide K, else 2.
    """
    BLOCK_K: tl.constexpr = 32 * (8 // BITS)
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    GROUPED: tl.constexpr = GROUP_SIZE != 0
    offs_m, offs_n, row_block = tile_of(M, BLOCK_M, ROW_BLOCKS, row_blocks)
    NP = row_blocks * 16
    x_rows = x_ptr + tl.minimum(offs_m, M - 1)[None, :].to(tl.int64) * K
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32 if GROUPED else tl.int32)
    if JOINED:
        STEP: tl.constexpr = JOINED * BLOCK_K
        within = tl.arange(0, STEP)[:, None]
        for step in tl.range(0, tl.cdiv(k_blocks, JOINED), num_stages=STAGES):
            block = step * JOINED + tl.arange(0, JOINED)
            if K_EDGE == 2:
                block = tl.minimum(block, k_blocks - 1)
                x = tl.load(x_rows + step * STEP + within, (within < K - step * STEP) & (offs_m[None, :] >= 0), 0)
            else:
                x = tl.load(x_rows + step * STEP + within)
            stored = _load_bytes(weight_ptr, row_block, block, k_blocks, JOINED, ROW_BLOCKS)
            acc = tl.dot(_joined(stored, BITS, ASM), x, acc, out_dtype=tl.int32)
    else:
        acc = _sum_of_planes(acc, x_rows, weight_ptr, scale_ptr, constant_ptr, offs_m, row_block, K, NP, k_blocks,
                             BITS, GROUP_SIZE, SYMMETRIC, K_EDGE, ROW_BLOCKS, STAGES, ASM)  # fmt: skip
    first_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M  # as in `tile_of`
    _store_in_parts(acc, x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, bias_ptr, residual_ptr, y_ptr,
                    offs_n, first_m, M, N, NP, groups, GROUPED, BLOCK_M)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def int8_tiles_kernel(x_ptr, x_scale_ptr, x_zero_ptr, x_sum_ptr, weight_ptr, scale_ptr, constant_ptr, bias_ptr,
                      residual_ptr, y_ptr, M, N, K, NP, EVEN_K: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
                      STAGES: tl.constexpr):  # fmt: skip
    """As `low_bit_rows_kernel`, per channel, for many tokens: weight_ptr int8 `[N, K]`, expanded once by
    `expand_kernel`. Both operands go from shared memory to the matrix units: the loop is loads and products only.

    Tiles run in bands of BAND tiles of tokens, so that what a wave of programs reads stays in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * tiles_n)
    offs_m = (band * BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + tl.minimum(offs_n, N - 1)[:, None].to(tl.int64) * K + offs_k[None, :]
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1)[None, :].to(tl.int64) * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w, x = tl.load(w_ptrs + k), tl.load(x_ptrs + k)
        else:
            w = tl.load(w_ptrs + k, (offs_k[None, :] < K - k) & (offs_n[:, None] >= 0), 0)
            x = tl.load(x_ptrs + k, (offs_k[:, None] < K - k) & (offs_m[None, :] >= 0), 0)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    first_m = (band * BAND + within % height) * BLOCK_M
    _store_in_parts(acc, x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, constant_ptr, bias_ptr, residual_ptr, y_ptr,
                    offs_n, first_m, M, N, NP, 1, False, BLOCK_M)  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED[1:])
def expand_kernel(weight_ptr, out_ptr, N, K, row_blocks, k_blocks, BITS: tl.constexpr, W: tl.constexpr,
                  ROW_BLOCKS: tl.constexpr):  # fmt: skip
    """Packed codes -> int8 `[N, K]`, as they are stored. Grid: tiles of N and of W blocks of K."""
    BLOCK_K: tl.constexpr = 32 * (8 // BITS)
    ROWS: tl.constexpr = ROW_BLOCKS * 16
    k_tiles = tl.cdiv(k_blocks, W)
    tile_n = tl.program_id(0) // k_tiles
    offs_n = tile_n * ROWS + tl.arange(0, ROWS)
    row_block = tl.minimum(tile_n * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS), row_blocks - 1).to(tl.int64)
    k_block = (tl.program_id(0) % k_tiles) * W + tl.arange(0, W)
    stored = _load_bytes(weight_ptr, row_block, tl.minimum(k_block, k_blocks - 1), k_blocks, W, ROW_BLOCKS)
    out = _joined(stored, BITS, False)
    offs_k = (tl.program_id(0) % k_tiles) * (W * BLOCK_K) + tl.arange(0, W * BLOCK_K)
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    tl.store(out_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :], out, mask)
