"""Codes in the order in which an AVX512-VNNI instruction takes them: what `vnni.c` reads.

A weight `[N, K]` is cut into blocks of 16 rows x 4 P inputs, P = 4, 2, 1 for b = 2, 4, 8 bits; codes of 3 bits take 4.
A block is 64 bytes; code i of a byte (bits b i .. b i + b - 1) belongs to input 4 i + c of the block, and the bytes lie
in the order `[row: 16][c: 4]`. Codes are stored as they are, unsigned, whichever their width. Scales and zero-points
lie beside them as `[groups, rows]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16
BYTES = 64
# Sums of products of 8-bit codes and 16-bit integers over more inputs than this could leave int32.
TOKEN_GROUPS = (128, 64, 32)


def stored_bits(bits: int) -> int:
    """The bits that a code takes."""
    return 4 if bits == 3 else bits


def block_inputs(bits: int) -> int:
    """Inputs (K) of one block."""
    return 4 * 8 // stored_bits(bits)


def token_group(k: int, group_size: int | None) -> int:
    """Inputs of a token that share a scale, where tokens become integers of 16 bits: those of a group of the weight, or
    per channel the most of 128, 64 and 32 that divide k. 0: none does."""
    return group_size or next((size for size in TOKEN_GROUPS if k % size == 0), 0)


def weight_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed codes, uint8: blocks along N, blocks along K, bytes of a block."""
    return -(-n // ROWS), -(-k // block_inputs(bits)), BYTES


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 -> `weight_shape` uint8. Beyond N and K they are 0."""
    n, k = codes.shape
    row_blocks, k_blocks, _ = weight_shape(n, k, bits)
    bits = stored_bits(bits)
    padding = (0, k_blocks * block_inputs(bits) - k, 0, row_blocks * ROWS - n)
    ordered = _planes(pad(codes, padding) if any(padding) else codes.contiguous(), row_blocks, k_blocks, bits)
    out = ordered[0].contiguous()
    for i in range(1, len(ordered)):
        out |= ordered[i] << (bits * i)
    return out.view(torch.uint8).view(row_blocks, k_blocks, BYTES)


def unpack_codes(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack_codes`: codes `[N, K]` uint8."""
    row_blocks, k_blocks, _ = packed.shape
    bits = stored_bits(bits)
    codes = torch.empty(row_blocks * ROWS, k_blocks * block_inputs(bits), dtype=torch.uint8)
    ordered = _planes(codes, row_blocks, k_blocks, bits)
    stored = packed.view(torch.int32).view(row_blocks, k_blocks, ROWS)
    if bits == 8:
        ordered[0].copy_(stored)
    for i in range(len(ordered) if bits < 8 else 0):
        ordered[i].copy_((stored >> (bits * i)).bitwise_and_((2**bits - 1) * 0x01010101))
    return codes[:n, :k].contiguous()


def _planes(codes: Tensor, row_blocks: int, k_blocks: int, bits: int) -> Tensor:
    """A view of whole blocks as `[P, row blocks, K blocks, row]`, four codes in a word: torch copies words faster than
    bytes, and codes of b bits have room for the shifts that join P of them."""
    return codes.view(torch.int32).view(row_blocks, ROWS, k_blocks, 8 // bits).permute(3, 0, 2, 1)


def pack_groups(values: Tensor) -> Tensor:
    """Scales or zero-points `[N, G]` -> `[G, Np]`, Np = N rounded up to 16; 0 beyond N."""
    return pad(values, (0, 0, 0, -values.shape[0] % ROWS)).t().contiguous()


def unpack_groups(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_groups`."""
    return packed[:, :n].t().contiguous()
