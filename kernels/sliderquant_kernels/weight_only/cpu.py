"""The ops on a CPU: torch's int4 and int8 matmuls where they are faster, dequantization otherwise.

A bf16 weight that must be dequantized is dequantized a few rows at a time on every call, and no dense copy is kept.
With fp16 and fp32, which torch's ops for packed weights compute in scalar loops, the layout holds the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..common.layout import PackedWeight
from ..cpu import int4, vnni
from ..cpu.scratch import scratch
from ..cpu.vnni import DirectVnniLinear, prefers_torch
from . import bits as bitpack
from .layout import WeightLayout

# As in cpu_int4, for torch's int8 matmul: its time over the dequantizing path's is 0.23-0.31 for one token, 0.84-1.15
# for 16, 1.3-1.7 for 32. One token takes 0.6 of a dense bf16 matmul; dequantizing every time takes 3 to 4 of them.
MAX_INT8_TOKENS = 16
_CHUNK_WEIGHTS = 1 << 21


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    batch_invariant: bool = False,
) -> Tensor:
    """x `[..., K]` -> `[..., N]`, contiguous. Arguments have been validated."""
    shape = x.shape[:-1]
    if layout.kind == "cpu_vnni" and (batch_invariant or not prefers_torch(x.numel() // layout.k)):
        packed = PackedWeight(weight, scale, zero_point)
        return vnni.weight_only_linear(x, packed, layout, bias, residual, batch_invariant)
    x = x.reshape(-1, layout.k).contiguous()
    if batch_invariant and x.shape[0] > 1:
        y = x.new_empty(x.shape[0], layout.n)
        _one_by_one(x, weight, scale, zero_point, layout, y)
    else:
        y = _matmul(x, weight, scale, zero_point, layout)
    if bias is not None:
        y.add_(bias)
    y = y.view(*shape, layout.n) if len(shape) != 1 else y
    return y if residual is None else y.add_(residual)


def _weights_for(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights `[K, rows]` in x's dtype), each valid until the next are asked for."""
    if layout.kind == "cpu_dense":
        yield slice(0, layout.n), weight.t()
    elif layout.kind == "cpu_vnni":
        yield from vnni.dequantized_chunks(PackedWeight(weight, scale, zero_point), layout, x.dtype)
    elif layout.kind == "cpu_int4":
        yield from int4.dequantized_chunks(weight, scale, layout.symmetric, x.dtype)
    else:
        for rows, w in _dequantized_chunks(weight, scale, zero_point, layout, x.dtype):
            yield rows, w.t()


def _matmul(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout) -> Tensor:
    if layout.kind == "cpu_int4" and x.shape[0]:
        return int4.matmul(x, weight, scale, layout.symmetric)
    if layout.kind == "cpu_int8" and 0 < x.shape[0] <= MAX_INT8_TOKENS:
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale.view(-1))
    if layout.kind == "cpu_dense":
        return linear(x, weight)
    y = x.new_empty(x.shape[0], layout.n)
    if layout.kind == "cpu_vnni":
        for rows, w in _weights_for(x, weight, scale, zero_point, layout):
            torch.mm(x, w, out=y[:, rows])
    elif x.shape[0]:
        for rows, w in _dequantized_chunks(weight, scale, zero_point, layout, x.dtype):
            y[:, rows] = linear(x, w)
    return y


