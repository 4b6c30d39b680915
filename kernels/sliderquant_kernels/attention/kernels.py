"""The Triton kernels of `decode_attention`: programs that each attend over some positions, and one that joins them."""

# mypy: allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch_plan import launch

# Positions of a program, and of a step of its loop: few, because a short generation waits for one program.
SHARE, BLOCK = 64, 64
# Shares that are joined in one step.
JOINED = 16
# The fewest rows of a matrix product.
_ROWS = 16
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["heads", "groups", "shares", "q_batch", "q_head", "k_batch", "k_head", "v_batch",
                                "v_head", "mask_batch"])  # fmt: skip
def share_kernel(q_ptr, k_ptr, v_ptr, mask_ptr, index_ptr, sum_ptr, most_ptr, total_ptr, scale, heads, groups, shares,
                 q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch,
                 D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
                 ROWS: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """Softmax and sum of values over the positions of one share, unnormalised (Milakov and Gimelshein 2018; shares as
    in Dao et al., Flash-Decoding 2023). heads: those of keys; groups: query heads for each. Grid: batch times heads,
    shares; a program whose share begins beyond the last position leaves at once.

    Into sum `[batch, heads, shares, groups, DV]`, most (the largest logit) and total `[batch, heads, shares, groups]`.
    """
    item = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    batch = item // heads
    head = item % heads
    length = tl.load(index_ptr).to(tl.int32) + 1
    start = share * SHARE
    if start < length:
        row = tl.arange(0, ROWS)
        d = tl.arange(0, PADDED_D)
        dv = tl.arange(0, PADDED_DV)
        q = tl.load(q_ptr + batch * q_batch + (head * groups + row[:, None]) * q_head + d[None, :],
                    (row[:, None] < groups) & (d[None, :] < D), 0.0).to(OPERAND)  # fmt: skip
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, PADDED_DV), tl.float32)
        for first in range(start, tl.minimum(start + SHARE, length), BLOCK):
            n = first + tl.arange(0, BLOCK)
            inside = n < length
            k = tl.load(k_ptr + batch * k_batch + head * k_head + n[:, None] * k_token + d[None, :],
                        inside[:, None] & (d[None, :] < D), 0.0).to(OPERAND)  # fmt: skip
            v = tl.load(v_ptr + batch * v_batch + head * v_head + n[:, None] * v_token + dv[None, :],
                        inside[:, None] & (dv[None, :] < DV), 0.0).to(OPERAND)  # fmt: skip
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if mask_ptr is not None:
                logits += tl.load(mask_ptr + batch * mask_batch + n, inside, 0.0).to(tl.float32)[None, :]
            logits = tl.where(inside[None, :], logits, float("-inf"))
            larger = tl.maximum(most, tl.max(logits, 1))
            # Nothing may be seen yet: minus infinity less itself is not a number.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp(logits - base[:, None])
            before = tl.exp(most - base)
            total = total * before + tl.sum(weights, 1)
            acc = acc * before[:, None] + tl.dot(weights.to(OPERAND), v, input_precision="ieee")
            most = larger
        out = (item * shares + share) * groups + row
        tl.store(most_ptr + out, most, row < groups)
        tl.store(total_ptr + out, total, row < groups)
        tl.store(sum_ptr + out[:, None] * DV + dv[None, :], acc, (row[:, None] < groups) & (dv[None, :] < DV))


@triton.jit(do_not_specialize=["groups", "shares"])
def join_kernel(sum_ptr, most_ptr, total_ptr, index_ptr, y_ptr, groups, shares, DV: tl.constexpr,
                PADDED_DV: tl.constexpr, SHARE: tl.constexpr, JOINED: tl.constexpr):  # fmt: skip
    """The shares' sums -> y `[batch, heads * groups, DV]`. Grid: rows of y."""
    row = tl.program_id(0).to(tl.int64)
    filled = tl.cdiv(tl.load(index_ptr).to(tl.int32) + 1, SHARE)
    dv = tl.arange(0, PADDED_DV)
    start = row // groups * shares * groups + row % groups
    most = float("-inf")
    total = 0.0
    acc = tl.zeros((PADDED_DV,), tl.float32)
    for first in range(0, filled, JOINED):
        share = first + tl.arange(0, JOINED)
        at = start + share * groups
        theirs = tl.load(most_ptr + at, share < filled, float("-inf"))
        larger = tl.maximum(most, tl.max(theirs, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        ours = tl.exp(most - base)
        weights = tl.exp(theirs - base)
        total = total * ours + tl.sum(tl.load(total_ptr + at, share < filled, 0.0) * weights, 0)
        sums = tl.load(sum_ptr + at[:, None] * DV + dv[None, :], (share < filled)[:, None] & (dv[None, :] < DV), 0.0)
        acc = acc * ours + tl.sum(sums * weights[:, None], 0)
        most = larger
    tl.store(y_ptr + row * DV + dv, acc / total, dv < DV)


# Whether TRITON_INTERPRET was set when the kernels were defined.
INTERPRETED = not isinstance(share_kernel, triton.JITFunction)


def share_options(size: int, out_size: int, groups: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `share_kernel` and Triton's options; shared by the launch and by `inspect`."""
    padded = [max(triton.next_power_of_2(n), 16) for n in (size, out_size)]
    constants = {
        "D": size,
        "DV": out_size,
        "PADDED_D": padded[0],
        "PADDED_DV": padded[1],
        "ROWS": max(triton.next_power_of_2(groups), _ROWS),
        "SHARE": SHARE,
        "BLOCK": BLOCK,
        # The interpreter cannot multiply bf16.
        "OPERAND": tl.float32 if INTERPRETED else _TRITON_DTYPES[dtype],
    }
    return constants, {"num_warps": 8 if max(padded) > 128 else 4, "num_stages": 2}


def join_options(out_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of `join_kernel`."""
    padded = max(triton.next_power_of_2(out_size), 16)
    return {"DV": out_size, "PADDED_DV": padded, "SHARE": SHARE, "JOINED": JOINED}, {"num_warps": 1}


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """See `decode_attention.decode_attention`. Arguments have been validated."""
    batch, query_heads, _, size = q.shape
    heads, capacity, out_size = keys.shape[1], keys.shape[2], values.shape[3]
    groups, shares = query_heads // heads, triton.cdiv(capacity, SHARE)
    y = q.new_empty(batch, 1, query_heads, out_size)
    sums = torch.empty(batch, heads, shares, groups, out_size, dtype=torch.float32, device=q.device)
    most = torch.empty(batch, heads, shares, groups, dtype=torch.float32, device=q.device)
    total = torch.empty_like(most)
    numbers = (scale, heads, groups, shares, q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3],
               0 if mask is None else mask.stride(0))  # fmt: skip
    launch(
        share_kernel, (batch * heads, shares, 1), (q, keys, values, mask, index, sums, most, total), numbers,
        *share_options(size, out_size, groups, q.dtype),
    )  # fmt: skip
    grid = (batch * query_heads, 1, 1)
    launch(join_kernel, grid, (sums, most, total, index, y), (groups, shares), *join_options(out_size))
    return y
