"""Which tiles `tune` measures for a problem, and in which order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from ..common import choices
from ..common.choices import Choice, Device, Problem
from ..weight_only import estimate, tiles

__all__ = ["MOST", "bare", "candidates", "estimated_us"]

MOST = 16
SPLITS = (1, 2, 4, estimate.MAX_SPLIT)
# Tiles of so many rows that the activations' way through the L2 cache counts little, with the stages that fit.
_WIDE = (
    Choice("warp_k", 8, 8, 4, 3),
    Choice("warp_k", 16, 8, 4, 3),
    Choice("rows", 16, 16, 8, 6),
    Choice("rows", 32, 16, 8, 5),
    Choice("rows", 64, 16, 8, 5),
)


def candidates(problem: Problem, device: Device, most: int = MOST) -> list[Choice]:
    """What is worth measuring, each tile once: at most `most`.

    The rules' own choice comes first. Then come the tiles that have an estimate, the fastest first. What has none comes
    last: `dense`, then the tiles that differ least from what the rules choose.
    """
    rules = tiles.choose(problem, device)
    found = _wide(problem)
    known = _estimated(problem, device)
    found += known or _grid(problem)
    if problem.m >= 16:
        found.append(Choice("dense"))
    # Where the rules take `dense`, the tile that they would take otherwise.
    anchor = tiles.choose(problem, device, "rows") if rules.variant == "dense" else rules

    def rank(choice: Choice) -> tuple[float, float]:
        microseconds = estimated_us(problem, choice, device)
        return math.inf if microseconds is None else microseconds, _distance(choice, anchor)

    sensible = {bare(choice): None for choice in found if _is_sensible(choice, problem, device)}
    sensible.pop(bare(rules), None)
    return [rules, *sorted(sensible, key=rank)][:most]


def bare(choice: Choice) -> Choice:
    """A choice without its reason: what is launched."""
    return replace(choice, reason="")


def estimated_us(problem: Problem, choice: Choice, device: Device) -> float | None:
    """What `weight_only.estimate` expects; None for what it does not know."""
    if not _has_estimates(problem, device) or choice.variant == "dense":
        return None
    try:
        return estimate.estimate(problem, choice, device).microseconds
    except (KeyError, ValueError):
        return None


def _has_estimates(problem: Problem, device: Device) -> bool:
    return choices.family(device.arch) == 90 and problem.m <= estimate.MAX_TOKENS


def _estimated(problem: Problem, device: Device) -> list[Choice]:
    return estimate.candidates(problem, device) if _has_estimates(problem, device) else []


def _wide(problem: Problem) -> list[Choice]:
    return [
        replace(tile, split=split)
        for tile in _WIDE
        for split in SPLITS
        if problem.m <= tile.block_m and (2 * problem.m > tile.block_m or _is_least(tile))
    ]


def _is_least(tile: Choice) -> bool:
    return tile.block_m == min(other.block_m for other in _WIDE if other.variant == tile.variant)


def _grid(problem: Problem) -> list[Choice]:
    """All combinations, for problems without an estimate."""
    found: list[Choice] = []
    if problem.m <= 64:
        block_m = 8 if problem.m <= 8 else 16
        for row_blocks, warps, stages, split in itertools.product((1, 2, 4), (4, 8), (2, 3, 4, 5), SPLITS):
            found.append(Choice("warp_k", block_m, row_blocks, warps, stages, split))
    if problem.m > 4:
        blocks = [block for block in (16, 32, 64, 128) if block == 16 or block < 2 * problem.m]
        shapes = ((4, 4), (8, 4), (8, 8), (16, 8))
        for block_m, (row_blocks, warps), stages, split in itertools.product(blocks, shapes, (2, 3, 4), SPLITS):
            found.append(Choice("rows", block_m, row_blocks, warps, stages, split))
    return found


def _is_sensible(choice: Choice, problem: Problem, device: Device) -> bool:
    """Whether every program has something to do, and a split has multiprocessors to fill."""
    if choice.variant == "dense":
        return True
    k_blocks = -(-problem.k // tiles.block_inputs(problem.bits))
    steps = k_blocks // (choice.split * (choice.num_warps if choice.variant == "warp_k" else 1))
    tiles_m = -(-problem.m // choice.block_m)
    programs = tiles_m * -(-problem.n // (tiles.ROWS * choice.row_blocks)) * choice.split
    # A split for its own sake only moves partial sums.
    return steps >= 1 and (choice.split == 1 or programs <= 4 * device.sm_count)


def _distance(choice: Choice, anchor: Choice) -> float:
    """How many times settings are doubled or halved from one tile to the other; less than 0 for `dense`."""
    if choice.variant == "dense":
        return -1.0
    doublings = sum(
        abs(math.log2(getattr(choice, name) / getattr(anchor, name)))
        for name in ("block_m", "row_blocks", "num_warps", "split")
    )
    return doublings + abs(choice.num_stages - anchor.num_stages) + 4 * (choice.variant != anchor.variant)
