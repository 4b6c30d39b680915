"""Where the learned clipping starts, if not at a fixed share of each range: where a search over shares finds the
least error.

The error of a row of weights w on inputs x, with the inputs' correlations left out, is sum_j E[x_j^2] (w^_j - w_j)^2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sliderquant.observing import watched_inputs
from sliderquant.quantizer import clipped_grid, dequantize, in_groups, quantize
from sliderquant.refined_weights import refined_weight
from sliderquant.schemes import Scheme

__all__ = ["search_clipping", "start_from_search"]

_SHARES = tuple(1 - 0.04 * step for step in range(20))
_LARGEST = 0.982  # sigmoid(4), the published start: beyond it the sigmoid passes hardly any gradient


@torch.no_grad()
def search_clipping(weight: Tensor, importance: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The share of its range that each group is best clipped to, at both ends alike, as logits.

    Args:
        weight: fp32 `[out, in]`.
        importance: E[x_j^2], fp32 `[in]`.
        dtype: in which scales are stored.

    Returns:
        fp32 `[out, groups]`, before the sigmoid.
    """
    best = weight.new_full((len(weight), scheme.groups(weight.shape[1])), _LARGEST)
    least = torch.full_like(best, torch.inf)
    for share in (_LARGEST, *_SHARES[1:]):
        logit = torch.full_like(best, share).logit()
        grid = clipped_grid(weight, logit, logit, scheme, dtype)
        difference = dequantize(quantize(weight, grid, scheme, dtype), scheme).sub_(weight)
        error = in_groups(difference.square_().mul_(importance), scheme).sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, share, best)
    return best.logit()


@contextmanager
def start_from_search(linears: Mapping[str, Any]) -> Iterator[None]:
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
            linear.clip_low.copy_(found)
            linear.clip_high.copy_(found)
