"""Where the learned clipping starts, if not at a fixed share of each range: where a search over shares finds the
least error.

The error of a row of weights w on inputs x, with the inputs' correlations left out, is sum_j E[x_j^2] (w^_j - w_j)^2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sliderquant.calibration.observing import watched_inputs
from sliderquant.quantizer.search import search_clipping
from sliderquant.refine.linear import RefinedLinear
from sliderquant.refine.weights import refined_weight

__all__ = ["start_from_search"]


@contextmanager
def start_from_search(linears: Mapping[str, RefinedLinear]) -> Iterator[None]:
    """Within it the `RefinedLinear`s of a layer, unquantized, see their calibration inputs; afterwards the clipping of
    each starts where the search says."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(linears, 0)

    def see(name: str, rows: Tensor) -> None:
        sums[name] = sums.get(name, 0) + rows.square().sum(0)
        tokens[name] += len(rows)

    with watched_inputs(linears, see):
        yield
    with torch.no_grad():
        for name, linear in linears.items():
            learned, importance = linear.learned_weight(), sums[name] / tokens[name]
            if learned.column is not None:
                importance = importance / learned.column.square()
            found = search_clipping(refined_weight(learned), importance, linear.scheme, linear.stored_dtype)
            assert linear.clip_low is not None
            assert linear.clip_high is not None
            linear.clip_low.copy_(found)
            linear.clip_high.copy_(found)
