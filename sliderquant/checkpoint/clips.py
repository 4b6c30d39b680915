"""The factors on the ranges of activations, queries, keys and values, as a checkpoint stores them."""

import torch
from torch import Tensor

from sliderquant.errors import CheckpointError

__all__ = ["ATTENTION_SITES", "CLIP_DTYPE", "Clip", "clip_from", "clip_tensor"]

Clip = tuple[float, float]
"""Factors on the lower and the upper end of a range: numbers that fp32 holds, above 0 and at most 1."""
CLIP_DTYPE = torch.float32
"""In which factors are stored, whatever the dtype of the model."""
ATTENTION_SITES = ("query", "key", "value")
"""What attention rounds, each with a clipping of its own, the tensor `query_clip` and so on."""


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
