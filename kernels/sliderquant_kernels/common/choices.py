"""What a launch's tile is chosen for, and what a choice says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Streaming multiprocessors of the GPU that stands for an architecture where none is at hand: A100, RTX 3090, L40S,
# H100, B200, RTX 5090.
TYPICAL_SM_COUNT = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 170}
# Shared memory that one program may take, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Device:
    """What a choice depends on: the compute capability as a number such as 90, and the number of multiprocessors."""

    arch: int
    sm_count: int
    name: str = ""

    @classmethod
    def typical(cls, arch: int) -> Device:
        """The device that stands for an architecture."""
        return cls(arch, TYPICAL_SM_COUNT[family(arch)])


@dataclass(frozen=True)
class Problem:
    """`m` tokens times a weight `[n, k]` with `bits`-bit codes; `group_size` None means per channel."""

    m: int
    n: int
    k: int
    bits: int
    group_size: int | None
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """What is launched, and why.

    Attributes:
        variant: `warp_k` (warps share the rows and split K), `rows` (warps lie along N), or `dense` (dequantize, then
            torch's matmul; the rest is 0).
        block_m: tokens of a tile.
        row_blocks: blocks of 16 output features in a tile.
        num_warps, num_stages: Triton's launch options.
        split: programs that share the K of one tile.
        reason: one sentence.
    """

    variant: str
    block_m: int = 0
    row_blocks: int = 0
    num_warps: int = 0
    num_stages: int = 0
    split: int = 1
    reason: str = ""


def family(arch: int) -> int:
    """The architecture of `TYPICAL_SM_COUNT` whose rules hold for a compute capability such as 87, 103 or 121."""
    return max((known for known in TYPICAL_SM_COUNT if known <= arch), default=80)
