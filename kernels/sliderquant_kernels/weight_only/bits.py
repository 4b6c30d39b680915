"""Codes of 2, 3, 4 or 8 bits as bytes, row by row.

Three bits are a plane of two low bits and a plane of one high bit, so that no code straddles a byte and memory really
is three bits per code. K is padded with zero codes to a multiple of 32, which keeps planes byte-aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor

K_ALIGNMENT = 32
SUPPORTED_BITS = (2, 3, 4, 8)
_PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def padded(k: int) -> int:
    """K rounded up to what a packed row holds."""
    return -(-k // K_ALIGNMENT) * K_ALIGNMENT


def row_bytes(k: int, bits: int) -> int:
    """Bytes of one packed row of K codes."""
    return padded(k) * bits // 8


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 in 0..2^bits-1 -> `[N, row_bytes]` uint8.

    The c codes of a byte lie a c-th of the row apart (byte j: k = j + i Kp / c), so that a vector unit writes long
    contiguous runs.
    """
    n, k = codes.shape
    if k != padded(k):
        codes = torch.nn.functional.pad(codes, (0, padded(k) - k))
    planes, low = [], 0
    for width in _PLANE_WIDTHS[bits]:
        per_byte = 8 // width
        plane = ((codes >> low) & (2**width - 1)).view(n, per_byte, -1)
        packed = plane[:, 0].clone()
        for i in range(1, per_byte):
            packed |= plane[:, i] << (i * width)
        planes.append(packed)
        low += width
    return torch.cat(planes, 1).contiguous()


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack_rows`: `[N, row_bytes]` uint8 -> codes `[N, K]` uint8 (a new tensor)."""
    n, kp = packed.shape[0], padded(k)
    codes, start, low = None, 0, 0
    for width in _PLANE_WIDTHS[bits]:
        per_byte, columns = 8 // width, kp * width // 8
        plane = packed[:, start : start + columns]
        out = torch.empty(n, kp, dtype=torch.uint8, device=packed.device)
        view = out.view(n, per_byte, columns)
        for i in range(per_byte):
            shifted = plane >> (i * width) if i else plane
            view[:, i] = shifted & (2**width - 1) if i < per_byte - 1 else shifted
        codes = out if codes is None else codes.bitwise_or_(out << low)
        start, low = start + columns, low + width
    assert codes is not None
    return codes[:, :k]
