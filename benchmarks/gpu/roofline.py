"""What this GPU does at best, measured before the kernels are: the figures that theirs are compared with."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels.harness import floors
from sliderquant_kernels.tools import timing
from sliderquant_kernels.tools.timing import Settings, in_graphs, in_turns, quantiles

from .context import Context

__all__ = ["run"]

# Stays in the L2 cache of every GPU that the kernels are for.
RESIDENT_BYTES = 20 << 20
INT8_SIDE = 8192
# One launch reads it so often: what a launch costs is then small beside it.
READS = 16
# With less than this, a row is left for another attempt.
ROW_SECONDS = 3.0
SETTINGS = Settings(graph_us=2000.0, budget_us=100_000.0)
REHEARSED = Settings(budget_us=1000.0, fewest_samples=2, most_samples=2)


def run(context: Context) -> None:
    """Add a row for each roof."""
    if not context.has("floors"):
        settings, size = (REHEARSED, 1 << 20) if context.rehearsal else (floors.SETTINGS, None)
        found = floors.measure(context.device, settings=settings, size=size)
        context.add("floors", found.as_dict())
        print(found, flush=True)
    if not context.has("L2"):
        context.need(ROW_SECONDS)
        us = resident_read_us(context)
        context.add("L2", {"gbps": READS * RESIDENT_BYTES / us / 1e3, "bytes": RESIDENT_BYTES})
    if not context.has("int8"):
        context.need(ROW_SECONDS)
        side = 64 if context.rehearsal else INT8_SIDE
        left, right = (
            torch.randint(-127, 128, (side, side), dtype=torch.int8, device=context.device) for _ in range(2)
        )
        # Both along K, which cuBLAS multiplies fastest.
        us = _median_us(partial(torch._int_mm, left, right.t()), 500.0, context)
        context.add("int8", {"tops": 2 * side**3 / us / 1e6, "side": side})
    if not context.has("host"):
        context.need(ROW_SECONDS)
        from benchmarks.speed import host  # with transformers, which takes seconds to import

        rounds, calls = (2, 2) if context.rehearsal else (9, 200)
        rows = host.measure(context.device, rounds, calls)
        context.add("host", {"us": {f"{row['call']}, {row['route']}": round(row["us"], 2) for row in rows}})


def resident_read_us(context: Context) -> float:
    """Microseconds of reading what lies in the L2 cache `READS` times, by a reduction of long rows."""
    values = torch.randint(0, 256, (RESIDENT_BYTES,), dtype=torch.uint8, device=context.device).view(torch.int32)
    rows = values.view(-1, 1 << 12).expand(READS, -1, -1)
    largest = torch.empty(rows.shape[:2], dtype=torch.int32, device=context.device)
    return _median_us(partial(torch.amax, rows, 2, out=largest), 50.0, context)


def _median_us(call: partial, floor_us: float, context: Context) -> float:
    call()
    if context.rehearsal:
        return quantiles(in_turns([call], None, REHEARSED).samples)[1]
    return quantiles(in_graphs([call], floor_us, timing.Cuda(), SETTINGS).samples)[1]
