"""How long a weight-only launch of up to 64 tokens takes on sm_90, by count. The rules of `tiles` choose by it.

A multiprocessor holds `programs` programs at a time; where the grid has more than all of them hold, another round
begins when a program ends. The time of a launch is

    START + sum over the rounds of (OVERHEAD + bytes of the round / rate)

with the bytes of packed weight that the busiest multiprocessor streams in the round. The least of four rates limits it,
and others that are close to the least slow it further: its inverse is the norm of order `SHARPNESS` of their inverses.

- memory: its share of `MEMORY`;
- latency: the bytes that the pipelines of its programs have in flight, over `LATENCY` (Little's law);
- L2 cache: its share of `L2`, through which the activations of every tile come as well as the weights;
- issue: its four schedulers at `ISSUE` of their slots, by the instructions of the main loop per 16 packed bytes.

What a program takes of a multiprocessor comes from `resources.json`, which `tools.estimate` compiles. The constants
are fitted to what `python -m benchmarks kernels --subset quick` measured on an H200 in two runs
(benchmarks/results/nvidia-h200): least squares of logarithms over the rows of 4 and 2 bits, where all rows of a tile
and a shape with up to 4 tokens count as one, and so do those with more. The tests of this module compare each row with
its estimate. `UNTIMED` is not fitted.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..common.choices import Choice, Device, Problem
from ..common.releases import triton_release
from .fragments import ROWS, block_bytes, block_inputs

__all__ = ["Estimate", "candidates", "estimate", "fastest"]

RESOURCES = Path(__file__).parent / "resources.json"
FIELDS = ("variant", "bits", "groups in a block of inputs", "block_m", "row_blocks", "warps", "registers",
           "registers where programs share a tile", "instructions per 16 packed bytes")  # fmt: skip
_Tile = tuple[str, int, int, int]
# Of one multiprocessor of sm_90: shared memory, of which a program reserves 1 KB, registers, warps, programs.
SHARED, RESERVED, REGISTERS, WARPS, PROGRAMS = 233472, 1024, 65536, 64, 32
SCHEDULERS, CLOCK = 4, 1.9e3  # cycles per microsecond
# Fitted, bytes per microsecond of the whole GPU, microseconds, and a share. cuBLAS reads 16-bit weights at 4.28e6.
MEMORY, L2, LATENCY, ISSUE = 3.72e6, 6.8e6, 1.34, 0.576
SHARPNESS = 12
START = 1.3
SPLIT_OVERHEAD = 1.5
MAX_TOKENS = 64
MAX_SPLIT = 8
# The loop of `rows` takes 5 to 20% fewer instructions than when it was timed, and waits once instead of four times.
# With this factor its estimates are on average what it took then.
UNTIMED = 1.04
# Up to 8 tokens, where most of what was timed is `warp_k`, `rows` has to be faster by this much.
FEW, AHEAD = 8, 1.04
# Estimates that are nearer to each other than this tell nothing apart.
TIE = 1.01


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        microseconds: of one launch with cold weights.
        bound: what decides most of it: `memory`, `latency`, `L2` or `issue`.
        programs: that a multiprocessor holds.
        rounds: of programs, one after the other.
        in_flight: packed bytes that the pipelines of these programs have under way.
    """

    microseconds: float
    bound: str
    programs: int
    rounds: int
    in_flight: int


