"""The weight-only ops: schema, validation, registration, and the functions that users call.

`torch.ops.sliderquant_kernels.weight_only_linear` and `.dequantize` take tensors and the fields of a layout, so that
they can be traced; the functions of the same names here take a `PackedWeight` and a `WeightLayout`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common import devices
from ..common.checks import ALIGNMENT, check_alignment
from ..common.direct import DirectLinear
from ..common.layout import DTYPES, PackedWeight
from . import cpu
from .layout import WeightLayout
from .tiles import VARIANTS

_FIELDS = "str kind, int bits, int n, int k, int group_size, bool symmetric"
# Not torch.library.custom_op: its Python wrappers cost more than everything else here does for one token on a CPU.
_library = torch.library.Library("sliderquant_kernels", "DEF")
_library.define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? residual, "
    f"{_FIELDS}, str variant, bool batch_invariant) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"dequantize(Tensor weight, Tensor scale, Tensor? zero_point, {_FIELDS}, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def weight_only_linear(
    x: Tensor,
    packed: PackedWeight,
    layout: WeightLayout,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    variant: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x times the transposed packed weight, plus bias, plus residual.

    Args:
        x: activations `[..., K]`, fp16, bf16 or fp32, any strides, possibly empty.
        packed: what `layout.pack` returned, with scales of x's dtype, on x's device.
        layout: the layout that packed the weight.
        bias: `[N]` of x's dtype, or None.
        residual: `[..., N]` of x's dtype, or None.
        variant: on CUDA, a kernel of `tiles.VARIANTS` to be used whatever `tiles.choose` says; None: the best.
        batch_invariant: the bits of a row of the result do not depend on how many other rows there are or what they
            hold. Costs speed: one tile serves every number of tokens on CUDA, tokens go one by one on a CPU. fp32 on
            CUDA cannot.

    Returns:
        `[..., N]` of x's dtype, contiguous. Accumulated in fp32; deterministic.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or strides do not fit the layout.
        NotImplementedError: when a gradient is asked of the result.
    """
    _check_types(packed, layout)
    weight, scale, zero_point = packed
    if devices.may_skip_dispatcher(x, (weight, scale, zero_point, bias, residual)):
        return _multiply(x, weight, scale, zero_point, bias, residual, layout, variant or "", bool(batch_invariant))
    op, fields, how = _linear_op, _fields(layout), (variant or "", batch_invariant)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _require_grad(x, scale, bias, residual)):
        return op(x, weight, scale, zero_point, bias, residual, *fields, *how)
    # Without gradients the autograd layer, Python and a third of the op's overhead on a CPU, has nothing to do.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, weight, scale, zero_point, bias, residual, *fields, *how)


def direct_linear(packed: PackedWeight, layout: WeightLayout, bias: Tensor | None = None) -> DirectLinear | None:
    """`weight_only_linear(x, packed, layout, bias)` as an object that checks its arguments once; None for tensors that
    are not on the layout's device.

    The object computes only what its method `fits` accepts; everything else goes to `weight_only_linear`.

    Raises ValueError or TypeError when the tensors do not fit the layout.
    """
    _check_types(packed, layout)
    weight, scale, zero_point = packed
    if layout.device_type != weight.device.type:
        return None
    checked = _check_layout(weight, scale, zero_point, layout)
    _check_operands(scale.new_empty(0, layout.k), weight, scale, bias, None, checked, "")
    if devices.on_gpu(weight):
        check_alignment(weight=weight, scale=scale)
        return _triton().DirectLinear(weight, scale, bias, checked)
    return cpu.DirectLinear(weight, scale, zero_point, bias, checked)


