"""What a decoder layer computes between its linears, as one kernel each on CUDA: RMSNorm, SiLU(gate) * up, rotary
embeddings. A step of one token is a few hundred such launches otherwise, each longer than its work.

Each function computes what the plain torch in `reference_*` does, with its roundings. Plain torch also runs on a CPU,
with gradients, and while something traces, because a compiler fuses it itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..common import devices
from ..common.layout import DTYPES

LONGEST_ROW = 32768


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, rounded to x's dtype before the weight and
    after it (Zhang and Sennrich 2019, as Llama rounds).

    Args:
        x: fp16, bf16 or fp32 `[..., K]`, any strides.
        weight: `[K]` of x's dtype.

    Returns:
        The shape and dtype of x.
    """
    fits = x.ndim > 0 and weight.shape == x.shape[-1:] and weight.dtype == x.dtype and weight.is_contiguous()
    if fits and x.shape[-1] <= LONGEST_ROW and _runs_directly(x, weight):
        return _kernels().rms_norm(x, weight, eps)
    return reference_rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both `[..., K]` of one dtype, rounded after silu and after the product."""
    if gate.shape == up.shape and gate.ndim > 0 and gate.dtype == up.dtype and _runs_directly(gate, up):
        return _kernels().silu_mul(gate, up)
    return silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (Su et al. 2021), the halves of a head rotated against each other.

    Args:
        q: `[batch, heads, tokens, D]`, any strides, D even.
        k: the same with its own number of heads.
        cos, sin: `[batch or 1, tokens, D]` of the same dtype.

    Returns:
        q and k rotated, in their shapes; each product is rounded before the sum.
    """
    fits = (
        q.ndim == 4
        and k.ndim == 4
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:]
        and q.shape[3] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[1:] == q.shape[2:]
        and cos.shape[0] in (1, q.shape[0])
        and q.dtype == k.dtype == cos.dtype == sin.dtype
    )
    if fits and _runs_directly(q, k, cos, sin):
        return _kernels().rotary(q, k, cos, sin)
    return reference_rotary(q, k, cos, sin)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def reference_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` in plain torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q_rotated, k_rotated = (torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k))
    return q * cos + q_rotated * sin, k * cos + k_rotated * sin


def _runs_directly(x: Tensor, *others: Tensor) -> bool:
    """Whether a kernel may be launched: plain tensors on one CUDA device, without gradients, and nothing traces."""
    # A profiler, which shows ops by name, does not matter: these are none.
    if not devices.nothing_traces() or not devices.are_plain(x, others) or x.dtype not in DTYPES:
        return False
    return all(tensor.get_device() == x.get_device() for tensor in others)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    try:
        from . import kernels as elementwise_triton
    except ImportError as error:
        raise ImportError("on CUDA this needs the package triton; install it or run on the CPU") from error
    return elementwise_triton
