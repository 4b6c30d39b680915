"""torch's own int4 matmul, `torch.ops.aten._weight_int4pack_mm`: 4 bits, groups, bf16.

It computes bf16((code - 8) * scale + zero) with zero = (8 - zero_point) * scale in bf16: an asymmetric scheme's
zero-points are rounded once more than in the scheme itself. On a CPU the op is `_weight_int4pack_mm_for_cpu`, the one
that our own CPU route calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...harness.case import Arithmetic, Case, Prepared, Provider, Unsupported
from ...shared.schemes import WeightScheme
from ..operands import Operands

COMPUTES = "zero-points as bf16 offsets"
INNER_K_TILES = 8


def prepare(weight: Operands) -> Prepared:
    """Codes in tensor-core order, and scale and zero `[G, N, 2]` bf16."""
    group = weight.group_size
    if weight.codes.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        if weight.k % 128 or weight.n % 8:
            raise Unsupported(f"needs n a multiple of 8 and k of 128, got n={weight.n}, k={weight.k}")
        packed = torch.ops.aten._convert_weight_to_int4pack(pack_pairs(weight.codes), INNER_K_TILES)
        op = torch.ops.aten._weight_int4pack_mm
    tensors = (packed, scale_and_zero(weight))
    return Prepared(tensors, lambda x, t: op(x, t[0], group, t[1]), lambda m: arithmetic(weight))


def accepts(case: Case) -> str | None:
    """Why the op does not compute a case's scheme, or None."""
    scheme = WeightScheme.parse(case.scheme)
    if scheme.bits != 4 or scheme.group_size is None or case.dtype != "bf16":
        return f"4 bits in groups with bf16 activations only, got {case.scheme} with {case.dtype}"
    return None


def arithmetic(weight: Operands) -> Arithmetic:
    """The weight is rounded when it is scaled and when the zero is added, the zero when it is stored."""
    asymmetric = not weight.scheme.symmetric
    return Arithmetic(weight_roundings=1 + asymmetric, offset_roundings=int(asymmetric))


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes `[N, K]` uint8 -> `[N, K / 2]` uint8, even inputs in the high nibble."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def scale_and_zero(weight: Operands) -> Tensor:
    """Scale and zero `[G, N, 2]` in the scale's dtype."""
    offsets = weight.offsets().to(weight.scale.dtype)
    return torch.stack([weight.scale, offsets], -1).transpose(0, 1).contiguous()


PROVIDERS = [
    Provider("torch-int4", prepare, devices=("cuda", "cpu"), peer=True, computes=COMPUTES, accepts=accepts),
]
