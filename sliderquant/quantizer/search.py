"""The range of every group of a weight that rounds it best, found by trying shares of it."""

import torch
from torch import Tensor

from sliderquant.quantizer.grids import clipped_grid, dequantize, in_groups, quantize
from sliderquant.schemes import Scheme

__all__ = ["search_clipping"]

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
