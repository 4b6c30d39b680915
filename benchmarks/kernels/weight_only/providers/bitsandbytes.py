"""bitsandbytes 0.50: `matmul_4bit` with NF4, blocks of 64 or 128, no double quantization.

NF4 is a table of 16 values times a 32-bit maximum per block: no zero-points, so the scheme's grouping and width are
alike and the values are not. It quantizes the case's weight itself and is checked against its own values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...harness.case import Arithmetic, Case, Prepared, Provider
from ...shared.schemes import WeightScheme
from ..operands import Operands

# Table value, its product with the maximum, and the maximum may each be rounded to 16 bits.
ARITHMETIC = Arithmetic(weight_roundings=3)


def prepare(weight: Operands) -> Prepared:
    """Packed codes `[N K / 2, 1]` uint8, maxima `[N G]` fp32 and the table `[16]` fp32."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState, quantize_4bit

    dense = weight.weight(weight.dtype)
    packed, state = quantize_4bit(dense, blocksize=weight.group_size, quant_type="nf4")

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        own = QuantState(
            absmax=t[1], shape=dense.shape, code=t[2], blocksize=weight.group_size, quant_type="nf4", dtype=weight.dtype
        )
        return bitsandbytes.matmul_4bit(x, t[0], own)

    values = dequantize(packed, state.absmax, state.code, weight.n, weight.k)
    return Prepared((packed, state.absmax, state.code), call, lambda m: ARITHMETIC, weight=values)


def accepts(case: Case) -> str | None:
    """Why it has no format of this width and grouping, or None."""
    scheme = WeightScheme.parse(case.scheme)
    return None if scheme.bits == 4 and scheme.group_size else f"4 bits in groups only, got {case.scheme}"


def dequantize(packed: Tensor, absmax: Tensor, table: Tensor, n: int, k: int) -> Tensor:
    """Table values times the maxima of their blocks, `[N, K]` fp32: an independent reading of its format."""
    packed = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1).int()
    return (table.float()[codes].view(absmax.numel(), -1) * absmax.float()[:, None]).view(n, k)


PROVIDERS = [
    Provider(
        "bitsandbytes",
        prepare,
        distribution="bitsandbytes==0.50.2",
        peer=True,
        computes="NF4 with a maximum per group, no zero-points",
        accepts=accepts,
    )
]
