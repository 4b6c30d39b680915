"""Progressive hardening: as a stage goes on, more and more weights stay where they are.

Towards the end of learning few weights change their code any more, but noise moves those near the middle of two codes
back and forth, and with them what their neighbours are fitted to. So at given steps the weights of every row that are
nearest to points of their grid keep their offsets V until the stage ends, and the rest is fitted to what they are.

Source: the progressive rounding of TesseraQ (arXiv 2410.19103), there for rounding variables of single blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sliderquant.refine.linear import RefinedLinear
from sliderquant.refine.weights import refined_weight

__all__ = ["SCHEDULE", "Hardening"]

SCHEDULE = ((0.4, 0.5), (0.6, 0.8), (0.8, 0.95))
"""After which share of the steps which share of every row's weights stays."""

_SORTED_AT_ONCE = 1 << 24


class Hardening:
    """Of the linears of a window whose weights have offsets, in one stage."""

    def __init__(self, linears: Sequence[RefinedLinear], steps: int) -> None:
        """
        Args:
            steps: of the optimizer, in the whole stage.
        """
        self.linears = [linear for linear in linears if linear.offset is not None]
        self.shares = {int(after * steps): share for after, share in SCHEDULE}
        self.taken = 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # which weights of each linear stay, and the offsets at that time

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after every step of the optimizer."""
        self.taken += 1
        offsets: list[Tensor] = [linear.offset for linear in self.linears]  # type: ignore[misc]
        for offset, (stays, kept) in zip(offsets, self.kept, strict=False):
            torch.where(stays, kept, offset, out=offset)
        if self.taken in self.shares:
            share = self.shares[self.taken]
            self.kept = [(_nearest(linear, share), linear.offset.clone()) for linear in self.linears]  # type: ignore[union-attr]


def _nearest(linear: RefinedLinear, share: float) -> Tensor:
    """Bool `[out, in]`: of the weights of every row that pass through the quantizer the share that is nearest to points
    of their grid, at least one each; of several at the same distance all."""
    refined = refined_weight(linear.learned_weight())
    scale = linear.grid(refined).scale
    steps = refined.view(len(refined), scale.shape[1], -1) / scale[..., None]
    passed = round(linear.fraction * refined.shape[1])
    distance = (steps - steps.round()).abs_().view(refined.shape)[:, :passed]
    count = max(int(share * passed), 1)
    rows = max(_SORTED_AT_ONCE // passed, 1)
    limits = [_smallest(some, count) for some in distance.split(rows)]
    return F.pad(distance <= torch.cat(limits), (0, refined.shape[1] - passed))


def _smallest(values: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of every row: `[rows, n]` -> `[rows, 1]`."""
    if values.device.type == "cpu":
        # It takes a thirtieth of the time of torch's sort, and a tenth of kthvalue's.
        return torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1 : count])
    return values.sort(dim=1).values[:, count - 1 : count]
