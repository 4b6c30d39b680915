"""Triton kernels of the Hadamard rotation, alone or with per-token quantization: one read of a row, one write.

A row of n = A Q B values is a tensor X `[A, Q, B]`, and H_n = H_A (x) S_Q (x) H_B acts on its three axes. H_A
multiplies from the left and H_B from the right, by matrix instructions whose other operand is +-1; S_Q, the Sylvester
matrix, is log2 Q steps of sums and differences between Q separate tiles, which move nothing between threads. What the
first product leaves in registers is the left operand of the second, so that a row goes through shared memory once.

fp16 and bf16 values are multiplied as they are, exactly. fp32 values, and the first product's fp32 results, are split
into bf16 parts whose sum they are: two for 16-bit rows (to 2^-16), three for fp32 (exactly, but for the last bit). So
that the error is that of fp32 accumulation, and one rounding of the result.
"""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

# Added to an fp32 number below 2^22 it leaves the number's nearest integer, half to even, in the lowest mantissa bits.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
_ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def load_values(x_ptr, gate_ptr, sign_ptr, offsets, sign_offsets, mask, EVEN: tl.constexpr, VALUES: tl.constexpr):
    """x, or silu(gate) * x rounded as Llama's MLP rounds it, times the signs, as VALUES; 0 where the mask is not set.

    VALUES is x's dtype, or fp32 in the interpreter, which cannot multiply bf16.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if EVEN:
        x = tl.load(x_ptr + offsets)
    else:
        x = tl.load(x_ptr + offsets, mask, 0.0)
    if gate_ptr is not None:
        if EVEN:
            gate = tl.load(gate_ptr + offsets).to(tl.float32)
        else:
            gate = tl.load(gate_ptr + offsets, mask, 0.0).to(tl.float32)
        # The reciprocal as a squared root's: two instructions, and right to 22 bits of which 11 are kept.
        root = tl.rsqrt(1.0 + tl.exp(-gate))
        silu = (gate * (root * root)).to(DTYPE).to(tl.float32)
        x = (silu * x.to(tl.float32)).to(DTYPE)
    x = x.to(VALUES)
    if sign_ptr is not None:
        if EVEN:
            x = x * tl.load(sign_ptr + sign_offsets).to(VALUES)
        else:
            x = x * tl.load(sign_ptr + sign_offsets, mask, 0.0).to(VALUES)
    return x


@triton.jit
def store_values(y_ptr, sign_ptr, offsets, sign_offsets, mask, values, EVEN: tl.constexpr):
    """values, times the signs, in y's dtype where the mask is set."""
    if EVEN:
        if sign_ptr is not None:
            values = values * tl.load(sign_ptr + sign_offsets).to(tl.float32)
        tl.store(y_ptr + offsets, values.to(y_ptr.dtype.element_ty))
    else:
        if sign_ptr is not None:
            values = values * tl.load(sign_ptr + sign_offsets, mask, 0.0).to(tl.float32)
        tl.store(y_ptr + offsets, values.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def split_values(x, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """fp32 -> PARTS tensors of OPERAND (bf16) whose sum it is, to 8 bits for each of them."""
    parts = ()
    for _ in tl.static_range(PARTS - 1):
        # Truncated, not rounded: one instruction.
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        parts = parts + (high.to(OPERAND),)
        x = x - high
    return parts + (x.to(OPERAND),)


@triton.jit
def _first(a, b):
    return a


@triton.jit
def pinned(x):
    """x. Between threads it is exchanged as it is: without this, Triton moves the arithmetic that made it behind the
    exchange, where every warp does all of it again for its copy of a product's right operand."""
    return tl.reduce(x[:, None, :], 1, _first)


@triton.jit
def operand_parts(x, PARTS: tl.constexpr, OPERAND: tl.constexpr, PINNED: tl.constexpr):
    """What a product takes for x: x itself as OPERAND, or its parts."""
    if PARTS == 1:
        parts = (x.to(OPERAND),)
    else:
        parts = split_values(x, PARTS, OPERAND)
    if PINNED:
        out = ()
        for i in tl.static_range(PARTS):
            out = out + (pinned(parts[i]),)
        parts = out
    return parts


@triton.jit
def multiply_right(x, right, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """x fp32 `[a, B]` times right `[B, B]` -> fp32."""
    parts = split_values(x, PARTS, OPERAND)
    out = tl.dot(parts[0], right)
    for i in tl.static_range(1, PARTS):
        out = tl.dot(parts[i], right, out)
    return out


@triton.jit
def butterflies(tiles, Q: tl.constexpr, PIECES: tl.constexpr):
    """The Sylvester matrix of order Q over the tiles; tile j PIECES + i is piece i of j."""
    for step in tl.static_range(6):
        if (1 << step) < Q:
            new = ()
            for i in tl.static_range(Q * PIECES):
                if (i // PIECES) & (1 << step):
                    new = new + (tiles[i - (PIECES << step)] - tiles[i],)
                else:
                    new = new + (tiles[i] + tiles[i + (PIECES << step)],)
            tiles = new
    return tiles


@triton.jit
def load_left(left_ptr, STARTS: tl.constexpr, SIZES: tl.constexpr, AGAIN: tl.constexpr):
    """The blocks `[SIZES[i], SIZES[-1]]` of left, row by row. AGAIN: not what was loaded before, but from memory."""
    LAST: tl.constexpr = len(SIZES) - 1
    STEP: tl.constexpr = SIZES[LAST]
    PADDED_A: tl.constexpr = STARTS[LAST] + STEP
    blocks = ()
    for i in tl.static_range(len(SIZES)):
        for k in tl.static_range(PADDED_A // STEP):
            rows = STARTS[i] + tl.arange(0, SIZES[i])
            columns = k * STEP + tl.arange(0, STEP)
            blocks = blocks + (tl.load(left_ptr + rows[:, None] * PADDED_A + columns[None, :], volatile=AGAIN),)
    return blocks


@triton.jit
def place(START: tl.constexpr, SIZE: tl.constexpr, j: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
          PADDED_B: tl.constexpr):  # fmt: skip
    """Offsets in a row of the elements (a, j, b), SIZE of a from START on, and which of them there are."""
    a = START + tl.arange(0, SIZE)[:, None]
    b = tl.arange(0, PADDED_B)[None, :]
    return a * (Q * B) + j * B + b, (a < A) & (b < B)


@triton.jit
def rotated_row(x_ptr, gate_ptr, sign_ptr, left, left_ptr, right, A: tl.constexpr, STARTS: tl.constexpr,
                SIZES: tl.constexpr, Q: tl.constexpr, B: tl.constexpr, PADDED_B: tl.constexpr, X_PARTS: tl.constexpr,
                PARTS: tl.constexpr, VALUES: tl.constexpr, X_OPERAND: tl.constexpr, OPERAND: tl.constexpr,
                PINNED: tl.constexpr):  # fmt: skip
    """The row at x_ptr, rotated but not scaled by n^-1/2: a tuple of Q len(SIZES) tiles, fp32 `[SIZES[i], PADDED_B]`.

    Tile j len(SIZES) + i holds the elements (a, j, b) with a from STARTS[i] on: see `place`. Beyond A and B they are 0.

    Args:
        gate_ptr, sign_ptr: see `load_values`; None: without.
        left: of `load_left`, of X_OPERAND. left_ptr: None, or where to fetch it from again for every tile, so that a
            large one need not stay in shared memory.
        right: H_B transposed, of OPERAND, `[PADDED_B, PADDED_B]` with zeros beyond B.
        SIZES: powers of two from 16 on, multiples of the last, whose sum is A padded; STARTS: where they start.
        X_PARTS, PARTS: see `split_values`, of x and of the first product.
        PINNED: whether products take their right operand from registers; see `pinned`.
    """
    PIECES: tl.constexpr = len(SIZES)
    STEP: tl.constexpr = SIZES[PIECES - 1]
    STEPS: tl.constexpr = (STARTS[PIECES - 1] + STEP) // STEP
    tiles = ()
    for j in tl.static_range(Q):
        if left_ptr is not None:
            left = load_left(left_ptr, STARTS, SIZES, True)
        x = ()
        for k in tl.static_range(STEPS):
            offsets, mask = place(k * STEP, STEP, j, A, Q, B, PADDED_B)
            even = (k + 1) * STEP <= A and B == PADDED_B
            values = load_values(x_ptr, gate_ptr, sign_ptr, offsets, offsets, mask, even, VALUES)
            changed = X_PARTS > 1 or gate_ptr is not None or sign_ptr is not None
            x = x + (operand_parts(values, X_PARTS, X_OPERAND, PINNED and changed),)
        for i in tl.static_range(PIECES):
            product = tl.dot(left[i * STEPS], x[0][0])
            for k in tl.static_range(STEPS):
                for part in tl.static_range(X_PARTS):
                    if k + part > 0:
                        product = tl.dot(left[i * STEPS + k], x[k][part], product)
            tiles = tiles + (multiply_right(product, right, PARTS, OPERAND),)
    return butterflies(tiles, Q, PIECES)


@triton.jit
def largest(tiles, COUNT: tl.constexpr, PIECES: tl.constexpr):
    """The largest value of all tiles. Each is reduced in one step: axis by axis Triton 3.6 does not compile what
    tcgen05 has made."""
    out = -float("inf")
    for i in tl.static_range(PIECES):
        tile = tiles[i]
        for j in tl.static_range(PIECES + i, COUNT, PIECES):
            tile = tl.maximum(tile, tiles[j])
        out = tl.maximum(out, tl.max(tile))
    return out


@triton.jit
def smallest(tiles, COUNT: tl.constexpr, PIECES: tl.constexpr):
    """The smallest value of all tiles."""
    out = float("inf")
    for i in tl.static_range(PIECES):
        tile = tiles[i]
        for j in tl.static_range(PIECES + i, COUNT, PIECES):
            tile = tl.minimum(tile, tiles[j])
        out = tl.minimum(out, tl.min(tile))
    return out


@triton.jit
def largest_magnitude(tiles, COUNT: tl.constexpr, PIECES: tl.constexpr):
    """The largest magnitude of all tiles."""
    out = 0.0
    for i in tl.static_range(PIECES):
        tile = tl.abs(tiles[i])
        for j in tl.static_range(PIECES + i, COUNT, PIECES):
            tile = tl.maximum(tile, tl.abs(tiles[j]))
        out = tl.maximum(out, tl.max(tile))
    return out


@triton.jit
def _quotient(x, divisor, reciprocal, IEEE: tl.constexpr):
    """x / divisor, correctly rounded, by one correction of x times the reciprocal (Markstein 1990): a tenth of a
    division's instructions. The interpreter has no fused multiply-add and needs IEEE."""
    if IEEE:
        out = tl.div_rn(x, divisor)
    else:
        near = x * reciprocal
        out = tl.fma(tl.fma(near, -divisor, x), reciprocal, near)
    return out


@triton.jit
def grid_of(low, high, clip_low, clip_high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, IEEE: tl.constexpr):
    """Smallest and largest value of a token, fp32 -> scale, its reciprocal fp32, zero int32: as `activations.op`.

    When symmetric zero is 0, and `high` the largest magnitude unless there are factors clip_low and clip_high.
    """
    LOW: tl.constexpr = -(2 ** (BITS - 1))
    HIGH: tl.constexpr = 2 ** (BITS - 1) - 1
    STEPS: tl.constexpr = (2**BITS - 1) / 2 if SYMMETRIC else 2.0**BITS - 1
    if clip_low is not None:
        low = tl.minimum(low, 0.0) * clip_low
        high = tl.maximum(high, 0.0) * clip_high
        if SYMMETRIC:
            high = tl.maximum(high, -low)
    if not SYMMETRIC:
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0) - low
    span = _quotient(high, STEPS, 1.0 / STEPS, IEEE)
    scale = tl.where(span > 0, span, 1.0)
    reciprocal = 1.0 / scale
    zero = high.to(tl.int32) * 0
    if not SYMMETRIC:
        exact = LOW - _quotient(low, scale, reciprocal, IEEE)
        zero = (exact + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
        zero = tl.where(span > 0, tl.minimum(tl.maximum(zero, LOW), HIGH), 0)
    return scale, reciprocal, zero


@triton.jit
def codes_of(values, reciprocal, zero, BITS: tl.constexpr, BELOW: tl.constexpr):
    """Values fp32 times the reciprocal of their scale -> codes int32.

    BELOW: they may lie below the grid, as they do not on a symmetric one that is not clipped.

    A quotient within 2^-22 of itself from the middle of two codes may get the other one than a division gives.
    """
    LOW: tl.constexpr = -(2 ** (BITS - 1))
    HIGH: tl.constexpr = 2 ** (BITS - 1) - 1
    # HIGH - zero + _ROUNDER.
    top = (HIGH - zero + _ROUNDER_BITS).to(tl.float32, bitcast=True)
    rounded = tl.minimum(values * reciprocal + _ROUNDER, top)
    if BELOW:
        rounded = tl.maximum(rounded, (LOW - zero + _ROUNDER_BITS).to(tl.float32, bitcast=True))
    return rounded.to(tl.int32, bitcast=True) - (_ROUNDER_BITS - zero)


@triton.jit
def _row(row, x_ptr, gate_ptr, before_ptr, after_ptr, left, left_ptr, right, y_ptr, scale_ptr, zero_ptr, sum_ptr,
         clip_low, clip_high, FACTOR: tl.constexpr, A: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
         Q: tl.constexpr, B: tl.constexpr, PADDED_B: tl.constexpr, X_PARTS: tl.constexpr, PARTS: tl.constexpr,
         VALUES: tl.constexpr, X_OPERAND: tl.constexpr, OPERAND: tl.constexpr, PINNED: tl.constexpr, BITS: tl.constexpr,
         SYMMETRIC: tl.constexpr, IEEE: tl.constexpr, PERIOD: tl.constexpr):  # fmt: skip
    PIECES: tl.constexpr = len(SIZES)
    start = tl.cast(row, tl.int64) * (A * Q * B)
    if gate_ptr is not None:
        gate_ptr += start
    if before_ptr is not None:
        before_ptr += row % PERIOD * (A * Q * B)
    if after_ptr is not None:
        after_ptr += row % PERIOD * (A * Q * B)
    tiles = rotated_row(x_ptr + start, gate_ptr, before_ptr, left, left_ptr, right, A, STARTS, SIZES, Q, B, PADDED_B,
                        X_PARTS, PARTS, VALUES, X_OPERAND, OPERAND, PINNED)  # fmt: skip
    y_ptr += start
    if BITS == 0:
        for j in tl.static_range(Q):
            for i in tl.static_range(PIECES):
                offsets, mask = place(STARTS[i], SIZES[i], j, A, Q, B, PADDED_B)
                even = STARTS[i] + SIZES[i] <= A and B == PADDED_B
                store_values(y_ptr, after_ptr, offsets, offsets, mask, tiles[j * PIECES + i] * FACTOR, even)
    else:
        if SYMMETRIC and clip_low is None:
            high = largest_magnitude(tiles, Q * PIECES, PIECES) * FACTOR
            low = high
        else:
            high = largest(tiles, Q * PIECES, PIECES) * FACTOR
            low = smallest(tiles, Q * PIECES, PIECES) * FACTOR
        scale, reciprocal, zero = grid_of(low, high, clip_low, clip_high, BITS, SYMMETRIC, IEEE)
        BELOW: tl.constexpr = not SYMMETRIC or clip_low is not None
        total = 0
        for i in tl.static_range(PIECES):
            for j in tl.static_range(Q):
                codes = codes_of(tiles[j * PIECES + i], reciprocal * FACTOR, zero, BITS, BELOW)
                if j == 0:
                    sums = codes
                else:
                    sums += codes
                offsets, mask = place(STARTS[i], SIZES[i], j, A, Q, B, PADDED_B)
                even = STARTS[i] + SIZES[i] <= A and B == PADDED_B
                store_values(y_ptr, None, offsets, offsets, mask, codes, even)
            total += tl.sum(sums)
        # What is beyond the row is 0, and its code the zero-point.
        PADDING: tl.constexpr = (STARTS[PIECES - 1] + SIZES[PIECES - 1]) * Q * PADDED_B - A * Q * B
        tl.store(scale_ptr + row, scale)
        tl.store(sum_ptr + row, total - zero * PADDING)
        if not SYMMETRIC:
            tl.store(zero_ptr + row, zero)


@triton.jit(do_not_specialize=["M"])
def row_kernel(x_ptr, gate_ptr, before_ptr, after_ptr, left_ptr, right_ptr, y_ptr, scale_ptr, zero_ptr, sum_ptr, M,
               clip_low, clip_high, FACTOR: tl.constexpr, A: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
               Q: tl.constexpr, B: tl.constexpr, PADDED_B: tl.constexpr, X_PARTS: tl.constexpr, PARTS: tl.constexpr,
               VALUES: tl.constexpr, X_OPERAND: tl.constexpr, OPERAND: tl.constexpr, PINNED: tl.constexpr,
               BITS: tl.constexpr, SYMMETRIC: tl.constexpr, IEEE: tl.constexpr, PERIOD: tl.constexpr,
               AGAIN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Rows of `[M, A Q B]`: x rotated, times FACTOR, to y; with BITS to codes int8, scale, zero and sum.

    before_ptr, after_ptr: signs `[PERIOD, A Q B]` of x and of y, for the rows in turn. clip_low, clip_high: of
    `grid_of`. AGAIN: see left_ptr of `rotated_row`. STAGES 0: a program per row; else programs take rows in turn and
    fetch the next ones meanwhile.
    """
    b = tl.arange(0, PADDED_B)
    right = tl.load(right_ptr + b[:, None] * PADDED_B + b[None, :])
    left = () if AGAIN else load_left(left_ptr, STARTS, SIZES, False)
    again_ptr = left_ptr if AGAIN else None
    if STAGES == 0:
        _row(tl.program_id(0), x_ptr, gate_ptr, before_ptr, after_ptr, left, again_ptr, right, y_ptr, scale_ptr,
             zero_ptr, sum_ptr, clip_low, clip_high, FACTOR, A, STARTS, SIZES, Q, B, PADDED_B, X_PARTS, PARTS, VALUES,
             X_OPERAND, OPERAND, PINNED, BITS, SYMMETRIC, IEEE, PERIOD)  # fmt: skip
    else:
        for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
            _row(row, x_ptr, gate_ptr, before_ptr, after_ptr, left, again_ptr, right, y_ptr, scale_ptr, zero_ptr,
                 sum_ptr, clip_low, clip_high, FACTOR, A, STARTS, SIZES, Q, B, PADDED_B, X_PARTS, PARTS, VALUES,
                 X_OPERAND, OPERAND, PINNED, BITS, SYMMETRIC, IEEE, PERIOD)  # fmt: skip
