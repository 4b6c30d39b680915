"""What every launch of a Triton kernel needs to know: the device, the operands' dtype, and the interpreter."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .choices import Device

# Whether TRITON_INTERPRET was set when the kernels were defined; decided for the life of the process.
INTERPRETED = not isinstance(tiling.tile_of, triton.JITFunction)
# What the interpreter stands for: plain Triton instead of PTX, and tiles as on an H100.
_INTERPRETED_DEVICE = Device.typical(90)
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Triton before 3.6 has no matrix product of 8 tokens: what is launched then is what 9 tokens take.
FEWEST_TOKENS = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 9


def device_of(tensor: Tensor) -> Device:
    """The device that a tensor is on, as the rules see it."""
    return device_at(tensor.get_device())


@lru_cache(maxsize=64)
def device_at(index: int) -> Device:
    """The CUDA device of an index, as the rules see it; below 0: what stands for one in the interpreter."""
    if index < 0:
        return _INTERPRETED_DEVICE
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.multi_processor_count, found.name)


def operand_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the matrix instruction's operands: that of x, except that the interpreter cannot multiply bf16."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Triton's options. FP fusion is named because its default differs between Triton versions."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def requires_grad(tensor: Tensor | None) -> bool:
    """Whether there is a tensor whose gradient is asked for."""
    return tensor is not None and tensor.requires_grad
