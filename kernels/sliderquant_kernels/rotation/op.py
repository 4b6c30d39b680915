"""The ops that rotate activations by a Hadamard transform, alone or with per-token quantization.

    transform = factor_hadamard(n)
    y = hadamard(x, transform)                             # x [..., n]: y = x R^T
    x = hadamard(y, transform, inverse=True)               # x = y R
    activations = hadamard_quantize(x, transform, bits=4)  # for low_bit_linear

R = H / sqrt(n), or the same block by block, is orthonormal; with signs it is H diag(signs) / sqrt(n).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activations.op import ACTIVATION_BITS, check_clip, filled, prepared, quantize
from ..common import devices
from ..common.layout import DTYPES
from ..common.quantized import QuantizedActivations
from . import cpu as hadamard_cpu
from .matrix import HadamardTransform

_library = torch.library.Library("sliderquant_kernels", "FRAGMENT")
_library.define(
    "hadamard(Tensor x, Tensor? signs, int n, int[] orders, bool inverse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "hadamard_quantize(Tensor x, Tensor? signs, Tensor? gate, int n, int[] orders, int bits, bool symmetric, "
    "float[]? clip=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def hadamard(x: Tensor, transform: HadamardTransform, signs: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """x rotated along its last dimension.

    Args:
        x: fp16, bf16 or fp32 `[..., n]`, any strides, possibly empty: `[tokens, n]`, or `[tokens, heads, head_dim]`
            with a transform of size head_dim.
        transform: of `factor_hadamard(n)`.
        signs: `[n]` of +1 and -1 in x's dtype, which x is multiplied by first (by the inverse last), or None. Their
            values are not checked.
        inverse: rotate back: the transpose.

    Returns:
        The same shape and dtype, contiguous. Accumulated in fp32 and rounded once; sizes that two launches rotate on
        CUDA (beyond 16384, mostly) are rounded to x's dtype between them. Rows do not depend on each other.

    The gradient for x is the inverse rotation. On CUDA the first call of a size on a device makes its matrices and has
    to come before the capture of a CUDA graph.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device does not fit.
        NotImplementedError: when a gradient for the signs is asked for.
    """
    _check_transform(transform)
    if devices.may_skip_dispatcher(x, (signs,)):
        return _hadamard_on_cuda(x, signs, transform, bool(inverse))
    arguments = (x, signs, transform.n, transform.orders, inverse)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _hadamard_op(*arguments)
    # As in `weight_only`: without gradients the autograd layer has nothing to do.
    with torch._C._AutoDispatchBelowAutograd():
        return _hadamard_op(*arguments)


def hadamard_quantize(
    x: Tensor,
    transform: HadamardTransform,
    bits: int = 8,
    symmetric: bool = True,
    *,
    signs: Tensor | None = None,
    gate: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> QuantizedActivations:
    """x, or silu(gate) * x, rotated along its last dimension and quantized per token; on CUDA one read, one write.

    The rotated values are quantized in fp32, as `activations.op` does it. On CUDA a value within some 1e-5 steps
    of the middle between two codes may get either. Block-diagonal rotations, and those that two launches rotate, round
    to x's dtype in between.

    Args:
        x, transform, signs: as in `hadamard`.
        bits: 4 or 8.
        gate: like x; `silu(gate) * x` is rotated, rounded to x's dtype after silu and after the product.
        clip: factors in (0, 1] on the lower and the upper end of every rotated token's range; None: 1.

    Returns:
        Codes int8 `[..., n]`, scale fp32, zero-point int32 (None when symmetric) and token sum int32 `[...]`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device does not fit.
        NotImplementedError: when a gradient is asked of the result.
    """
    _check_transform(transform)
    # Numbers of other types are left to the op, which converts or refuses them.
    if type(bits) is int and type(symmetric) is bool and devices.may_skip_dispatcher(x, (signs, gate)):
        floats = None if clip is None else [float(factor) for factor in clip]
        return QuantizedActivations(*_quantize_on_cuda(x, signs, gate, transform, bits, symmetric, floats))
    codes, scale, zero, total = _quantize_op(x, signs, gate, transform.n, transform.orders, bits, symmetric, clip)
    return QuantizedActivations(codes, scale, None if symmetric else zero, total)


def prepare_hadamard(transform: HadamardTransform, device: torch.device | str, dtype: torch.dtype) -> None:
    """Make the matrices that rotating tensors of `dtype` on a CUDA device takes, so that no call has to: during the
    capture of a CUDA graph it could not. On other devices nothing is done.

    Raises:
        TypeError: the dtype is not float16, bfloat16 or float32, or the transform is none.
        RuntimeError: a CUDA graph is being captured, and a matrix is missing.
    """
    _check_transform(transform)
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    device = torch.device(device)
    if device.type != "cuda":
        return
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _launch().prepare(transform, device, dtype)


def _check_transform(transform: Any) -> None:
    if not isinstance(transform, HadamardTransform):
        raise TypeError(f"transform: expected a HadamardTransform, got {type(transform).__name__}; use factor_hadamard")


@lru_cache(maxsize=1024)
def _transform(n: int, orders: tuple[int, ...]) -> HadamardTransform:
    return HadamardTransform(n, orders)


def _checked(x: Tensor, signs: Tensor | None, gate: Tensor | None, n: int, orders: Any) -> HadamardTransform:
    transform = _transform(n, tuple(orders))
    _check(x, signs, gate, n)
    return transform


def _check(x: Tensor, signs: Tensor | None, gate: Tensor | None, n: int) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}; convert it")
    if x.ndim < 1 or x.shape[-1] != n:
        raise ValueError(f"x: expected shape [..., {n}] for this transform, got {tuple(x.shape)}")
    for name, tensor, shape in (("signs", signs, (n,)), ("gate", gate, x.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype} like x, got {tensor.dtype}; convert it")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}; move it")


def _check_grid(bits: int, clip: Any) -> None:
    check_clip(clip)
    if bits not in ACTIVATION_BITS:
        raise ValueError(f"bits: expected 4 or 8, got {bits}")


@lru_cache(maxsize=1)
def _launch() -> Any:
    try:
        from . import launch as hadamard_launch
    except ImportError as error:
        raise ImportError("rotations on CUDA need the package triton; install it or run on the CPU") from error
    return hadamard_launch


def _hadamard_cpu(x, signs, n, orders, inverse):
    transform = _checked(x, signs, None, n, orders)
    rows = x.reshape(-1, transform.block).contiguous()
    return hadamard_cpu.rotate(rows, signs, transform, inverse).view(x.shape)


def _hadamard_cuda(x, signs, n, orders, inverse):
    return _hadamard_on_cuda(x, signs, _transform(n, tuple(orders)), inverse)


def _hadamard_on_cuda(x: Tensor, signs: Tensor | None, transform: HadamardTransform, inverse: bool) -> Tensor:
    _check(x, signs, None, transform.n)
    return _launch().hadamard(x, signs, transform, inverse)


def _hadamard_fake(x, signs, n, orders, inverse):
    _checked(x, signs, None, n, orders)
    return x.new_empty(x.shape)


def _quantize_cpu(x, signs, gate, n, orders, bits, symmetric, clip=None):
    transform = _checked(x, signs, gate, n, orders)
    _check_grid(bits, clip)
    rows = prepared(x, None, 0.0, gate).reshape(-1, transform.block).float()
    signs = None if signs is None else signs.float()
    y = hadamard_cpu.rotate(rows.contiguous(), signs, transform, False).view(x.shape)
    return quantize(y, bits, symmetric, clip)


def _quantize_cuda(x, signs, gate, n, orders, bits, symmetric, clip=None):
    return filled(_quantize_on_cuda(x, signs, gate, _transform(n, tuple(orders)), bits, symmetric, clip))


def _quantize_on_cuda(
    x: Tensor,
    signs: Tensor | None,
    gate: Tensor | None,
    transform: HadamardTransform,
    bits: int,
    symmetric: bool,
    clip: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    _check(x, signs, gate, transform.n)
    _check_grid(bits, clip)
    return _launch().hadamard_quantize(x, signs, gate, transform, bits, symmetric, clip)


def _quantize_fake(x, signs, gate, n, orders, bits, symmetric, clip=None):
    _checked(x, signs, gate, n, orders)
    _check_grid(bits, clip)
    shape = x.shape[:-1]
    integers = [x.new_empty(shape, dtype=torch.int32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32), *integers


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, ctx.n, ctx.orders, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("hadamard has no gradient for signs; detach() them")
    (signs,) = ctx.saved_tensors
    return _hadamard_op(gradient, signs, ctx.n, ctx.orders, not ctx.inverse), None, None, None, None


def _no_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "hadamard_quantize is for inference and has no backward; call it under torch.no_grad(), or rotate with "
        "hadamard, which has one"
    )


for _name, _on_cpu, _on_cuda, _fake in (
    ("hadamard", _hadamard_cpu, _hadamard_cuda, _hadamard_fake),
    ("hadamard_quantize", _quantize_cpu, _quantize_cuda, _quantize_fake),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"sliderquant_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "sliderquant_kernels::hadamard", _hadamard_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("sliderquant_kernels::hadamard_quantize", _no_backward, lib=_library)

_hadamard_op = torch.ops.sliderquant_kernels.hadamard.default
_quantize_op = torch.ops.sliderquant_kernels.hadamard_quantize.default
