"""The op of low-bit linears: int8 activations times a packed 2, 4 or 8-bit weight, in int32, exactly.

activations = quantize_activations(x, bits=4)
layout = choose_low_bit_layout(4, n, k, None, True, x.device)
y = low_bit_linear(activations, layout.pack(codes, scale), layout, x.dtype)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activations.op import quantize_activations
from ..common import devices
from ..common.checks import ALIGNMENT, check_alignment
from ..common.direct import DirectLinear
from ..common.layout import DTYPES, PackedWeight
from ..common.quantized import QuantizedActivations
from ..cpu import vnni
from ..cpu.vnni import DirectVnniLinear, Rounding
from . import cpu as low_bit_cpu
from .layout import LowBitLayout
from .tiles import VARIANTS

_FIELDS = "str kind, int bits, int n, int k, int group_size, bool symmetric"
_library = torch.library.Library("sliderquant_kernels", "FRAGMENT")
_library.define(
    "low_bit_linear(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor x_sum, Tensor weight, Tensor scale, "
    f"Tensor constants, Tensor? bias, Tensor? residual, {_FIELDS}, ScalarType dtype, str variant) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def low_bit_linear(
    activations: QuantizedActivations,
    packed: PackedWeight,
    layout: LowBitLayout,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    variant: str | None = None,
) -> Tensor:
    """Quantized activations times the transposed packed weight, plus bias, plus residual.

    Args:
        activations: of `quantize_activations`: int8 codes `[..., K]`, 4 or 8 bits, symmetric or not.
        packed: what `layout.pack` returned.
        layout: the layout that packed the weight. Per channel is the fast path; groups cost a conversion and two fp32
            operations per output and group, and on sm_90 at group 128 most of what int8 gains over 16 bits.
        dtype: of the result: fp16, bf16 or fp32.
        bias: `[N]` of `dtype`, or None.
        residual: `[..., N]` of `dtype`, or None.
        variant: on CUDA, one of `tiles.VARIANTS` to be used whatever the rules say; None: the best.

    Returns:
        `[..., N]`, contiguous. Per channel the sum over K is exact; rows do not depend on each other; deterministic.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or strides do not fit the layout.
        NotImplementedError: when a gradient is asked of the result.
    """
    if not isinstance(layout, LowBitLayout):
        raise TypeError(f"layout: expected a LowBitLayout, got {type(layout).__name__}; use choose_low_bit_layout")
    if not isinstance(activations, QuantizedActivations):
        raise TypeError(
            f"activations: expected QuantizedActivations, got {type(activations).__name__}; use quantize_activations"
        )
    if not isinstance(packed, tuple) or len(packed) != 3:
        raise TypeError(f"packed: expected a PackedWeight, got {type(packed).__name__}; use layout.pack")
    operands = (*activations, *packed, bias, residual)
    if devices.may_skip_dispatcher(operands[0], operands[1:]):
        return _multiply(operands, layout, dtype, variant or "")
    fields = (layout.kind, layout.bits, layout.n, layout.k, layout.group_size or 0, layout.symmetric)
    return _op(*operands, *fields, dtype, variant or "")


def direct_low_bit_linear(
    packed: PackedWeight,
    layout: LowBitLayout,
    dtype: torch.dtype,
    bias: Tensor | None,
    rounding: Rounding,
) -> DirectLinear | None:
    """`low_bit_linear(quantize_activations(x, *rounding), packed, layout, dtype, bias)` as an object that checks its
    arguments once; None where there is no short cut: on a CPU in fp16, with a bias that is not contiguous, and without
    AVX512-VNNI.

    The object computes only what its method `fits` accepts; everything else goes to the ops.

    Raises ValueError or TypeError when the tensors do not fit the layout, or the rounding is none that there is.
    """
    on_gpu = layout.kind == "triton_int8"
    if layout.device_type != packed.weight.device.type:
        return None
    if not on_gpu and (layout.kind != "cpu_vnni" or not vnni.takes(dtype)):
        return None
    layout.check_packed(packed)
    quantize_activations(torch.empty(0, layout.k), rounding.bits, rounding.symmetric, clip=rounding.clip)
    if bias is not None and (bias.shape != (layout.n,) or bias.dtype != dtype):
        raise ValueError(f"bias: expected {dtype} of shape ({layout.n},), got {bias.dtype} of {tuple(bias.shape)}")
    if on_gpu:
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
        for name, tensor in (("scale", packed.scale), ("constants", packed.zero_point), ("bias", bias)):
            if tensor is not None and tensor.device != packed.weight.device:
                raise ValueError(
                    f"{name}: expected device {packed.weight.device} like weight, got {tensor.device}; move it"
                )
        check_alignment(weight=packed.weight)
        clip = None if rounding.clip is None else (float(rounding.clip[0]), float(rounding.clip[1]))
        return _launch().DirectLowBitLinear(packed, layout, dtype, bias, rounding._replace(clip=clip))
    if bias is not None and not bias.is_contiguous():
        return None
    return DirectVnniLinear(packed, layout, dtype, bias, rounding)


@lru_cache(maxsize=1024)
def _layout(kind: str, bits: int, n: int, k: int, group_size: int, symmetric: bool) -> LowBitLayout:
    return LowBitLayout(kind, bits, n, k, group_size or None, symmetric)


def _checked(operands: tuple, fields: tuple, dtype: torch.dtype, variant: str) -> LowBitLayout:
    layout = _layout(*fields)
    _check(operands, layout, dtype, variant)
    return layout


def _check(operands: tuple, layout: LowBitLayout, dtype: torch.dtype, variant: str) -> None:
    codes, x_scale, x_zero, x_sum, weight, scale, constants, bias, residual = operands
    layout.check_packed(PackedWeight(weight, scale, constants))
    # Meta tensors pass: they stand for either device while tracing.
    if weight.device.type not in (layout.device_type, "meta"):
        raise ValueError(
            f"weight: kind {layout.kind!r} runs on {layout.device_type}, got tensors on {weight.device}; "
            f"unpack, and repack for the device with choose_low_bit_layout(..., device={weight.device.type!r})"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected dtype torch.int8, got {codes.dtype}; quantize with packed=False")
    if codes.ndim < 1 or codes.shape[-1] != layout.k:
        raise ValueError(f"codes: expected shape [..., {layout.k}], got {tuple(codes.shape)}; check the input size")
    tokens, result = codes.shape[:-1], (*codes.shape[:-1], layout.n)
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("scale of the activations", x_scale, tokens, torch.float32),
        ("zero_point of the activations", x_zero, tokens, torch.int32),
        ("token_sum", x_sum, tokens, torch.int32),
        ("bias", bias, (layout.n,), dtype),
        ("residual", residual, result, dtype),
    )
    for name, tensor, shape, wanted in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != wanted:
            raise TypeError(f"{name}: expected dtype {wanted}, got {tensor.dtype}; convert it")
    names = ("codes", "scale of the activations", "zero_point of the activations", "token_sum", "weight", "scale",
             "constants", "bias", "residual")  # fmt: skip
    for name, tensor in zip(names, operands, strict=True):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device} like weight, got {tensor.device}; move it")
    if variant and (layout.device_type != "cuda" or variant not in VARIANTS):
        raise ValueError(
            f"variant: expected one of {', '.join(VARIANTS)} on CUDA, got {variant!r} for kind {layout.kind!r}; "
            "leave it out"
        )


def _all_fits(operands: tuple, layout: LowBitLayout, dtype: torch.dtype, variant: str) -> bool:
    """Whether `_check` and the check of the alignment have nothing to say of CUDA tensors, at a tenth of their time;
    false where they have to be asked."""
    codes, x_scale, x_zero, x_sum, weight, scale, constants, bias, residual = operands
    (weight_shape, weight_dtype), (scale_shape, scale_dtype), (constant_shape, constant_dtype) = layout.specs()
    shape, index = codes.shape, codes.get_device()
    if layout.kind != "triton_int8" or variant or dtype not in DTYPES or not shape or constants is None:
        return False
    tokens, floats, integers = shape[:-1], torch.float32, torch.int32
    return (
        codes.dtype is torch.int8
        and shape[-1] == layout.k
        and weight.shape == weight_shape
        and scale.shape == scale_shape
        and constants.shape == constant_shape
        and x_scale.shape == tokens
        and x_sum.shape == tokens
        and weight.dtype is weight_dtype
        and scale.dtype is scale_dtype
        and constants.dtype is constant_dtype
        and x_scale.dtype is floats
        and x_sum.dtype is integers
        and weight.is_contiguous()
        and scale.is_contiguous()
        and constants.is_contiguous()
        and weight.data_ptr() % ALIGNMENT == 0
        and weight.get_device() == index
        and scale.get_device() == index
        and constants.get_device() == index
        and x_scale.get_device() == index
        and x_sum.get_device() == index
        and (x_zero is None or _is(x_zero, tokens, integers, index))
        and (bias is None or _is(bias, (layout.n,), dtype, index))
        and (residual is None or _is(residual, (*tokens, layout.n), dtype, index))
    )


def _is(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> bool:
    return tensor.shape == shape and tensor.dtype is dtype and tensor.get_device() == index


def _on_cpu(*arguments: Any) -> Tensor:
    operands, (dtype, variant) = arguments[:9], arguments[15:]
    layout = _checked(operands, arguments[9:15], dtype, variant)
    function: Any = low_bit_cpu.low_bit_linear
    return function(*operands, layout, dtype)


def _on_cuda(*arguments: Any) -> Tensor:
    dtype, variant = arguments[15:]
    return _multiply(arguments[:9], _layout(*arguments[9:15]), dtype, variant)


def _multiply(operands: tuple, layout: LowBitLayout, dtype: torch.dtype, variant: str) -> Tensor:
    """The op on CUDA."""
    if not _all_fits(operands, layout, dtype, variant):
        _check(operands, layout, dtype, variant)
        check_alignment(weight=operands[4])
    return _launch().low_bit_linear(*operands, layout, dtype, variant or None)


@lru_cache(maxsize=1)
def _launch() -> Any:
    try:
        from . import launch as low_bit_launch
    except ImportError as error:
        raise ImportError("low-bit ops on CUDA need the package triton; install it or run on the CPU") from error
    return low_bit_launch


def _fake(*arguments: Any) -> Tensor:
    operands, (dtype, variant) = arguments[:9], arguments[15:]
    layout = _checked(operands, arguments[9:15], dtype, variant)
    return operands[0].new_empty((*operands[0].shape[:-1], layout.n), dtype=dtype)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("low_bit_linear is for inference and has no backward; call it under torch.no_grad()")


_library.impl("low_bit_linear", _on_cpu, "CPU")
_library.impl("low_bit_linear", _on_cuda, "CUDA")
torch.library.register_fake("sliderquant_kernels::low_bit_linear", _fake, lib=_library)
torch.library.register_autograd("sliderquant_kernels::low_bit_linear", _no_backward, lib=_library)
_op = torch.ops.sliderquant_kernels.low_bit_linear.default
