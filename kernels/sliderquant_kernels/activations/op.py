"""The op that quantizes activations per token, alone or fused with what comes before it.

A token x `[K]` becomes int8 codes q, a scale s and, if asymmetric, a zero-point z, so that x ~ (q - z) s. With b bits:

    symmetric    s = max|x| / ((2^b - 1) / 2)                                    q = clamp(round(x / s))
    asymmetric   s = (max(x, 0) - min(x, 0)) / (2^b - 1)   z = clamp(round(-2^(b-1) - min(x, 0) / s))
                 q = clamp(round(x / s) + z)

to -2^(b-1) .. 2^(b-1) - 1, rounding half to even: what compressed-tensors computes for dynamic per-token activations,
with scales in fp32 whatever the activations' dtype. A token of zeros gets s = 1, z = 0 and codes of 0, so that a
linear's corrections for zero-points are 0 too, and it returns its bias exactly.

With clipping (c_low, c_high) the ends of the range are c_low min(x, 0) and c_high max(x, 0) in all of this, products
in fp32; when symmetric max|x| becomes the larger of -c_low min(x, 0) and c_high max(x, 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common import devices
from ..common.layout import DTYPES
from ..common.quantized import QuantizedActivations
from ..cpu import native, vnni

ACTIVATION_BITS = (4, 8)
# One program holds a row: 16 warps of 64 values a thread.
MAX_K = 32768

_library = torch.library.Library("sliderquant_kernels", "FRAGMENT")
_library.define(
    "quantize_activations(Tensor x, int bits, bool symmetric, Tensor? norm_weight, float norm_eps, Tensor? gate, "
    "bool packed, float[]? clip=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def quantize_activations(
    x: Tensor,
    bits: int = 8,
    symmetric: bool = True,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
    packed: bool = False,
    clip: tuple[float, float] | None = None,
) -> QuantizedActivations:
    """Quantize every token, `[..., K]` -> `QuantizedActivations`; one read of x, one write.

    Args:
        x: fp16, bf16 or fp32 `[..., K]`, K up to 32768, any strides, possibly empty.
        bits: 4 or 8.
        norm_weight: `[K]` of x's dtype: x is normalized first, `x / sqrt(mean(x^2) + norm_eps) * norm_weight`, rounded
            to x's dtype before and after the weight, as Llama's RMSNorm does.
        gate: like x: `silu(gate) * x` is quantized, rounded to x's dtype after silu and after the product, as Llama's
            MLP does. Not together with `norm_weight`.
        packed: 4 bits: two codes a byte.
        clip: factors in (0, 1] on the lower and the upper end of every token's range; None: 1.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device does not fit.
        NotImplementedError: when a gradient is asked of the result.
    """
    # Numbers of other types are left to the op, which converts or refuses them.
    if type(bits) is int and type(symmetric) is bool and devices.may_skip_dispatcher(x, (norm_weight, gate)):
        floats = None if clip is None else [float(factor) for factor in clip]
        _check(x, bits, norm_weight, gate, packed, floats)
        return QuantizedActivations(
            *_launch().quantize_activations(
                x, bits, symmetric, norm_weight, float(norm_eps), gate, bool(packed), floats
            )
        )
    codes, scale, zero, total = _op(x, bits, symmetric, norm_weight, norm_eps, gate, packed, clip)
    return QuantizedActivations(codes, scale, None if symmetric else zero, total)


def prepared(x: Tensor, norm_weight: Tensor | None, norm_eps: float, gate: Tensor | None) -> Tensor:
    """What is quantized, in x's dtype and with its roundings: the plain torch of the fused steps."""
    if norm_weight is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        return wide.to(x.dtype) * norm_weight
    if gate is not None:
        return torch.nn.functional.silu(gate.float()).to(x.dtype) * x
    return x


