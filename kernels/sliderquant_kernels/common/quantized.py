"""Activations that were rounded to integer codes, as the ops hand them to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedActivations(NamedTuple):
    """Tokens on the int8 grid.

    Attributes:
        codes: int8 `[..., K]`, or, packed, uint8 `[..., K / 2]`: input 2 j in the low nibble of byte j.
        scale: fp32 `[...]`.
        zero_point: int32 `[...]`, or None when symmetric.
        token_sum: int32 `[...]`, the sum of a token's codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    token_sum: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q - z) s, `[..., K]` in `dtype`."""
        codes = unpack_int4(self.codes) if self.codes.dtype == torch.uint8 else self.codes
        zero = 0 if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return ((codes.int() - zero).float() * self.scale.unsqueeze(-1)).to(dtype)


def unpack_int4(codes: Tensor) -> Tensor:
    """uint8 `[..., K / 2]` -> int8 `[..., K]`."""
    low, high = codes << 4, codes & 0xF0
    return torch.stack((low, high), -1).flatten(-2).view(torch.int8) >> 4
