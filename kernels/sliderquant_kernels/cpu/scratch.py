"""Memory that the CPU ops use again on every call.

What they dequantize takes some megabytes for a moment. To get them from the system, and give them back, page by page,
takes longer than to fill them.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Each thread its own."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Uninitialised memory `shape` of `dtype`, the same for the same name in a thread: valid until the next call."""
    size = math.prod(shape) * dtype.itemsize
    held = _buffers.held.get(name)
    if held is None or held.numel() < size:
        # Inference mode would make a tensor that no one may write to outside of it.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        _buffers.held[name] = held
    return held[:size].view(dtype).view(shape)
