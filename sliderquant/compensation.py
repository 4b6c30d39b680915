"""Where the offsets of weights start, if not at 0: where rounding makes up for the errors of the columns before.

What GPTQ (arXiv 2210.17323) makes of every weight just before it rounds it: rounding that to nearest is GPTQ's result,
and learning can go on from there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sliderquant.baselines.gptq import gptq
from sliderquant.observing import watched_inputs
from sliderquant.refined_weights import refined_weight

__all__ = ["input_grams", "start_from_compensation"]

_DAMPING = 0.01


@contextmanager
def input_grams(linears: Mapping[str, Any], shared: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
    """Within it the `RefinedLinear`s of a layer, unquantized, see their calibration inputs: X^T X of each, fp32
    `[in, in]`, by name.

    Args:
        shared: names of linears that read the same input.
    """
    grams: dict[str, Tensor] = {}
    first_of = {name: names[0] for names in shared for name in names}

    def see(name: str, rows: Tensor) -> None:
        grams[name] = grams[name].addmm_(rows.T, rows) if name in grams else rows.T @ rows

    firsts = sorted({first_of.get(name, name) for name in linears})
    with watched_inputs({name: linears[name] for name in firsts}, see):
        yield grams
    for name in linears:
        grams[name] = grams[first_of.get(name, name)]


@torch.no_grad()
def start_from_compensation(linears: Mapping[str, Any], grams: Mapping[str, Tensor]) -> None:
    """Put the offsets of started `RefinedLinear`s to where compensated rounding to their grids has them.

    Args:
        grams: X^T X of their inputs, not divided by any channel scales.
    """
    for name, linear in linears.items():
        learned, gram = linear.learned_weight(), grams[name]
        if learned.column is not None:
            gram = gram / learned.column / learned.column[:, None]
        refined = refined_weight(learned)
        grid = linear.grid(refined)
        latent = gptq(refined, gram, linear.scheme, linear.stored_dtype, _DAMPING, grid=grid).latent
        linear.offset.copy_((latent - refined) / linear.step[:, None])