def dequantize(packed: PackedWeight, layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` as `dtype` (fp16, bf16, fp32): (codes - zero_point) * scale, rounded once.

    Raises ValueError or TypeError when a tensor does not fit the layout, NotImplementedError for gradients.
    """
    _check_types(packed, layout)
    weight, scale, zero_point = packed
    if devices.may_skip_dispatcher(weight, (scale, zero_point)):
        return _dequantize(weight, scale, zero_point, layout, dtype)
    return _dequantize_op(weight, scale, zero_point, *_fields(layout), dtype=dtype)


def _fields(layout: WeightLayout) -> tuple[str, int, int, int, int, bool]:
    # 0 stands for None: `int?` arguments cannot be told from 0 by every tracer.
    return layout.kind, layout.bits, layout.n, layout.k, layout.group_size or 0, layout.symmetric


def _check_types(packed: Any, layout: Any) -> None:
    if not isinstance(layout, WeightLayout):
        raise TypeError(f"layout: expected a WeightLayout, got {type(layout).__name__}; use choose_layout")
    if not isinstance(packed, tuple) or len(packed) != 3:
        raise TypeError(f"packed: expected a PackedWeight, got {type(packed).__name__}; use layout.pack")


@lru_cache(maxsize=1024)
def _layout(kind: str, bits: int, n: int, k: int, group_size: int, symmetric: bool) -> WeightLayout:
    return WeightLayout(kind, bits, n, k, group_size or None, symmetric)


def _checked_layout(weight: Tensor, scale: Tensor, zero_point: Tensor | None, *fields: Any) -> WeightLayout:
    return _check_layout(weight, scale, zero_point, _layout(*fields))


def _check_layout(weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout) -> WeightLayout:
    layout.check_packed(PackedWeight(weight, scale, zero_point))
    device = weight.device
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name}: expected device {device} like weight, got {tensor.device}; move the packed weight"
            )
    # Meta tensors pass: they stand for either device while tracing.
    if device.type not in (layout.device_type, "meta"):
        raise ValueError(
            f"weight: kind {layout.kind!r} runs on {layout.device_type}, got tensors on {device}; "
            f"unpack, and repack for the device with choose_layout(..., device={device.type!r})"
        )
    return layout


def _check_operands(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    variant: str,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}; convert it")
    if x.ndim < 1 or x.shape[-1] != layout.k:
        raise ValueError(f"x: expected shape [..., {layout.k}], got {tuple(x.shape)}; check the layer's input size")
    if scale.dtype != x.dtype:
        raise TypeError(
            f"x: expected dtype {scale.dtype} like scale, got {x.dtype}; convert x, or repack with scales of x's dtype"
        )
    if x.device != weight.device:
        raise ValueError(
            f"x: expected device {weight.device} like weight, got {x.device}; move x, or unpack and repack the weight "
            "for the device with choose_layout"
        )
    if bias is not None:
        if tuple(bias.shape) != (layout.n,):
            raise ValueError(
                f"bias: expected shape ({layout.n},), got {tuple(bias.shape)}; it has one value per output"
            )
        _check_like_x("bias", bias, x)
    if residual is not None:
        expected = (*x.shape[:-1], layout.n)
        if tuple(residual.shape) != expected:
            raise ValueError(
                f"residual: expected shape {expected} like the result, got {tuple(residual.shape)}; expand it"
            )
        _check_like_x("residual", residual, x)
    if variant and (layout.device_type != "cuda" or variant not in VARIANTS):
        raise ValueError(
            f"variant: expected one of {', '.join(VARIANTS)} on CUDA, got {variant!r} for kind {layout.kind!r}; "
            "leave it out"
        )


def _check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype} like x, got {tensor.dtype}; convert it")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}; move it")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")


@lru_cache(maxsize=1)
def _triton() -> Any:
    # Imported on the first CUDA call: the package is usable on machines that have no Triton.
    try:
        from . import launch as weight_only_triton
    except ImportError as error:
        raise ImportError("weight-only ops on CUDA need the package triton; install it or run on the CPU") from error
    return weight_only_triton


def _linear_cpu(x, weight, scale, zero_point, bias, residual, kind, bits, n, k, group_size, symmetric, variant,
                batch_invariant):  # fmt: skip
    layout = _checked_layout(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric)
    _check_operands(x, weight, scale, bias, residual, layout, variant)
    return cpu.weight_only_linear(x, weight, scale, zero_point, bias, residual, layout, batch_invariant)


def _linear_cuda(x, weight, scale, zero_point, bias, residual, kind, bits, n, k, group_size, symmetric, variant,
                 batch_invariant):  # fmt: skip
    layout = _layout(kind, bits, n, k, group_size, symmetric)
    return _multiply(x, weight, scale, zero_point, bias, residual, layout, variant, batch_invariant)


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    variant: str,
    batch_invariant: bool,
) -> Tensor:
    """The op on CUDA."""
    if not _all_fits(x, weight, scale, zero_point, bias, residual, layout, variant):
        _check_layout(weight, scale, zero_point, layout)
        _check_operands(x, weight, scale, bias, residual, layout, variant)
        check_alignment(weight=weight, scale=scale)
    return _triton().weight_only_linear(x, weight, scale, bias, residual, layout, variant or None, batch_invariant)


def _all_fits(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    variant: str,
) -> bool:
    """Whether `_check_layout`, `_check_operands` and `check_alignment` have nothing to say of CUDA tensors, at a tenth
    of their time; false where they have to be asked."""
    (weight_shape, weight_dtype), (scale_shape, _), _ = layout.specs()
    dtype, shape, index = x.dtype, x.shape, x.get_device()
    return (
        layout.kind == "triton"
        and zero_point is None
        and not variant
        and weight.shape == weight_shape
        and scale.shape == scale_shape
        and weight.dtype is weight_dtype
        and scale.dtype is dtype
        and dtype in DTYPES
        and weight.is_contiguous()
        and scale.is_contiguous()
        and len(shape) > 0
        and shape[-1] == layout.k
        and weight.get_device() == index
        and scale.get_device() == index
        and (weight.data_ptr() | scale.data_ptr()) % ALIGNMENT == 0
        and (bias is None or (bias.shape == (layout.n,) and bias.dtype is dtype and bias.get_device() == index))
        and (
            residual is None
            or (
                residual.shape == (*shape[:-1], layout.n) and residual.dtype is dtype and residual.get_device() == index
            )
        )
    )


def _linear_fake(x, weight, scale, zero_point, bias, residual, kind, bits, n, k, group_size, symmetric, variant,
                 batch_invariant):  # fmt: skip
    layout = _checked_layout(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric)
    _check_operands(x, weight, scale, bias, residual, layout, variant)
    return x.new_empty(*x.shape[:-1], n)


def _dequantize_cpu(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric, dtype):
    _check_dtype(dtype)
    layout = _checked_layout(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric)
    return cpu.dequantize(weight, scale, zero_point, layout, dtype)


def _dequantize_cuda(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric, dtype):
    return _dequantize(weight, scale, zero_point, _layout(kind, bits, n, k, group_size, symmetric), dtype)


def _dequantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout, dtype: torch.dtype
) -> Tensor:
    """The op on CUDA."""
    _check_dtype(dtype)
    _check_layout(weight, scale, zero_point, layout)
    check_alignment(weight=weight, scale=scale)
    return _triton().dequantize(weight, scale, layout, dtype)


def _dequantize_fake(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric, dtype):
    _check_dtype(dtype)
    _checked_layout(weight, scale, zero_point, kind, bits, n, k, group_size, symmetric)
    return weight.new_empty(n, k, dtype=dtype)


def _require_grad(*tensors: Tensor | None) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _no_backward(ctx, grad):
    raise NotImplementedError(
        "sliderquant_kernels ops are for inference and have no backward; call them under torch.no_grad(), or "
        "train on the dense weight that dequantize returns, detached"
    )


for _name, _on_cpu, _on_cuda, _fake in (
    ("weight_only_linear", _linear_cpu, _linear_cuda, _linear_fake),
    ("dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"sliderquant_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"sliderquant_kernels::{_name}", _no_backward, lib=_library)

_linear_op = torch.ops.sliderquant_kernels.weight_only_linear.default
_dequantize_op = torch.ops.sliderquant_kernels.dequantize.default
