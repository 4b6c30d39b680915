"""Learned clipping of the ranges of what is rounded while the model runs: of the inputs of linears, and of queries,
keys and values.

A row x, a token or a head of a token, is rounded to the grid of `[c_low * min(x, 0), c_high * max(x, 0)]`. The factors
are two for all rows of a site: of the linears that read one input, or of the queries, keys or values of a layer. They
are the sigmoids, in fp32, of what is learned, and they are what is stored: a loaded model multiplies with the same
numbers.
"""

import torch
from torch import Tensor, nn

from sliderquant.checkpoint.clips import CLIP_DTYPE

__all__ = ["ActivationClipping"]


class ActivationClipping(nn.Module):
    """The factors of one site, while they are learned.

    Attributes:
        low, high: fp32 `[]`, before the sigmoid.
    """

    def __init__(self, start: float) -> None:
        """
        Args:
            start: of both, before the sigmoid.
        """
        super().__init__()
        self.low, self.high = (nn.Parameter(torch.tensor(start, dtype=CLIP_DTYPE)) for _ in range(2))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The factors, fp32 `[]`."""
        return torch.sigmoid(self.low), torch.sigmoid(self.high)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The factors as they are stored, fp32 `[2]`."""
        return torch.stack(self())
