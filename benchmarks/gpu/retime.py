"""Tiles that won in `tune` against those of the rules once more, later: what does not hold leaves the table."""

from __future__ import annotations

from sliderquant_kernels.tune import retime
from sliderquant_kernels.tune_candidates import bare

from .context import Context, OutOfTime
from .tune import KEPT, Place, name_of

__all__ = ["run"]


def run(context: Context) -> None:
    """Add a row for every win that was measured again."""
    place = Place(context)
    wins = [
        outcome
        for outcome in place.outcomes()
        if outcome.best is not None and bare(outcome.best) != bare(outcome.rules_choice)
        and not context.has(name_of(outcome.problem))
    ]  # fmt: skip
    found = retime(wins, place.device, place.measurer, place.table, log=place.log, budget=context.left - KEPT,
                   **place.about)  # fmt: skip
    for each in found:
        context.add(name_of(each.problem), {"ratio": each.ratio, "holds": each.holds})
    if len(found) < len(wins):
        raise OutOfTime(f"{len(wins) - len(found)} of {len(wins)} wins are left")
