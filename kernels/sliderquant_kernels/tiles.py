"""Which tile a launch takes: a pure function of the problem, so that it can be explained and compiled anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Block sizes over output features (N), input features (K) and tokens (M), with Triton's launch options."""

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int


def choose_tile(m: int, n: int, k: int, bits: int, group_size: int | None, dtype: torch.dtype) -> Tile:
    """The tile of the weight-only matmul for `m` tokens and a weight `[n, k]`.

    One step along K lies within one group, so that a group's scale is applied once per step to the accumulator.
    """
    if dtype == torch.float32:
        # No matrix unit multiplies exact fp32: operands live in registers, so tiles are small.
        return Tile(block_n=32, block_k=32, block_m=16 if m <= 16 else 32, num_warps=4, num_stages=2)
    block_k = min(group_size or 64, 64)
    if m <= 16:
        # Narrow in N, because few tokens mean that N alone has to fill the GPU.
        return Tile(block_n=32, block_k=block_k, block_m=16, num_warps=4, num_stages=4)
    if m <= 32:
        return Tile(block_n=64, block_k=block_k, block_m=32, num_warps=4, num_stages=4)
    # With 4 warps, 3-bit weights spill on sm_80: two planes and two accumulators do not fit.
    return Tile(block_n=64, block_k=block_k, block_m=64, num_warps=8, num_stages=3)


def choose_dequantize_tile(k: int, group_size: int | None) -> Tile:
    """The tile of the dequantize kernel; `block_m` plays no part in it."""
    return Tile(block_n=32, block_k=min(group_size or 64, 64), block_m=1, num_warps=4, num_stages=1)
