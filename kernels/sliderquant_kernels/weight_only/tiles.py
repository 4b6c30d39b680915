"""Which kernel and which tile a launch takes: a pure function of the problem and the device, which explains itself.

Nothing is tuned in a user's process. What `python -m sliderquant_kernels.tune` measured on a GPU lies beside this file
in `tuned/` and goes before the rules (`tuned.py`).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..common.choices import SHARED_LIMIT, Choice, Device, Problem, family
from ..common.releases import triton_release
from .estimate import fastest
from .fragments import ROWS, block_inputs

VARIANTS = ("warp_k", "rows", "dense")

MAX_SPLIT = 4


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, variant: str | None = None, batch_invariant: bool = False) -> Choice:
    """The kernel and tile for a problem on a device.

    Args:
        variant: one of `VARIANTS` to be used whatever the rules say; None: the best.
        batch_invariant: nothing in the choice may depend on the number of tokens.

    Raises:
        ValueError: the variant does not exist or cannot compute the problem.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)} or None, got {variant!r}")
    if batch_invariant and variant not in (None, "rows"):
        raise ValueError(f"variant: batch_invariant=True computes with 'rows', got {variant!r}; leave one of them out")
    if problem.dtype == torch.float32:
        if batch_invariant or variant not in (None, "dense"):
            raise ValueError(
                "dtype: with float32 activations only variant 'dense' computes, and it is not batch-invariant; "
                "use float16 or bfloat16"
            )
        return Choice("dense", reason="no matrix unit multiplies exact fp32")
    if batch_invariant:
        # As if there were one tile of tokens: their number must not count.
        return _rows(problem, device, 32, 1, "batch-invariant: one tile for every number of tokens")
    if family(device.arch) == 90 and variant != "dense":
        found = fastest(problem, device, ("warp_k", "rows") if variant is None else (variant,))
        if found is not None:
            return found
    if variant is None:
        variant, reason = _variant(problem, device)
    else:
        reason = "asked for"
    if variant == "warp_k":
        return _warp_k(problem, device, reason)
    if variant == "rows":
        block_m = _rows_block_m(problem, device)
        return _rows(problem, device, block_m, -(-problem.m // block_m), reason)
    return Choice("dense", reason=reason)


def _variant(problem: Problem, device: Device) -> tuple[str, str]:
    if problem.m <= 16:
        return "warp_k", "up to 16 tokens: the weights' bytes decide, warps split K and share no fragment of x"
    if problem.m <= DENSE_FROM[family(device.arch)]:
        return "rows", "some tokens: still fewer instructions for dequantizing than for the product"
    return "dense", "many tokens: dequantizing once costs less than in every tile"


# Beyond these, dequantizing once and cuBLAS win: 2.5 bytes a weight are moved once, against an unpacking for every 64
# tokens. Derived, not measured: arithmetic in docs/kernels.md.
DENSE_FROM = {80: 512, 86: 512, 89: 512, 90: 512, 100: 256, 120: 512}


def _warp_k(problem: Problem, device: Device, reason: str) -> Choice:
    block_m = 8 if problem.m <= 8 else 16
    tiles_m = -(-problem.m // block_m)
    row_blocks, warps, stages = _warp_k_rows(problem, device, block_m, tiles_m)
    k_blocks = -(-problem.k // block_inputs(problem.bits))
    while warps > 1 and warps > k_blocks:
        warps //= 2
    split = _split(problem, device, tiles_m, row_blocks, k_blocks // warps)
    return Choice("warp_k", block_m, row_blocks, warps, stages, split, reason)


def _warp_k_rows(problem: Problem, device: Device, block_m: int, tiles_m: int) -> tuple[int, int, int]:
    """Row blocks, warps and stages. Tall tiles take fewer instructions per weight, but there must be enough of them."""
    small = SHARED_LIMIT[family(device.arch)] < 128 * 1024
    wide = block_inputs(problem.bits) > 128  # 2 and 3 bits: twice the x per block, and more registers
    tiles = tiles_m * -(-problem.n // (ROWS * 4))
    # x goes through the L2 cache once for every tile: with too few rows it would be most of the traffic.
    least = 1 if problem.m <= 4 and family(device.arch) != 100 else 2 if problem.m <= 8 or wide else 4
    # Of 3 bits eight groups in a step, too, have no registers for 64 rows.
    crowded = problem.bits == 3 and (small or problem.group_size == 32)
    most = 2 if wide and (block_m == 16 or crowded) else 4
    row_blocks = min(max(4 if tiles >= 2 * device.sm_count else 2 if 2 * tiles >= device.sm_count else 1, least), most)
    if row_blocks == 4 and problem.bits == 8 and block_m == 8:
        return 4, 8, 3  # with 4 warps two registers spill
    tight = problem.bits == 4 and problem.group_size == 32 and block_m == 8 and family(device.arch) == 80
    if row_blocks == 4 and tight and _spilling_release():
        return 4, 8, 3
    if row_blocks == 4:
        # On sm_120 two programs of two stages have as many bytes on their way as one of three, and registers to spare.
        paired = family(device.arch) == 120 and block_m == 16 and tiles >= 2 * device.sm_count
        return 4, 4, 2 if paired else 3 if block_m == 16 or small else 4
    if wide and problem.bits == 2 and block_m == 16 and family(device.arch) == 100 and _spilling_release():
        return row_blocks, 4, 2
    if wide:
        return row_blocks, 4, 3 if small or block_m == 16 else 4
    if small:
        return row_blocks, 4, 4
    return (2, 8, 3 if block_m == 16 else 4) if row_blocks == 2 else (1, 8, 5)


def _rows_block_m(problem: Problem, device: Device) -> int:
    if problem.m <= 16:
        return 16
    wide = block_inputs(problem.bits) > 128
    if problem.bits == 8 and problem.group_size == 128 and family(device.arch) == 120 and _spilling_release():
        return 64  # every tile of 32 spills
    if problem.m <= 32 or wide or family(device.arch) == 120:
        return 32
    if problem.group_size == 32 and family(device.arch) == 90:
        return 64  # with four groups in a step the sums of 128 tokens spill
    if family(device.arch) == 80 and (
        problem.group_size == 64 or -(-problem.m // 128) * -(-problem.n // 128) < device.sm_count
    ):
        return 64  # smaller groups, and a tile that several programs share, have no registers for 128 tokens
    return 128 if problem.m >= 128 and family(device.arch) in (80, 90) else 64


def _rows(problem: Problem, device: Device, block_m: int, tiles_m: int, reason: str) -> Choice:
    arch, wide = family(device.arch), block_inputs(problem.bits) > 128
    row_blocks, warps = 8, _rows_warps(problem, arch, block_m)
    if (wide and arch in (80, 90, 120) and problem.group_size in (32, 64)) or (
        problem.group_size == 32 and problem.bits == 3 and arch != 100
    ):
        row_blocks = 4  # four or eight groups in a step: the scales of 128 rows spill
    if block_m < 128 and tiles_m * -(-problem.n // (ROWS * row_blocks)) < device.sm_count:
        row_blocks, warps = 4, 4
        if problem.bits == 3 and problem.group_size is None and arch == 80 and _spilling_release():
            row_blocks, warps = 8, 8  # four warps of 64 rows spill
    stages = 3 if SHARED_LIMIT[arch] < 128 * 1024 or wide or block_m == 128 else 4
    if _spills(problem, block_m) and arch in (100, 120) and row_blocks == 8:
        stages = 2
    k_blocks = -(-problem.k // block_inputs(problem.bits))
    split = _split(problem, device, tiles_m, row_blocks, k_blocks)
    return Choice("rows", block_m, row_blocks, warps, stages, split, reason)


def _rows_warps(problem: Problem, arch: int, block_m: int) -> int:
    """Warps of 128 rows. Where the registers of four do not suffice, eight take a third more instructions."""
    crowded = block_m == 64 and ((problem.group_size == 32 and arch != 100) or (problem.bits == 8 and arch == 120))
    return 8 if block_m == 128 or crowded or (_spills(problem, block_m) and arch == 80) else 4


def _spills(problem: Problem, block_m: int) -> bool:
    """Whether the tile that fits best, 32 tokens, spills on sm_80, 100 and 120 with some releases."""
    half = problem.bits == 4 and problem.group_size == 64 and problem.dtype == torch.float16
    return half and block_m == 32 and _spilling_release()


def _spilling_release() -> bool:
    """See `common.releases`: a ptxas that rather spills a register than leave out a program."""
    return triton_release() < (3, 8)


def _split(problem: Problem, device: Device, tiles_m: int, row_blocks: int, steps: int) -> int:
    """Programs per tile, 1, 2 or 4: more while multiprocessors would be idle and each program keeps two steps."""
    tiles = tiles_m * -(-problem.n // (ROWS * row_blocks))
    split = 1
    while split < MAX_SPLIT and tiles * split * 2 <= device.sm_count * 2 and tiles * split < device.sm_count:
        if steps // (split * 2) < 2:
            break
        split *= 2
    return split
