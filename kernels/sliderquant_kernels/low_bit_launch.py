"""Launching the kernels of `low_bit_triton`: what a problem and a device lead to, and the launch itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import low_bit_triton as kernels
from .int8_fragments import ROWS, block_inputs
from .low_bit_layout import LowBitLayout
from .low_bit_tiles import choose_low_bit
from .tiles import Choice
from .weight_only_triton import FEWEST_TOKENS, INTERPRETED, device_of, launch_options

EXPAND_OPTIONS = launch_options(num_warps=4, num_stages=1)
TILE_K = 128
# Tiles of tokens that run side by side.
_BAND = 8


def matmul_constants(layout: LowBitLayout, choice: Choice) -> dict[str, Any]:
    """The compile-time arguments of the chosen kernel; shared by the launch and by `inspect`."""
    if choice.variant == "tiles":
        return {
            "EVEN_K": layout.k % TILE_K == 0,
            "BLOCK_M": choice.block_m,
            "BLOCK_N": choice.row_blocks * ROWS,
            "BLOCK_K": TILE_K,
            "BAND": _BAND,
            "STAGES": choice.num_stages,
        }
    inputs = block_inputs(layout.bits)
    shares = choice.num_warps if choice.variant == "warp_k" else 1
    constants = {
        "BITS": layout.bits,
        "GROUP_SIZE": layout.group_size or 0,
        "SYMMETRIC": layout.symmetric,
        "K_EDGE": 2 if layout.k % inputs else int(layout.k // inputs % shares != 0),
        "BLOCK_M": choice.block_m,
        "ROW_BLOCKS": choice.row_blocks,
        "STAGES": choice.num_stages,
        "ASM": not INTERPRETED,
    }
    if choice.variant == "warp_k":
        constants["W"] = choice.num_warps
    return constants


def matmul_options(choice: Choice) -> dict[str, Any]:
    """Triton's options for the chosen kernel. Two programs of the largest tiles fit on a multiprocessor: while one
    waits for its products or stores its tile, the other one multiplies."""
    options = launch_options(choice.num_warps, choice.num_stages)
    return options | {"maxnreg": 128} if choice.block_m == 128 else options


def expand_constants(layout: LowBitLayout) -> dict[str, Any]:
    """The compile-time arguments of `expand_kernel`."""
    return {"BITS": layout.bits, "W": max(256 // block_inputs(layout.bits), 1), "ROW_BLOCKS": 2}


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
    variant: str | None = None,
) -> Tensor:
    """`[..., K]` -> `[..., N]` in `dtype`, contiguous. Arguments have been validated.

    Allocates y, operands that are strided, and for `tiles` the weight as int8 `[N, K]`.
    """
    n, k = layout.n, layout.k
    y = codes.new_empty((*codes.shape[:-1], n), dtype=dtype)
    x = codes.reshape(-1, k).contiguous()
    m = x.shape[0]
    if m == 0:
        return y
    vectors = [None if t is None else t.reshape(-1).contiguous() for t in (x_scale, x_zero, x_sum)]
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.reshape(-1, n).contiguous()
    choice = choose_low_bit(max(m, FEWEST_TOKENS), n, k, layout.bits, layout.group_size, device_of(x), variant)
    options = matmul_options(choice)
    row_blocks, k_blocks = weight.shape[:2]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        tiles_m = triton.cdiv(m, choice.block_m)
        if choice.variant == "tiles":
            weight = expand(weight, layout)
            kernels.int8_tiles_kernel[(tiles_m * triton.cdiv(n, choice.row_blocks * ROWS),)](
                x, *vectors, weight, scale, constants, bias, residual, y, m, n, k, row_blocks * ROWS,
                **matmul_constants(layout, choice), **options,
            )  # fmt: skip
        else:
            warp_k = choice.variant == "warp_k"
            kernel = kernels.low_bit_warp_k_kernel if warp_k else kernels.low_bit_rows_kernel
            kernel[(tiles_m * triton.cdiv(row_blocks, choice.row_blocks),)](
                x, *vectors, weight, scale, constants, bias, residual, y, m, n, k, row_blocks, k_blocks,
                scale.shape[0], **matmul_constants(layout, choice), **options,
            )  # fmt: skip
    return y


def expand(weight: Tensor, layout: LowBitLayout) -> Tensor:
    """Packed codes -> int8 `[N, K]`, less 128 at 8 bits."""
    out = torch.empty(layout.n, layout.k, dtype=torch.int8, device=weight.device)
    row_blocks, k_blocks = weight.shape[:2]
    constants = expand_constants(layout)
    grid = (triton.cdiv(row_blocks, constants["ROW_BLOCKS"]) * triton.cdiv(k_blocks, constants["W"]),)
    kernels.expand_kernel[grid](
        weight, out, layout.n, layout.k, row_blocks, k_blocks, **constants, **EXPAND_OPTIONS
    )  # fmt: skip
    return out
