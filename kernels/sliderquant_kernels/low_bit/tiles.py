"""Which kernel and tile a low-bit linear takes: a pure function, as in `weight_only.tiles`."""

from __future__ import annotations

from functools import lru_cache

from ..common.choices import SHARED_LIMIT, Choice, Device, family
from ..common.releases import triton_release
from .fragments import ROWS, block_inputs

VARIANTS = ("warp_k", "rows", "tiles")


def _tiles_from(device: Device) -> int | None:
    """Tokens from which weights are expanded to int8 before the product; None: never.

    Expanding moves 12 bits of every weight. On sm_90 `rows` multiplies packed ones at 12.1 instead of 8.8 thread
    instructions per 1000 products, of 31 that there are slots for, and waits as often: below, expanding cost more than
    5% of the launch on an H200. tcgen05 takes no left operand from registers; `common.releases` says which have it.
    """
    arch = family(device.arch)
    if arch == 100 and triton_release() >= (3, 8):
        return 512
    return 4096 if arch == 90 else None


@lru_cache(maxsize=4096)
def choose_low_bit(
    m: int, n: int, k: int, bits: int, group_size: int | None, device: Device, variant: str | None = None
) -> Choice:
    """The kernel and tile for `m` tokens and a weight `[n, k]`.

    Args:
        variant: one of `VARIANTS` to be used whatever the rules say; None: the best.

    Raises:
        ValueError: the variant does not exist or cannot compute the problem.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)} or None, got {variant!r}")
    if variant == "tiles" and group_size is not None:
        raise ValueError("variant: 'tiles' has no groups; use 'rows', or weights per channel")
    reason = "asked for"
    if variant is None:
        variant, reason = "rows", "some tokens, or many where packed weights multiply best"
        if m <= 16:
            variant, reason = "warp_k", "up to 16 tokens: the weights' bytes decide"
        # Rows of expanded codes that are no multiple of 16 bytes apart cannot be copied 16 bytes at a time, and spill.
        elif group_size is None and k % 16 == 0 and m >= (_tiles_from(device) or m + 1):
            variant, reason = "tiles", "many tokens: weights are expanded to int8 once"
    if variant == "warp_k":
        return _warp_k(m, n, k, bits, group_size, device, reason)
    if variant == "rows":
        return _rows(m, n, group_size, device, reason)
    return Choice("tiles", 128, 8, 8, 3, reason=reason)


def _warp_k(m: int, n: int, k: int, bits: int, group_size: int | None, device: Device, reason: str) -> Choice:
    block_m = 8 if m <= 8 else 16
    row_blocks, warps, stages = _tall(n, device) if block_m == 16 and group_size is None else _flat(m, n, device)
    while warps > 1 and warps > -(-k // block_inputs(bits)):
        warps //= 2
    return Choice("warp_k", block_m, row_blocks, warps, stages, reason=reason)


def _flat(m: int, n: int, device: Device) -> tuple[int, int, int]:
    """Row blocks, warps and stages up to 8 tokens, and in groups, where the loop has no registers for taller tiles."""
    tiles, stages = -(-n // (ROWS * 4)), 4 if m <= 8 else 3
    # On an H200 a W4A16 linear took a third less time in 224 programs of 4 warps than in 448 of 8 warps.
    if 2 * tiles >= 3 * device.sm_count:
        return 4, 4, stages
    return (2 if 2 * tiles >= device.sm_count else 1), 8, stages


def _tall(n: int, device: Device) -> tuple[int, int, int]:
    """Row blocks, warps and stages for 9 to 16 tokens.

    Every program reads all of x, 32 bytes of a token at a time and past the L1 cache; of 8 tokens they are copied in
    smaller pieces, which go through it. On an H200 weights of 14336 and of 28672 rows, in 448 programs each, took the
    same 33 to 38 us: the programs counted, and not the weight's bytes. So this is the tallest tile that leaves nearly
    every multiprocessor a program.
    """
    small = SHARED_LIMIT[family(device.arch)] < 128 * 1024
    for row_blocks in (8, 4):
        if 2 * -(-n // (ROWS * row_blocks)) >= 3 * device.sm_count:
            return row_blocks, 4, 3 if row_blocks == 8 or small else 4
    # One program alone has twice the warps, for as many bytes on their way.
    row_blocks = next((some for some in (4, 2) if 4 * -(-n // (ROWS * some)) >= 3 * device.sm_count), 1)
    return row_blocks, 8, 3 if small else 4


def _rows(m: int, n: int, group_size: int | None, device: Device, reason: str) -> Choice:
    block_m = 32 if m <= 32 else 64 if m <= 64 or group_size is not None else 128
    # Tiles of 128 x 128 read least through the L2 cache, but a third of the multiprocessors has to have one.
    if block_m == 128 and 3 * -(-m // 128) * -(-n // (ROWS * 8)) < device.sm_count:
        block_m = 64
    row_blocks, warps = 8, 8 if block_m == 128 else 4
    if block_m < 128 and -(-m // block_m) * -(-n // (ROWS * row_blocks)) < device.sm_count:
        row_blocks = 4
    return Choice("rows", block_m, row_blocks, warps, 3 if block_m == 128 else 4, reason=reason)
