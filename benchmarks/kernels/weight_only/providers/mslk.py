"""MSLK 1.1 (the kernels of FBGEMM GenAI): CUTLASS mixed-input matmuls, `bf16i4bf16_shuffled` and `_rowwise`; Hopper.

4 bits, groups, bf16. Both compute (code - 8) * scale + zero with zero = (8 - zero_point) * scale in bf16: an asymmetric
scheme's zero-points are rounded once more than in the scheme itself.
"""

from __future__ import annotations

from functools import partial

import torch

from ...harness.case import Prepared, Provider
from ..operands import Operands
from . import torch_int4


def prepare(weight: Operands, shuffled: bool) -> Prepared:
    """Codes `[N, K / 2]` int8, for `shuffled` in the order of the matrix instruction, scale and zero `[G, N]` bf16."""
    from mslk.quantize.shuffle import pack_int4

    packed = pack_int4((weight.codes.to(torch.int8) - 8).contiguous())
    scale = weight.scale.t().contiguous()
    zero = weight.offsets().to(weight.dtype).t().contiguous()
    if shuffled:
        packed, scale = torch.ops.mslk.preshuffle_i4(packed, scale)
        op = torch.ops.mslk.bf16i4bf16_shuffled
    else:
        op = torch.ops.mslk.bf16i4bf16_rowwise
    return Prepared((packed, scale, zero), lambda x, t: op(x, *t), lambda m: torch_int4.arithmetic(weight))


PROVIDERS = [
    Provider(
        name,
        partial(prepare, shuffled=shuffled),
        distribution="mslk-cuda==1.1.0",
        peer=True,
        computes=torch_int4.COMPUTES,
        accepts=torch_int4.accepts,
    )
    for name, shuffled in (("mslk", True), ("mslk-rowwise", False))
]
