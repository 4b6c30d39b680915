"""Attention of one token over keys and values in buffers longer than what is filled, as a captured step needs it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD, MOST_GROUPS = 256, 64


def fits(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether `decode_attention` computes these, on CUDA and without gradients."""
    return (
        q.is_cuda
        and q.dtype == keys.dtype == values.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] == 1
        and q.shape[3] == keys.shape[3] <= LARGEST_HEAD
        and values.shape[3] <= LARGEST_HEAD
        and keys.shape[:3] == values.shape[:3]
        and q.shape[0] == keys.shape[0]
        and q.shape[1] % keys.shape[1] == 0
        and q.shape[1] // keys.shape[1] <= MOST_GROUPS
        and all(x.stride(3) == 1 for x in (q, keys, values))
        and (mask is None or (mask.shape == (q.shape[0], 1, 1, keys.shape[2]) and mask.stride(3) == 1))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values)))
    )


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(q K^T * scale + mask) V over the first `index + 1` positions.

    The time goes by the positions that are filled, which the device knows, not by those that there are: one CUDA graph
    serves a generation.

    Args:
        q: fp16 or bf16 `[batch, heads * groups, 1, D]`; `groups` query heads share one head of keys.
        keys, values: `[batch, heads, capacity, D]` and `[batch, heads, capacity, DV]`, rows of heads in any strides.
        index: int64 `[1]` on the device, the position of the token itself.
        mask: `[batch, 1, 1, capacity]`, added to the logits, or None. A row sees at least one position.

    Returns:
        `[batch, 1, heads * groups, DV]` of q's dtype; sums in fp32.

    Raises:
        ValueError: what `fits` refuses.
    """
    if not fits(q, keys, values, mask):
        raise ValueError(
            "decode_attention: expected 16-bit queries [batch, heads, 1, D] on CUDA and keys and values [batch, heads, "
            f"capacity, D], got {tuple(q.shape)}, {tuple(keys.shape)}, {tuple(values.shape)} of {q.dtype}"
        )
    return _kernels().decode_attention(q, keys, values, index, mask, scale)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    try:
        from . import kernels as decode_attention_triton
    except ImportError as error:
        raise ImportError("on CUDA this needs the package triton; install it or run on the CPU") from error
    return decode_attention_triton
