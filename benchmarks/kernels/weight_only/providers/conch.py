"""conch-triton-kernels 1.3: `mixed_precision_gemm`, one Triton kernel with one tile for every M.

2, 4 and 8 bits, symmetric and asymmetric. It computes the scheme itself, with weights rounded to 16 bits after scaling.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...harness.case import Arithmetic, Case, Prepared, Provider, Unsupported
from ...shared.schemes import WeightScheme
from ..operands import Operands

# The fixed tile of its kernel: loads along N are not masked, and one step along K must lie within a group.
TILE_N, TILE_K = 64, 64
ARITHMETIC = Arithmetic(weight_roundings=1)


def prepare(weight: Operands) -> Prepared:
    """Codes `[K bits / 32, N]` int32, scale and zero-point `[G, N]`."""
    from conch.ops.quantization.gemm import mixed_precision_gemm

    bits, group, half = weight.scheme.bits, weight.group_size, 2 ** (weight.scheme.bits - 1)
    if weight.n % TILE_N or weight.k % TILE_K:
        raise Unsupported(f"needs n and k multiples of {TILE_N} and {TILE_K}, got n={weight.n}, k={weight.k}")
    tensors = [pack_columns(weight.codes, bits), weight.scale.t().contiguous()]
    if weight.zero_point is not None:
        tensors.append(weight.zero_point.to(torch.int32).t().contiguous())

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        zero_point, bias = (t[2], 0) if len(t) == 3 else (None, half)
        return mixed_precision_gemm(x, t[0], t[1], zero_point, bits, bias, group)

    return Prepared(tuple(tensors), call, lambda m: ARITHMETIC)


def accepts(case: Case) -> str | None:
    """Why it does not compute a case's scheme, or None."""
    scheme = WeightScheme.parse(case.scheme)
    if scheme.bits == 3 or (scheme.group_size or TILE_K) < TILE_K:
        return f"2, 4 and 8 bits, groups of at least {TILE_K}, got {case.scheme}"
    return None


def compilation(case: Case) -> Hashable:
    """Triton specializes on sizes of 1 and on multiples of 16; N and K are such."""
    group = WeightScheme.parse(case.scheme).group_size or case.shape[1]
    return case.scheme, group, case.dtype, case.m == 1, case.m % 16 == 0


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 -> `[K bits / 32, N]` int32: a word holds neighbours in K, the first one lowest."""
    per_word = 32 // bits
    n, k = codes.shape
    words = codes.t().reshape(k // per_word, per_word, n).to(torch.int32)
    packed = words[:, 0].clone()
    for i in range(1, per_word):
        packed |= words[:, i] << (i * bits)
    return packed.contiguous()


PROVIDERS = [
    Provider(
        "conch", prepare, distribution="conch-triton-kernels==1.3", peer=True, compilation=compilation, accepts=accepts
    ),
]
