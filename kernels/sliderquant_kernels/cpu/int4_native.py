"""The compiled loop that dequantizes torch's int4 container: `int4_dequantize.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

__all__ = ["dequantize_int4", "is_available"]

# Fewer weights than this take less time than waking another thread does.
_WEIGHTS_PER_THREAD = 1 << 16


class _Job(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("fused", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("k", "groups", "block", "blocks", "fused_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("halves", "symmetric", "as_float", "threads")),
    )


def is_available() -> bool:
    """Whether the loop is compiled here, after trying once."""
    return native.dequantize_int4() is not None


def dequantize_int4(packed: Tensor, fused: Tensor, block: int, halves: bool, symmetric: bool, out: Tensor) -> None:
    """Write rows of a `cpu_int4` weight to `out`.

    Args:
        packed: bytes of whole blocks, uint8 `[rows, K / 2]`, contiguous.
        fused: scale and zero of the same rows, bf16 `[G, rows, 2]`; the rows may be a slice.
        block, halves: how rows are ordered, see `int4.RowOrder`.
        out: `[K, rows]` bf16 or fp32, with rows next to each other.

    Raises:
        RuntimeError: the loop is not available, or does not take such a weight.
    """
    function = native.dequantize_int4()
    if function is None:
        raise RuntimeError("there is no compiled loop on this machine; ask is_available() first")
    rows, k = packed.shape[0], packed.shape[1] * 2
    runtime = native.openmp()
    threads = native.threads_for(rows * k, _WEIGHTS_PER_THREAD) if runtime else 1
    job = _Job(
        packed.data_ptr(),
        fused.data_ptr(),
        out.data_ptr(),
        k,
        fused.shape[0],
        block,
        rows // block,
        fused.stride(0) // 2,
        out.stride(0),
        halves,
        symmetric,
        out.dtype == torch.float32,
        threads,
    )
    if function(ctypes.byref(job), *(runtime or (None, None, None))):
        raise RuntimeError(f"the compiled loop takes blocks of up to 64 rows, got {block}")
