"""Which kernel and tile a low-bit linear takes: a pure function, as in `tiles`."""

from __future__ import annotations

from functools import lru_cache

from .int8_fragments import ROWS, block_inputs
from .releases import triton_release
from .tiles import SHARED_LIMIT, Choice, Device, family

VARIANTS = ("warp_k", "rows", "tiles")
# On these the int8 instruction reads both operands from shared memory at full speed, and Triton feeds it without
# detours; elsewhere the packed weight as left operand in registers compiles to less. Rows of expanded codes that are no
# multiple of 16 bytes apart cannot be copied 16 bytes at a time, and spill.
_WITH_TILES = (90, 100)
TILES_FROM = 512


def _has_wide_products(device: Device) -> bool:
    """Whether both operands of the widest int8 product come from shared memory; on sm_100 see `releases`."""
    arch = family(device.arch)
    return arch in _WITH_TILES and (arch != 100 or triton_release() >= (3, 8))


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
        elif m >= TILES_FROM and group_size is None and k % 16 == 0 and _has_wide_products(device):
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
    row_blocks, warps = 8, 8 if block_m == 128 else 4
    if block_m < 128 and -(-m // block_m) * -(-n // (ROWS * row_blocks)) < device.sm_count:
        row_blocks = 4
    return Choice("rows", block_m, row_blocks, warps, 3 if block_m == 128 else 4, reason=reason)
