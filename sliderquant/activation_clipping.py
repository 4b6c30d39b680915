"""Learned clipping of the ranges of what is rounded while the model runs: of the inputs of linears, and of queries,
keys and values.

A row x, a token or a head of a token, is rounded to the grid of `[c_low * min(x, 0), c_high * max(x, 0)]`. The factors
are two for all rows of a site: of the linears that read one input, or of the queries, keys or values of a layer. They
are the sigmoids, in fp32, of what is learned, and they are what is stored: a loaded model multiplies with the same
numbers.
"""

import torch
from torch import Tensor, nn

from sliderquant.errors import CheckpointError

__all__ = ["ATTENTION_SITES", "CLIP_DTYPE", "ActivationClipping", "Clip", "clip_from", "clip_tensor"]

Clip = tuple[float, float]
"""Factors on the lower and the upper end of a range: numbers that fp32 holds, above 0 and at most 1."""

CLIP_DTYPE = torch.float32
"""In which factors are stored, whatever the dtype of the model."""


ATTENTION_SITES = ("query", "key", "value")
"""What attention rounds, each with a clipping of its own, the tensor `query_clip` and so on."""


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


def clip_tensor(clip: Clip) -> Tensor:
    """As it is stored, fp32 `[2]`: exactly."""
    return torch.tensor(clip, dtype=CLIP_DTYPE)


def clip_from(tensor: Tensor, name: str) -> Clip:
    """The factors that a tensor `name` of a checkpoint holds.

    Raises:
        CheckpointError: it is not fp32 `[2]`, or a factor is not above 0 and at most 1.
    """
    if tensor.dtype != CLIP_DTYPE or tensor.shape != (2,):
        raise CheckpointError(
            f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected float32 [2]"
        )
    low, high = tensor.tolist()
    if not (0 < low <= 1 and 0 < high <= 1):
        raise CheckpointError(f"tensor {name} is {[low, high]}, expected two factors above 0 and at most 1")
    return low, high
