"""In which dtype products are computed while a window is learned."""

import torch

from sliderquant.devices import has_fast_bfloat16
from sliderquant.planning.settings import Settings

__all__ = ["matmul_dtype"]

SMALLEST_BFLOAT16 = 512
"""Hidden size from which on a CPU multiplies in bfloat16 while learning, if it has units for it."""


def matmul_dtype(settings: Settings, device: torch.device, hidden_size: int) -> torch.dtype:
    """The dtype of matrix products while learning. `auto` is bfloat16 where the device has units for it, else float32.
    A CPU takes it for large layers alone, for in small ones products are little of a step; `python -m benchmarks
    ablate matmul` measures what it saves and costs."""
    if settings.matmul != "auto":
        return torch.bfloat16 if settings.matmul == "bfloat16" else torch.float32
    large = device.type != "cpu" or hidden_size >= SMALLEST_BFLOAT16
    return torch.bfloat16 if large and has_fast_bfloat16(device) else torch.float32
