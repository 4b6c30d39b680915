"""Tiles that won in `tune` against those of the rules once more, later: what does not hold leaves the table."""

from __future__ import annotations

from sliderquant_kernels.tools.tune import retime
from sliderquant_kernels.tools.tune_candidates import bare

from .context import Context, OutOfTime
from .tune import Place, name_of

__all__ = ["run"]

# What one takes, compiled as it is.
WIN_SECONDS = 4.0


def run(context: Context) -> None:
    """Add a row for every win that was measured again."""
    place = Place(context)
    wins = [
        outcome
        for outcome in place.outcomes()
        if outcome.best is not None and bare(outcome.best) != bare(outcome.rules_choice)
        and not context.has(name_of(outcome.problem))
    ]  # fmt: skip
    for number, outcome in enumerate(wins):
        if context.left < WIN_SECONDS:
            raise OutOfTime(f"{len(wins) - number} of {len(wins)} wins are left")
        # One by one, so that its row is kept when it is there.
        found = retime([outcome], place.device, place.measurer, place.table, log=place.log, **place.about)
        # None: an earlier attempt has taken it out of the table, and ended before it said so.
        row = {"ratio": found[0].ratio, "holds": found[0].holds} if found else {"ratio": None, "holds": False}
        context.add(name_of(outcome.problem), row)
