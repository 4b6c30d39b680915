"""Low-bit linears on a CPU: the compiled loop of `cpu_vnni` where the processor has AVX512-VNNI, elsewhere torch's
int8 matmul, which sums in int32, and the corrections of `kernels`. Both give the same bits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..common.layout import PackedWeight
from ..common.quantized import QuantizedActivations
from ..cpu import vnni
from .layout import LowBitLayout


def low_bit_linear(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    x_sum: Tensor,
    weight: Tensor,
    scale: Tensor,
    constants: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: LowBitLayout,
    dtype: torch.dtype,
) -> Tensor:
    """`[..., K]` -> `[..., N]` in `dtype`, rounded once. Arguments have been validated."""
    shape, n = (*codes.shape[:-1], layout.n), layout.n
    if layout.kind == "cpu_vnni":
        activations, packed = (
            QuantizedActivations(codes, x_scale, x_zero, x_sum),
            PackedWeight(weight, scale, constants),
        )
        return vnni.low_bit_linear(activations, packed, layout, dtype, bias, residual)
    x = codes.reshape(-1, layout.k).contiguous()
    if layout.group_size is None:
        total = int_mm(x, weight) - x_sum.reshape(-1, 1) * constants[0, :n]
        if x_zero is not None:
            total -= x_zero.reshape(-1, 1) * constants[-1, :n]
        y = total.float() * (x_scale.reshape(-1, 1) * scale[0, :n])
    else:
        y = torch.zeros(x.shape[0], n)
        for group in range(layout.groups):
            columns = slice(group * layout.group_size, (group + 1) * layout.group_size)
            part = x[:, columns].contiguous()
            # Less the zero-point, as the Triton kernels multiply it: the sum is exact either way.
            total = int_mm(part, weight[:, columns].contiguous())
            total -= part.sum(1, keepdim=True, dtype=torch.int32) * constants[group, :n]
            y += total.float() * scale[group, :n]
        if x_zero is not None:
            y -= x_zero.reshape(-1, 1).float() * constants[-1, :n].view(torch.float32)
        y *= x_scale.reshape(-1, 1)
    if bias is not None:
        y += bias.float()
    if residual is not None:
        y += residual.reshape(-1, n).float()
    return y.to(dtype).view(shape)


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """int8 `[M, K]` times the transpose of int8 `[N, K]` -> int32 `[M, N]`, exactly."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0], dtype=torch.int32)
    if is_exact():
        return torch._int_mm(x, weight.t())
    return (x.double() @ weight.double().t()).int()


@lru_cache(maxsize=1)
def is_exact() -> bool:
    """Whether torch's int8 matmul is exact here: instructions before VNNI saturate sums of two products."""
    for value in (-128, 127):
        x = torch.full((32, 64), value, dtype=torch.int8)
        w = torch.full((32, 64), -128, dtype=torch.int8)
        if not bool((torch._int_mm(x, w.t()) == 64 * value * -128).all()):
            return False
    return True