def quantize(
    x: Tensor, bits: int, symmetric: bool, clip: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas at the top in plain torch: codes int8 `[..., K]`, scale fp32, zero and sum int32 `[...]`."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wide = x.float()
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    if symmetric:
        scale = torch.maximum(-low, high) / ((2**bits - 1) / 2)
    else:
        scale = (high - low) / (2**bits - 1)
    empty = ~(scale > 0)
    scale = torch.where(empty, 1.0, scale)
    zero = torch.zeros_like(scale)
    if not symmetric:
        zero = torch.where(empty, zero, torch.round(low_code - low / scale).clamp(low_code, high_code))
    codes = (torch.round(wide / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(low_code, high_code)
    return codes.to(torch.int8), scale, zero.int(), codes.sum(-1).int()


def check_clip(clip: Sequence[float] | None) -> None:
    """Raises ValueError unless it is None or two factors in (0, 1]."""
    if clip is not None and not (len(clip) == 2 and all(0 < factor <= 1 for factor in clip)):
        raise ValueError(f"clip: expected two factors above 0 and at most 1, got {tuple(clip)}; None does not clip")


def _check(
    x: Tensor,
    bits: int,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    packed: bool,
    clip: Sequence[float] | None,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}; convert it")
    if x.ndim < 1 or not 1 <= x.shape[-1] <= MAX_K:
        raise ValueError(f"x: expected shape [..., K] with K from 1 to {MAX_K}, got {tuple(x.shape)}")
    if bits not in ACTIVATION_BITS:
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if packed and (bits != 4 or x.shape[-1] % 2):
        raise ValueError(f"packed: two codes a byte need bits=4 and an even K, got bits={bits} and K={x.shape[-1]}")
    check_clip(clip)
    if norm_weight is not None and gate is not None:
        raise ValueError("gate: not together with norm_weight; call the op for the one that is nearest to it")
    if norm_weight is None and gate is None:
        return
    for name, tensor, shape in (("norm_weight", norm_weight, x.shape[-1:]), ("gate", gate, x.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype} like x, got {tensor.dtype}; convert it")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}; move it")


def _on_cpu(x, bits, symmetric, norm_weight, norm_eps, gate, packed, clip=None):
    _check(x, bits, norm_weight, gate, packed, clip)
    x = prepared(x, norm_weight, norm_eps, gate)
    codes, scale, zero, total = _quantizer(x.dtype)(x, bits, symmetric, clip)
    if packed:
        nibbles = codes.view(torch.uint8) & 15
        codes = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return codes, scale, zero, total


def _quantizer(dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`quantize`, by the compiled loop where there is one for this dtype."""
    return vnni.quantize if vnni.takes(dtype) and native.vnni(4) else quantize


def _on_cuda(x, bits, symmetric, norm_weight, norm_eps, gate, packed, clip=None):
    _check(x, bits, norm_weight, gate, packed, clip)
    return filled(_launch().quantize_activations(x, bits, symmetric, norm_weight, norm_eps, gate, packed, clip))


def filled(found: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an op returns of codes, scale, zero-point and sum: a tensor, unset, for the zero-point that is None."""
    codes, scale, zero, total = found
    return codes, scale, torch.empty_like(total) if zero is None else zero, total


@lru_cache(maxsize=1)
def _launch() -> Any:
    try:
        from . import kernels as activations_triton
    except ImportError as error:
        raise ImportError("activations on CUDA need the package triton; install it or run on the CPU") from error
    return activations_triton


def _fake(x, bits, symmetric, norm_weight, norm_eps, gate, packed, clip=None):
    _check(x, bits, norm_weight, gate, packed, clip)
    shape = x.shape[:-1]
    codes = x.new_empty(x.shape, dtype=torch.int8)
    if packed:
        codes = x.new_empty((*shape, x.shape[-1] // 2), dtype=torch.uint8)
    integers = [x.new_empty(shape, dtype=torch.int32) for _ in range(2)]
    return codes, x.new_empty(shape, dtype=torch.float32), *integers


def _no_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "quantize_activations is for inference and has no backward; call it under torch.no_grad()"
    )


_library.impl("quantize_activations", _on_cpu, "CPU")
_library.impl("quantize_activations", _on_cuda, "CUDA")
torch.library.register_fake("sliderquant_kernels::quantize_activations", _fake, lib=_library)
torch.library.register_autograd("sliderquant_kernels::quantize_activations", _no_backward, lib=_library)
_op = torch.ops.sliderquant_kernels.quantize_activations.default
