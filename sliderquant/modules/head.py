"""The output head of a model, which stays in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_head_fast"]


def keep_head_fast(head: nn.Module) -> None:
    """Give the head rows that lie one after the other, whatever part of the hidden states it is called with.

    `generate` calls it with the last token of every sequence, a slice. For such an input, and a weight that needs no
    gradient, torch multiplies sequence by sequence and copies the weight for each of them: on a CPU that takes several
    times as long as the product.
    """
    head.register_forward_pre_hook(_contiguous_rows)


def _contiguous_rows(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hidden = arguments[0] if arguments else None
    if torch.compiler.is_compiling() or not isinstance(hidden, Tensor) or hidden.ndim < 2:
        return None
    # Over the flat rows: a tensor with a dimension of 1 calls itself contiguous whatever the stride of it.
    return (hidden.reshape(-1, hidden.shape[-1]).contiguous().view(hidden.shape), *arguments[1:])
