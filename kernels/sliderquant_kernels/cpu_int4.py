"""The int4 container of `torch.ops.aten._weight_int4pack_mm_for_cpu`: 2, 3 and 4-bit codes, bf16 activations.

Why this container even for 2 and 3 bits: torch has no narrower CPU matmul, and dequantizing on every call costs several
bf16 matmuls of one token, where this op takes a third of one. The price is memory: 4 bits instead of 2 or 3, plus a
second bf16 (the zero) per group.

Only bf16 has a vectorized kernel: in fp32 and fp16 torch runs a scalar loop, some ten times *slower* than a dense
matmul.

A code is stored as c = q + 8 - 2^(b-1), and the op computes (c - 8) * scale + zero in fp32, so zero = (2^(b-1) - z) *
scale. It is 0 when symmetric, exact in bf16 for 2 bits, and otherwise rounded by at most 2^-8 relative, which always
leaves z recoverable: z = 2^(b-1) - round(zero / scale).

torch's packing is opaque and depends on the instruction set. Blocks of B rows are stored one after the other as `[K,
B / 2]` bytes; the two nibbles of a byte are rows B / 2 apart ("halves": AVX512 with B = 64, AVX2 with B = 32) or
neighbours ("pairs": elsewhere, and always in a short last block). `row_order` finds out by packing a probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4)
ROW_MULTIPLE = 16
OP_GROUP_SIZES = (256, 128, 64, 32)
# Beyond this, dequantizing once and multiplying in bf16 is faster than the op, whose time grows with the tokens. Its
# time over the dequantizing path's, on AVX512 and for N = 2048 to 8192, K = 2048: 0.05-0.08 for one token, 0.33-0.45
# for 16, 0.56-0.77 for 32, 0.91-1.11 for 64 on one core, 1.2 for 64 on two.
MAX_OP_TOKENS = 48
# 2 M weights (4 MB of bf16) at a time: smaller chunks pay torch's per-op cost, larger ones fall out of the L3 cache and
# would amount to a dense copy of the layer.
_CHUNK_WEIGHTS = 1 << 21


class RowOrder(NamedTuple):
    """How torch orders the rows of a full block on this machine."""

    block: int
    halves: bool


def op_group_size(k: int, group_size: int | None) -> int | None:
    """The group size handed to the op, or None where it has none that fits. Per channel repeats scales over groups."""
    sizes = OP_GROUP_SIZES if group_size is None else tuple(s for s in OP_GROUP_SIZES if s == group_size)
    return next((s for s in sizes if k % s == 0), None)


def fits(bits: int, n: int, k: int, group_size: int | None) -> bool:
    """Whether the container can hold such a weight."""
    return bits in BITS and n % ROW_MULTIPLE == 0 and op_group_size(k, group_size) is not None


@lru_cache(maxsize=1)
def is_fast() -> bool:
    """Whether torch vectorizes the op here, and orders rows in a way that this module knows."""
    # Below AVX2 the op is a scalar loop, slower than dequantizing.
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" and row_order() is not None


@lru_cache(maxsize=1)
def row_order() -> RowOrder | None:
    """The order of rows in torch's packing, by packing row numbers; None if it is none of the known ones."""
    n, k = 64 + 48, 4
    rows = torch.arange(n, dtype=torch.int32)[:, None].expand(n, k)
    low, high = (_convert(part.contiguous()).flatten() for part in (rows % 16, rows // 16))
    found = torch.stack([(low & 15) + ((high & 15) << 4), (low >> 4) + ((high >> 4) << 4)], -1)
    for block in (64, 32, 16):
        for halves in (True, False):
            order = RowOrder(block, halves)
            want = []
            for start in range(0, n, block):
                size = min(block, n - start)
                columns = torch.arange(start, start + size)
                plane = planes(columns, size, halves and size == block).reshape(2, -1)
                want.append(plane.t().expand(k, -1, 2).reshape(-1, 2))
            if torch.equal(torch.cat(want), found.long()):
                return order
    return None


def planes(t: Tensor, block: int, halves: bool) -> Tensor:
    """A view of `[..., rows]` as `[..., 2, rows / block, block / 2]`: low nibbles, then high ones, as stored."""
    if halves:
        return t.unflatten(-1, (-1, 2, block // 2)).transpose(-3, -2)
    return t.unflatten(-1, (-1, block // 2, 2)).movedim(-1, -3)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int | None) -> tuple:
    """Codes `[N, K]`, scale `[N, G]` bf16, zero_point `[N, G]` or None -> (weight, fused `[G', N, 2]` bf16)."""
    n, k = codes.shape
    half = 2 ** (bits - 1)
    # Not torch's own packer: it takes int32 codes, which is most of the peak of loading a model, and longer.
    weight = torch.empty(n, k // 2, dtype=torch.uint8)
    for start, rows, block, halves in _chunks(n, k):
        for first in range(start, start + rows, block):
            nibbles = planes((codes[first : first + block] + (8 - half)).t(), block, halves)
            # Turned a block at a time: torch's copy is fast for a transposed matrix only.
            weight[first : first + block].view(k, block // 2).copy_(nibbles[:, 0, 0] | (nibbles[:, 1, 0] << 4))
    zero = torch.zeros_like(scale) if zero_point is None else (half - zero_point.to(scale.dtype)) * scale
    group = op_group_size(k, group_size)
    assert group is not None
    fused = torch.stack([scale, zero], -1).transpose(0, 1).expand(k // group, n, 2)
    return weight, fused.contiguous()


def unpack(weight: Tensor, fused: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: codes `[N, K]`, scale `[N, G]`, zero_point `[N, G]` (all 2^(b-1) if symmetric)."""
    n, k = weight.shape[0], weight.shape[1] * 2
    codes = torch.empty(n, k, dtype=torch.uint8)
    for start, rows, block, halves in _chunks(n, k):
        nibbles = torch.empty(k, 2, rows // 2, dtype=torch.uint8)
        _nibbles_into(nibbles, weight, start, rows, block)
        natural = torch.empty(k, rows, dtype=torch.uint8)
        planes(natural, block, halves).copy_(nibbles.view(k, 2, -1, block // 2))
        codes[start : start + rows] = natural.t()
    half = 2 ** (bits - 1)
    if group_size is None:
        fused = fused[:1]
    scale = fused[..., 0].t().contiguous()
    zero_point = (half - _zero_steps(fused)).to(torch.uint8).t().contiguous()
    return codes - (8 - half), scale, zero_point


def matmul(x: Tensor, weight: Tensor, fused: Tensor, group_size: int | None, symmetric: bool) -> Tensor:
    """x `[M, K]` bf16 -> `[M, N]` bf16, through the op for few tokens and chunk-wise dequantization for many."""
    if x.shape[0] <= MAX_OP_TOKENS:
        group = weight.shape[1] * 2 // fused.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, fused)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for start, rows, block, halves, w in _dequantized_chunks(weight, fused, symmetric, torch.bfloat16):
        part = torch.mm(x, w.view(-1, rows))
        planes(y[:, start : start + rows], block, halves).copy_(part.view(-1, 2, rows // block, block // 2))
    return y


def dequantize(weight: Tensor, fused: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once."""
    n, k = weight.shape[0], weight.shape[1] * 2
    out = torch.empty(n, k, dtype=dtype)
    compute = dtype if dtype == fused.dtype else torch.float32
    for start, rows, block, halves, w in _dequantized_chunks(weight, fused, symmetric, compute):
        planes(out[start : start + rows].t(), block, halves).copy_(w.view(k, 2, rows // block, block // 2))
    return out


def _convert(nibbles: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)


def _zero_steps(fused: Tensor) -> Tensor:
    """2^(b-1) - z as an integral fp32 tensor; the stored zero is off by 2^-8 relative, so rounding restores it."""
    return (fused[..., 1].float() / fused[..., 0].float()).round_()


def _chunks(n: int, k: int) -> Iterator[tuple[int, int, int, bool]]:
    """(first row, rows, rows per block, halves) of runs of equally ordered blocks that are small enough at a time."""
    order = row_order()
    if order is None:
        raise RuntimeError("this build of torch packs int4 weights in an order that is not known; use kind='cpu_bits'")
    full = n // order.block * order.block
    step = max(1, _CHUNK_WEIGHTS // (k * order.block)) * order.block
    for start in range(0, full, step):
        yield start, min(step, full - start), order.block, order.halves
    if full < n:
        yield full, n - full, n - full, False


def _nibbles_into(out: Tensor, weight: Tensor, start: int, rows: int, block: int) -> None:
    """Stored nibbles of some rows -> `[K, 2, rows / 2]` uint8, in stored order (long runs for what follows)."""
    k = weight.shape[1] * 2
    stored = weight[start : start + rows].reshape(rows // block, k, block // 2).transpose(0, 1).reshape(k, rows // 2)
    torch.bitwise_and(stored, 15, out=out[:, 0])
    torch.bitwise_right_shift(stored, 4, out=out[:, 1])


def _dequantized_chunks(
    weight: Tensor, fused: Tensor, symmetric: bool, dtype: torch.dtype
) -> Iterator[tuple[int, int, int, bool, Tensor]]:
    """`_chunks` with their weights `[G', group, 2, rows / 2]`, that is `[K, rows]`, in stored order."""
    n, k = weight.shape[0], weight.shape[1] * 2
    groups = fused.shape[0]
    scale = fused[..., 0]
    steps = None if symmetric else _zero_steps(fused)
    for start, rows, block, halves in _chunks(n, k):
        nibbles = torch.empty(k, 2, rows // 2, dtype=torch.uint8)
        _nibbles_into(nibbles, weight, start, rows, block)

        shape = (groups, 1, 2, rows // 2)
        # int8 because torch converts it to bf16 in vectors, uint8 it does not.
        w = nibbles.view(torch.int8).sub_(8).to(dtype).view(groups, k // groups, 2, rows // 2)
        if steps is not None:
            w.add_(planes(steps[:, start : start + rows], block, halves).reshape(shape).to(dtype))
        w.mul_(planes(scale[:, start : start + rows], block, halves).reshape(shape).to(dtype))
        yield start, rows, block, halves, w