def estimate(problem: Problem, choice: Choice, device: Device) -> Estimate:
    """The time of a `warp_k` or `rows` launch.

    Raises:
        KeyError: the tile is none of those that `resources.json` knows.
        ValueError: no multiprocessor holds a program of it.
    """
    taken = _resources(problem)[_key(choice)]
    programs = _programs(problem, choice, taken)
    if programs == 0:
        raise ValueError(
            f"choice: expected a tile that fits on a multiprocessor and spills no register, got {choice}; take fewer "
            "stages or split 1"
        )
    tiles_m, tiles_n = -(-problem.m // choice.block_m), -(-problem.n // (ROWS * choice.row_blocks))
    grid = tiles_m * tiles_n * choice.split
    k_blocks = -(-problem.k // block_inputs(problem.bits))
    warps = choice.num_warps if choice.variant == "warp_k" else 1
    steps = -(-k_blocks // (choice.split * warps))
    step_bytes = choice.row_blocks * warps * block_bytes(problem.bits)
    streamed = steps * step_bytes * (1 + scale_share(problem))
    # What passes the L2 cache per byte of weight: `warp_k` leaves out the tokens that are not there.
    tokens = min(problem.m, choice.block_m) if choice.variant == "warp_k" else choice.block_m
    through_l2 = 1 + tokens * 2 * block_inputs(problem.bits) / (choice.row_blocks * block_bytes(problem.bits))
    untimed = UNTIMED if choice.variant == "rows" else 1.0
    total, rounds, left = START, 0, -(-grid // device.sm_count)
    if choice.split > 1:  # fp32 sums are written and read again, most of them in the L2 cache
        total += SPLIT_OVERHEAD + 2 * choice.split * problem.m * problem.n * 4 / L2
    spent: dict[str, float] = {}
    while left > 0:
        held = min(programs, left)
        # In the last round a multiprocessor may have one program less than the busiest one.
        flight = min(held, grid / device.sm_count) * (choice.num_stages - 1) * step_bytes
        rates = {
            "memory": MEMORY / device.sm_count,
            "latency": flight / LATENCY,
            "L2": L2 / device.sm_count / through_l2,
            "issue": 16 * 32 * SCHEDULERS * CLOCK * ISSUE / taken.per_16_bytes,
        }
        bound = min(rates, key=lambda name: rates[name])
        slowed = sum((rates[bound] / rate) ** SHARPNESS for rate in rates.values()) ** (1 / SHARPNESS)
        streaming = held * streamed / rates[bound] * slowed * untimed
        spent[bound] = spent.get(bound, 0.0) + streaming
        total += _overhead(choice) + streaming
        rounds, left = rounds + 1, left - held
    in_flight = programs * (choice.num_stages - 1) * step_bytes
    return Estimate(total, max(spent, key=lambda name: spent[name]), programs, rounds, in_flight)


def _overhead(choice: Choice) -> float:
    """Microseconds of a round aside from its main loop: filling the pipeline, adding up what warps hold, storing."""
    if choice.variant == "rows":
        return 1.3
    return 2.8 if choice.num_warps <= 4 and choice.block_m == 8 else 5.2


def scale_share(problem: Problem) -> float:
    """Bytes of scales and zero-points per byte of codes."""
    if problem.group_size is None:
        return 0.0
    return (2 if problem.symmetric else 4) * 8 / (problem.group_size * problem.bits)


def _programs(problem: Problem, choice: Choice, taken: _Resources) -> int:
    """Programs that a multiprocessor holds at a time."""
    rows, inputs = ROWS * choice.row_blocks, block_inputs(problem.bits)
    weight, x = choice.row_blocks * block_bytes(problem.bits), inputs * choice.block_m * 2
    # One scale a row and group, with its zero-point; that of a whole row is not in the loop.
    scales = 0 if problem.group_size is None else (2 if problem.symmetric else 4) * _groups(problem)
    stages = choice.num_stages
    if choice.variant == "warp_k":
        shared = (stages - 1) * choice.num_warps * (weight + x + scales * max(rows, 32))
    else:
        # Of more than four groups Triton 3.6 keeps a step more, and 3.9 does not.
        ahead = stages if _groups(problem) > 4 and triton_release() < (3, 8) else stages - 1
        # Rows of x that do not begin at 16 bytes are not copied ahead.
        shared = ahead * (weight + scales * max(rows, 128)) + (1 if problem.k % 8 else stages) * x
    registers = taken.registers if choice.split == 1 else taken.shared_registers
    if registers == 0:
        return 0
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * choice.num_warps)
    return min(SHARED // (shared + RESERVED), by_registers, WARPS // choice.num_warps, PROGRAMS)


def _groups(problem: Problem) -> int:
    """Groups in a block of inputs."""
    return 1 if problem.group_size is None else max(1, block_inputs(problem.bits) // problem.group_size)


def fastest(problem: Problem, device: Device, variants: tuple[str, ...]) -> Choice | None:
    """The candidate with the least estimate, or one that is as good (`TIE`); None for more tokens than `MAX_TOKENS`."""
    # The estimate for 5 tokens is that for 8: a new number of tokens is no reason to think again.
    tokens = 1 << (problem.m - 1).bit_length()
    return _fastest(replace(problem, m=tokens), device, variants) if tokens <= MAX_TOKENS else None


@lru_cache(maxsize=4096)
def _fastest(problem: Problem, device: Device, variants: tuple[str, ...]) -> Choice | None:
    found = [(estimate(problem, choice, device), choice) for choice in candidates(problem, device, variants)]
    if not found:
        return None

    def counted(taken: Estimate, choice: Choice) -> float:
        return taken.microseconds * (AHEAD if choice.variant == "rows" and problem.m <= FEW else 1.0)

    least = min(counted(*pair) for pair in found)
    near = [pair for pair in found if counted(*pair) <= least * TIE]
    # Of equals the one whose tiles the fewest programs and warps share, then that which a longer latency hurts least.
    best, choice = min(near, key=lambda pair: (pair[1].split, pair[1].num_warps, -pair[0].in_flight))
    return replace(choice, reason=f"best of {len(found)} estimates: {best.microseconds:.1f} us, by {best.bound}")


def candidates(problem: Problem, device: Device, variants: tuple[str, ...] = ("warp_k", "rows")) -> list[Choice]:
    """The tiles that are worth a thought for up to `MAX_TOKENS` tokens: they fit, and every program has some steps."""
    found: list[Choice] = []
    k_blocks = -(-problem.k // block_inputs(problem.bits))
    for (variant, block_m, row_blocks, warps), taken in _resources(problem).items():
        if variant not in variants or not _holds(variant, block_m, problem.m):
            continue
        # Two warps hide too little of the latency, except where a sixth or more of four warps' steps would be empty.
        if variant == "warp_k" and warps == 2 and (k_blocks % 4 not in (1, 2) or k_blocks > 10):
            continue
        for stages, split in itertools.product((3, 4, 5), (1, 2, 4, MAX_SPLIT) if taken.shared_registers else (1,)):
            choice = Choice(variant, block_m, row_blocks, warps, stages, split)
            steps = k_blocks // (split * (warps if variant == "warp_k" else 1))
            if (steps >= 2 or split == 1) and steps >= 1 and _programs(problem, choice, taken) > 0:
                found.append(choice)
    return found


def _holds(variant: str, block_m: int, m: int) -> bool:
    """Whether a tile of `block_m` tokens is the smallest that holds m, up to 16 for `warp_k` and from 16 for `rows`."""
    sizes = (8, 16) if variant == "warp_k" else (16, 32, 64)
    return block_m == min((size for size in sizes if size >= m), default=0)


def _key(choice: Choice) -> _Tile:
    return choice.variant, choice.block_m, choice.row_blocks, choice.num_warps


class _Resources(NamedTuple):
    """What a tile takes: registers of a thread, those where several programs share the K of a tile (0: it spills then),
    instructions per 16 packed bytes."""

    registers: int
    shared_registers: int
    per_16_bytes: float


def _resources(problem: Problem) -> dict[_Tile, _Resources]:
    """Of every tile that compiles without spilling; with another release of Triton than the one that compiled them not
    of those that take nearly all registers, nor of 128 rows of `warp_k` with four groups, which spill with 3.8."""
    table, release = _table()
    groups = _groups(problem)
    found = table.get((problem.bits, groups), {})
    if triton_release() == release:
        return found
    return {
        tile: taken if taken.shared_registers <= 248 else taken._replace(shared_registers=0)
        for tile, taken in found.items()
        if taken.registers <= 248 and not (tile[0] == "warp_k" and tile[2] == 8 and groups >= 4)
    }


@lru_cache(maxsize=1)
def _table() -> tuple[dict[tuple[int, int], dict[_Tile, _Resources]], tuple[int, ...]]:
    """By bits and groups in a block of inputs; and the release of Triton that compiled them."""
    content = json.loads(RESOURCES.read_text("utf-8"))
    table: dict[tuple[int, int], dict[_Tile, _Resources]] = {}
    for variant, bits, groups, block_m, row_blocks, warps, *taken in content["tiles"]:
        table.setdefault((bits, groups), {})[variant, block_m, row_blocks, warps] = _Resources(*taken)
    return table, tuple(int(part) for part in content["triton"].split(".")[:2])
