"""Codes in the order in which an int8 matrix instruction takes them: what the Triton kernels of low-bit linears read.

A weight `[N, K]` is cut into blocks of 16 rows x 32 P inputs, P = 4, 2, 1 for 2, 4, 8 bits. A block is 512 bytes; code
i of a byte (bits b i .. b i + b - 1) belongs to input 32 i + kappa of the block. The bytes lie in the order

    [g: 8][c: 4][h: 2][m: 2][b: 4]    row = 8 m + g, kappa = 16 h + 4 c + b

in which the left operand of an m16n8k32 matrix instruction sits in the registers of a warp: lane 4 g + c takes 16
consecutive bytes. 8-bit codes are stored less 128, as int8; 2 and 4-bit codes as they are.

With a stored code q and zero-point z (both less 128 at 8 bits), `constants` has the int32 rows z of every group, and
last what a zero-point of the activations needs: per channel sum_k q - K z, else the fp32 bits of
sum_g scale_g sum_k (q - z).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
PLANE = 32
BYTES = 512
BITS = (2, 4, 8)
# Sums of products of 8-bit codes less their zero-points stay below 2^31.
MAX_K = {bits: (2**31 - 1) // (255 * (2**bits - 1)) for bits in BITS}


def block_inputs(bits: int) -> int:
    """Inputs (K) of one block."""
    return PLANE * 8 // bits


def weight_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed codes, uint8: blocks along N, blocks along K, bytes of a block."""
    return -(-n // ROWS), -(-k // block_inputs(bits)), BYTES


def groups_of(k: int, bits: int, group_size: int | None) -> int:
    """Groups of all blocks along K: the last block may hold some beyond K, whose scales a kernel reads as well."""
    if group_size is None:
        return 1
    inputs = block_inputs(bits)
    return max(k // group_size, -(-k // inputs) * max(inputs // group_size, 1))


def shift(bits: int) -> int:
    """What is subtracted from codes and zero-points before they are stored."""
    return 128 if bits == 8 else 0


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 -> `weight_shape` uint8. What the block has beyond N and K is any code."""
    n, k = codes.shape
    row_blocks, k_blocks, _ = weight_shape(n, k, bits)
    planes = 8 // bits
    padding = (0, k_blocks * PLANE * planes - k, 0, row_blocks * ROWS - n)
    if any(padding):
        codes = torch.nn.functional.pad(codes, padding)
    # [row blocks, m, g, k blocks, i, h, c, b] -> [i][row blocks, k blocks, g, c, h, m, b]
    ordered = codes.view(row_blocks, 2, 8, k_blocks, planes, 2, 4, 4).permute(4, 0, 3, 2, 6, 5, 1, 7)
    out = ordered[0].contiguous()
    for i in range(1, planes):
        out |= ordered[i] << (bits * i)
    return (out ^ shift(bits)).view(row_blocks, k_blocks, BYTES)


def unpack_codes(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack_codes`: codes `[N, K]` uint8."""
    row_blocks, k_blocks, _ = packed.shape
    planes = 8 // bits
    codes = torch.empty(row_blocks * ROWS, k_blocks * PLANE * planes, dtype=torch.uint8, device=packed.device)
    ordered = codes.view(row_blocks, 2, 8, k_blocks, planes, 2, 4, 4).permute(4, 0, 3, 2, 6, 5, 1, 7)
    stored = (packed ^ shift(bits)).view(row_blocks, k_blocks, 8, 4, 2, 2, 4)
    for i in range(planes):
        ordered[i] = (stored >> (bits * i)) & (2**bits - 1)
    return codes[:n, :k].contiguous()


def pack_scales(scale: Tensor, k: int, bits: int, group_size: int | None) -> Tensor:
    """Scale `[N, G]` -> fp32 `[groups_of, Np]`, Np = N rounded up to 16; 0 beyond N and G."""
    padding = (0, groups_of(k, bits, group_size) - scale.shape[1], 0, -scale.shape[0] % ROWS)
    return torch.nn.functional.pad(scale.float(), padding).t().contiguous()


def constants(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int | None) -> Tensor:
    """int32 `[groups_of + 1, Np]`, see above.

    codes `[N, K]` uint8, scale `[N, G]`, zero_point `[N, G]` uint8 or None.
    """
    n, k = codes.shape
    groups = scale.shape[1]
    zero = torch.full((n, groups), 2 ** (bits - 1), device=codes.device) if zero_point is None else zero_point
    zero = zero.int()
    sums = codes.view(n, groups, k // groups).sum(-1, dtype=torch.int32) - zero * (k // groups)
    if group_size is None:
        last = sums[:, 0]
    else:
        last = (sums.double() * scale.double()).sum(-1).float().view(torch.int32)
    padding = (0, groups_of(k, bits, group_size) - groups, 0, -n % ROWS)
    zero = torch.nn.functional.pad(zero - shift(bits), padding)
    last = torch.nn.functional.pad(last, (0, -n % ROWS))
    return torch.cat((zero, last[:, None]), 1).t().contiguous()


def zero_points(packed: Tensor, bits: int, n: int, groups: int) -> Tensor:
    """The zero-points `[N, G]` uint8 in `constants`."""
    return (packed[:groups, :n] + shift(bits)).t().to(torch.uint8).contiguous()
