"""Codes in the order in which a matrix instruction takes them: what the Triton kernels read.

A weight `[N, K]` is cut into blocks of 16 rows x 32 P inputs, P = 8, 8, 4, 2 for 2, 3, 4, 8 bits. A block is 512
little-endian words of 16 bits; code i of a word (bits b i .. b i + b - 1) belongs to input 32 i + kappa of the block:
plane i of all words is the fragment of 32 consecutive inputs, which share one scale. The words lie in the order

    [j: 2][g: 8][c: 4][h: 2][m: 2][b: 2]    row = 8 m + g, kappa = 16 j + 8 h + 2 c + b

in which the left operand of an m16n8k16 matrix instruction sits in the registers of a warp: lane 4 g + c takes 16
consecutive bytes, and nothing has to be moved between lanes.

Three bits are a word and a byte for 8 codes: the words as above, followed by 512 bytes in the same order. A word holds
the codes of planes 0 to 4 at its bits `WORD_STARTS`, a byte those of planes 5 and 6 at `BYTE_STARTS`; of plane 7 the
two low bits lie at bit `LAST_LOW` of the byte, the high one at bit `LAST_HIGH` of the word. Codes in these places take
three shifts, see `unpack`.

Scales are stored per group, rows next to each other, as pairs of values in their own dtype, so that one 4-byte load
brings a pair: with zero-points `[G, Np, 2]` holds (scale, `zero_bias` + zero-point), without them `[G, Np / 16, 8, 2]`
holds the scales of the rows g and g + 8 of a block. Np is N rounded up to 16, G the groups of all blocks along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
PLANE = 32  # inputs of one plane, and the smallest group
WORDS = 512
WORD_STARTS, BYTE_STARTS, LAST_LOW, LAST_HIGH = (0, 3, 6, 9, 13), (0, 3), 6, 12


def planes(bits: int) -> int:
    """Codes in one word, P."""
    return 16 // (2 if bits == 3 else bits)


def block_inputs(bits: int) -> int:
    """Inputs (K) of one block."""
    return PLANE * planes(bits)


def block_bytes(bits: int) -> int:
    """Bytes of one block."""
    return WORDS * 2 + (WORDS if bits == 3 else 0)


def weight_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed codes, uint8: blocks along N, blocks along K, bytes of a block."""
    return -(-n // ROWS), -(-k // block_inputs(bits)), block_bytes(bits)


def scale_shape(n: int, k: int, bits: int, group_size: int | None, symmetric: bool) -> tuple[int, ...]:
    """Shape of the packed scales, see above."""
    row_blocks = -(-n // ROWS)
    groups = 1
    if group_size is not None:
        # The last block may hold groups beyond K: a kernel reads their scales as well.
        groups = max(k // group_size, -(-k // block_inputs(bits)) * (block_inputs(bits) // group_size))
    return (groups, row_blocks, ROWS // 2, 2) if symmetric else (groups, row_blocks * ROWS, 2)


def zero_bias(bits: int, dtype: torch.dtype) -> int:
    """What is added to a stored zero-point: the number to which the kernels raise a code, whose lowest mantissa bit
    counts ones. 8-bit codes in bfloat16 have no such number and are put together from two halves."""
    if dtype == torch.float16:
        return 1024
    return 128 if dtype == torch.bfloat16 and bits != 8 else 0


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 -> `weight_shape` uint8. What the block has beyond N and K is code 0."""
    n, k = codes.shape
    row_blocks, k_blocks, size = weight_shape(n, k, bits)
    count = planes(bits)
    out = torch.empty(row_blocks, k_blocks, size, dtype=torch.uint8, device=codes.device)
    # A few MB at a time stay in a CPU's cache.
    step = max(1, (1 << 22) // (k_blocks * ROWS * PLANE * count))
    for first in range(0, row_blocks, step):
        part = codes[first * ROWS : (first + step) * ROWS]
        rows = -(-part.shape[0] // ROWS)
        padding = (0, k_blocks * PLANE * count - k, 0, rows * ROWS - part.shape[0])
        if any(padding):
            part = torch.nn.functional.pad(part, padding)
        # [rows, m, g, k blocks, i, j, h, c, b] -> [i][rows, k blocks, j, g, c, h, m, b]
        ordered = part.view(rows, 2, 8, k_blocks, count, 2, 2, 4, 2).permute(4, 0, 3, 5, 2, 7, 6, 1, 8)
        block = out[first : first + rows]
        _pack_words(ordered, bits, block)
    return out


def _pack_words(ordered: Tensor, bits: int, block: Tensor) -> None:
    """Planes `[P, rows, k blocks, j, g, c, h, m, b]` -> bytes `[rows, k blocks, size]`."""
    rows, k_blocks = ordered.shape[1:3]
    words = block[:, :, : WORDS * 2].view(rows, k_blocks, 2, 8, 4, 2, 2, 2, 2)
    if bits == 3:
        found = ordered.to(torch.int16)
        word = found[7].bitwise_right_shift(2) << LAST_HIGH
        for plane, start in zip(found, WORD_STARTS, strict=False):
            word |= plane << start
        words[..., 0] = (word & 255).to(torch.uint8)
        words[..., 1] = ((word >> 8) & 255).to(torch.uint8)
        byte = block[:, :, WORDS * 2 :].view(rows, k_blocks, 2, 8, 4, 2, 2, 2)
        byte.copy_((ordered[7] & 3) << LAST_LOW)
        for plane, start in zip(ordered[len(WORD_STARTS) :], BYTE_STARTS, strict=False):
            byte |= plane << start
        return
    per_byte = 8 // bits
    for half in range(2):
        byte = words[..., half]
        for i in range(per_byte):
            plane = ordered[half * per_byte + i]
            if i == 0:
                byte.copy_(plane)
            else:
                byte.bitwise_or_(plane << (i * bits))


def unpack_codes(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack_codes`: codes `[N, K]` uint8."""
    row_blocks, k_blocks, _ = packed.shape
    count = planes(bits)
    codes = torch.empty(row_blocks * ROWS, k_blocks * PLANE * count, dtype=torch.uint8, device=packed.device)
    ordered = codes.view(row_blocks, 2, 8, k_blocks, count, 2, 2, 4, 2).permute(4, 0, 3, 5, 2, 7, 6, 1, 8)
    words = packed[:, :, : WORDS * 2].unflatten(2, (2, 8, 4, 2, 2, 2, 2))
    if bits == 3:
        word = words[..., 0].to(torch.int32) | words[..., 1].to(torch.int32) << 8
        byte = packed[:, :, WORDS * 2 :].unflatten(2, (2, 8, 4, 2, 2, 2))
        for i, start in enumerate(WORD_STARTS):
            ordered[i] = word >> start & 7
        for i, start in enumerate(BYTE_STARTS, len(WORD_STARTS)):
            ordered[i] = byte >> start & 7
        ordered[7] = byte >> LAST_LOW | (word >> LAST_HIGH & 1) << 2
        return codes[:n, :k].contiguous()
    per_byte = 8 // bits
    for i in range(count):
        ordered[i] = (words[..., i // per_byte] >> (i % per_byte * bits)) & (2**bits - 1)
    return codes[:n, :k].contiguous()


def pack_scales(scale: Tensor, zero_point: Tensor | None, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Scale `[N, G]`, zero_point `[N, G]` uint8 or None -> `shape` (from `scale_shape`) in the scale's dtype."""
    groups = shape[0]
    padding = (0, groups - scale.shape[1], 0, -scale.shape[0] % ROWS)
    scale = torch.nn.functional.pad(scale, padding).t()
    if zero_point is None:
        return scale.reshape(groups, -1, 2, ROWS // 2).transpose(2, 3).contiguous()
    zero = torch.nn.functional.pad(zero_point, padding).t().to(scale.dtype) + zero_bias(bits, scale.dtype)
    return torch.stack((scale, zero), -1).contiguous()


def unpack_scales(packed: Tensor, bits: int, n: int, groups: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The inverse of `pack_scales`."""
    packed = packed[:groups]
    if symmetric:
        return packed.transpose(2, 3).reshape(groups, -1)[:, :n].t().contiguous(), None
    scale, zero = packed[:, :n, 0], packed[:, :n, 1] - zero_bias(bits, packed.dtype)
    return scale.t().contiguous(), zero.t().to(torch.uint8).contiguous()
