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

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import int4_native
from .scratch import scratch

BITS = (2, 3, 4)
ROW_MULTIPLE = 16
OP_GROUP_SIZES = (256, 128, 64, 32)
# 1 M weights (2 MB of bf16) at a time: smaller chunks pay torch's per-op cost, larger ones fall out of the cache.
_CHUNK_WEIGHTS = 1 << 20


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
def max_op_tokens() -> int:
    """Tokens beyond which dequantizing once and multiplying in bf16 is faster than the op, whose time grows with them.

    Both take about the same time at these numbers, on AVX512 without AMX; where there is AMX, `cpu_vnni` multiplies.
    """
    return 32 if int4_native.is_available() else 48


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
    for chunk in _chunks(n, k):
        for first in range(chunk.rows.start, chunk.rows.stop, chunk.block):
            nibbles = planes((codes[first : first + chunk.block] + (8 - half)).t(), chunk.block, chunk.halves)
            # Turned a block at a time: torch's copy is fast for a transposed matrix only.
            weight[first : first + chunk.block].view(k, -1).copy_(nibbles[:, 0, 0] | (nibbles[:, 1, 0] << 4))
    zero = torch.zeros_like(scale) if zero_point is None else (half - zero_point.to(scale.dtype)) * scale
    group = op_group_size(k, group_size)
    assert group is not None
    fused = torch.stack([scale, zero], -1).transpose(0, 1).expand(k // group, n, 2)
    return weight, fused.contiguous()


def unpack(weight: Tensor, fused: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: codes `[N, K]`, scale `[N, G]`, zero_point `[N, G]` (all 2^(b-1) if symmetric)."""
    n, k = weight.shape[0], weight.shape[1] * 2
    codes = torch.empty(n, k, dtype=torch.uint8)
    for chunk in _chunks(n, k):
        codes[chunk.rows] = _stored_codes(weight, chunk).t()
    half = 2 ** (bits - 1)
    if group_size is None:
        fused = fused[:1]
    scale = fused[..., 0].t().contiguous()
    zero_point = (half - _zero_steps(fused)).to(torch.uint8).t().contiguous()
    return codes - (8 - half), scale, zero_point


def matmul(x: Tensor, weight: Tensor, fused: Tensor, symmetric: bool) -> Tensor:
    """x `[M, K]` bf16 -> `[M, N]` bf16, through the op for few tokens and chunk-wise dequantization for many."""
    n, k = weight.shape[0], weight.shape[1] * 2
    if x.shape[0] <= max_op_tokens():
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, k // fused.shape[0], fused)
    y = x.new_empty(x.shape[0], n)
    for rows, w in dequantized_chunks(weight, fused, symmetric, torch.bfloat16):
        torch.mm(x, w, out=y[:, rows])
    return y


def dequantize(weight: Tensor, fused: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once."""
    out = torch.empty(weight.shape[0], weight.shape[1] * 2, dtype=dtype)
    compute = dtype if dtype == fused.dtype else torch.float32
    for rows, w in dequantized_chunks(weight, fused, symmetric, compute):
        out[rows] = w.t()
    return out


def _convert(nibbles: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)


def _zero_steps(fused: Tensor) -> Tensor:
    """2^(b-1) - z as an integral fp32 tensor; the stored zero is off by 2^-8 relative, so rounding restores it."""
    scale, zero = _scale_and_zero(fused)
    return zero.div_(scale).round_()


def _scale_and_zero(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Each as fp32 `[G', N]`, contiguous, in new memory: a bf16 is the upper half of an fp32."""
    if sys.byteorder == "big":
        return fused[..., 0].float(), fused[..., 1].float()
    words = fused.view(torch.int32).squeeze(-1)
    return (words << 16).view(torch.float32), (words & ~0xFFFF).view(torch.float32)


class _Chunk(NamedTuple):
    """A run of rows that are stored in blocks of the same size and order."""

    rows: slice
    block: int
    halves: bool

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def _chunks(n: int, k: int) -> Iterator[_Chunk]:
    """The rows of a weight `[n, k]`, a few at a time."""
    order = row_order()
    if order is None:
        raise RuntimeError("this build of torch packs int4 weights in an order that is not known; use kind='cpu_bits'")
    full = n // order.block * order.block
    step = max(1, _CHUNK_WEIGHTS // (k * order.block)) * order.block
    for start in range(0, full, step):
        yield _Chunk(slice(start, min(start + step, full)), order.block, order.halves)
    if full < n:
        yield _Chunk(slice(full, n), n - full, False)


def _stored_codes(weight: Tensor, chunk: _Chunk) -> Tensor:
    """The codes c of some rows as `[K, rows]` uint8, rows in their natural order; valid until the next call."""
    k, blocks = weight.shape[1] * 2, chunk.size // chunk.block
    natural = scratch("codes", torch.uint8, k, blocks, 2, chunk.block // 2)
    # Words of eight bytes: copying and joining runs of 32 bytes costs torch a step per element.
    word = torch.int64 if chunk.block % 16 == 0 else torch.uint8
    mask = 0x0F0F0F0F0F0F0F0F if word == torch.int64 else 15
    packed = weight[chunk.rows].view(blocks, k, chunk.block // 2).view(word).transpose(0, 1)
    low, high = (scratch(name, torch.uint8, k, blocks, chunk.block // 2).view(word) for name in ("low", "high"))
    low.copy_(packed)
    torch.bitwise_right_shift(low, 4, out=high)
    low.bitwise_and_(mask)
    high.bitwise_and_(mask)
    if chunk.halves:
        torch.stack((low, high), 2, out=natural.view(word))
    else:
        pairs = natural.view(k, blocks, chunk.block // 2, 2)
        torch.stack((low.view(torch.uint8), high.view(torch.uint8)), 3, out=pairs)
    return natural.view(k, chunk.size)


def dequantized_chunks(
    weight: Tensor, fused: Tensor, symmetric: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights `[K, rows]` in `dtype`): each is valid until the next one is asked for."""
    groups, n, k = fused.shape[0], weight.shape[0], weight.shape[1] * 2
    if int4_native.is_available() and dtype in (torch.bfloat16, torch.float32):
        for chunk in _chunks(n, k):
            w = scratch("weights", dtype, k, chunk.size)
            int4_native.dequantize_int4(
                weight[chunk.rows], fused[:, chunk.rows], chunk.block, chunk.halves, symmetric, w
            )
            yield chunk.rows, w
        return
    scale, zero = _scale_and_zero(fused)
    # c less this is q - z: integers of 8 bits, which torch subtracts some ten times as fast as bf16.
    offset = None if symmetric else zero.div_(scale).round_().sub_(8).neg_().to(torch.int8)
    scale = scale.to(dtype)
    for chunk in _chunks(n, k):
        codes = _stored_codes(weight, chunk).view(torch.int8).view(groups, k // groups, chunk.size)
        if offset is None:
            codes.sub_(8)
        else:
            codes.sub_(offset[:, None, chunk.rows])
        w = scratch("weights", dtype, groups, k // groups, chunk.size)
        # Not in one call: torch would convert the codes into new memory, page by page.
        w.copy_(codes).mul_(scale[:, None, chunk.rows])
        yield chunk.rows, w.view(k, chunk.size)