class DirectLinear:
    """`weight_only_linear` for one weight whose arguments were checked once, with the same bits as the op.

    It skips the dispatcher and its checks, which take longer than the product of one token with a small weight. It
    serves eager calls without gradients; tracing needs the op.
    """

    __slots__ = ("_loop", "bias", "layout", "scale", "weight", "zero_point")

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, layout: WeightLayout
    ) -> None:
        self.weight, self.scale, self.zero_point, self.bias, self.layout = weight, scale, zero_point, bias, layout
        self._loop: DirectVnniLinear | None = None
        if layout.kind == "cpu_vnni" and (bias is None or bias.is_contiguous()):
            self._loop = DirectVnniLinear(PackedWeight(weight, scale, zero_point), layout, scale.dtype, bias, None)

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is what the op would compute with these tensors, outside of gradients and tracing."""
        return (
            type(x) is Tensor
            and x.dtype == self.scale.dtype
            and x.ndim > 0
            and x.shape[-1] == self.layout.k
            and x.is_cpu
            and not (x.requires_grad and torch.is_grad_enabled())
        )

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The first `sizes[0]` outputs, the next, and so on, each `[..., size]` and contiguous.

        For many tokens: what reads a slice of one product, which is strided, takes up to twice as long.
        """
        rows = x.reshape(-1, self.layout.k).contiguous()
        if self._loop is not None and not prefers_torch(rows.shape[0]):
            return self._loop.parts(x, sizes)
        found = [rows.new_empty(rows.shape[0], size) for size in sizes]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        for done, w in _weights_for(rows, self.weight, self.scale, self.zero_point, self.layout):
            for part, start, size in zip(found, starts, sizes, strict=True):
                low, high = max(done.start, start), min(done.stop, start + size)
                if low < high:
                    columns = w[:, low - done.start : high - done.start]
                    torch.mm(rows, columns, out=part[:, low - start : high - start])
                    if self.bias is not None:
                        part[:, low - start : high - start].add_(self.bias[low:high])
        return [part.view(*x.shape[:-1], size) for part, size in zip(found, sizes, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, contiguous."""
        layout = self.layout
        if self._loop is not None and not prefers_torch(x.numel() // layout.k):
            return self._loop(x)
        rows = x.reshape(-1, layout.k).contiguous()
        y = _matmul(rows, self.weight, self.scale, self.zero_point, layout)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], layout.n)


def _one_by_one(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout, y: Tensor
) -> None:
    """Every token for itself, as if it came alone: torch's matmuls round by the number of tokens."""
    if layout.kind != "cpu_bits":
        for i in range(x.shape[0]):
            y[i] = _matmul(x[i : i + 1], weight, scale, zero_point, layout)[0]
        return
    for rows, w in _dequantized_chunks(weight, scale, zero_point, layout, x.dtype):
        for i in range(x.shape[0]):
            y[i : i + 1, rows] = linear(x[i : i + 1], w)


def dequantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout, dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once. Arguments have been validated."""
    if layout.kind == "cpu_int4":
        return int4.dequantize(weight, scale, layout.symmetric, dtype)
    if layout.kind == "cpu_dense" and dtype == weight.dtype:
        return weight.clone()
    out = torch.empty(layout.n, layout.k, dtype=dtype)
    if layout.kind == "cpu_vnni":
        # fp16 has a narrower range than the bf16 scales: it is rounded to last.
        exact = dtype if vnni.takes(dtype) else torch.float32
        for rows, w in vnni.dequantized_chunks(PackedWeight(weight, scale, zero_point), layout, exact):
            out[rows] = w.t()
        return out
    compute = dtype if dtype == scale.dtype else torch.float32
    for rows, w in _dequantized_chunks(weight, scale, zero_point, layout, compute):
        out[rows] = w
    return out


def _dequantized_chunks(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: WeightLayout, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights `[rows, K]` in `dtype`, valid until the next are asked for). Every dtype holds the integer
    q - z: one rounding, by the scale."""
    half = 2 ** (layout.bits - 1)
    step = max(1, _CHUNK_WEIGHTS // layout.k)
    for start in range(0, layout.n, step):
        rows = slice(start, min(start + step, layout.n))
        shape = (rows.stop - rows.start, layout.groups, layout.k // layout.groups)
        w = scratch("weights", dtype, *shape)
        if layout.kind == "cpu_dense":
            w.copy_(torch.div(weight[rows].view(shape), scale[rows].float().unsqueeze(-1)).round_())
        elif layout.kind == "cpu_int8":
            w.copy_(weight[rows].view(shape))
        elif layout.bits == 8:
            # q - 2^7: q - z would not fit int8.
            codes = bitpack.unpack_rows(weight[rows], layout.bits, layout.k)
            w.copy_((codes ^ 0x80).view(torch.int8).view(shape))
            if zero_point is not None:
                w.sub_(zero_point[rows].to(dtype).sub_(half).unsqueeze(-1))
        else:
            # As int8, which torch subtracts and converts some ten times as fast as it subtracts bf16.
            codes = bitpack.unpack_rows(weight[rows], layout.bits, layout.k).view(torch.int8).view(shape)
            w.copy_(codes.sub_(half if zero_point is None else zero_point[rows].view(torch.int8).unsqueeze(-1)))
        w.mul_(scale[rows].to(dtype).unsqueeze(-1))
        yield rows, w.view(-1, layout.k)
