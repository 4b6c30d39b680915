"""Launching the kernels of `matmul_triton`: what a problem and a device lead to, and the launch itself."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from . import matmul_triton as kernels
from .fragments import block_inputs, zero_bias
from .layout import WeightLayout
from .tiles import Choice, Device, Problem
from .tuned import choose
from .workspace import split_counters

# Whether TRITON_INTERPRET was set when the kernels were defined; decided for the life of the process.
INTERPRETED = not isinstance(kernels.warp_k_kernel, triton.JITFunction)
# What the interpreter stands for: plain Triton instead of PTX, and tiles as on an H100.
_INTERPRETED_DEVICE = Device.typical(90)
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# Triton before 3.6 has no matrix product of 8 tokens: what is launched then is what 9 tokens take.
FEWEST_TOKENS = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 9


def problem_of(layout: WeightLayout, m: int, dtype: torch.dtype) -> Problem:
    """The problem, as the rules see it, of `m` tokens of `dtype` times a packed weight."""
    return Problem(max(m, FEWEST_TOKENS), layout.n, layout.k, layout.bits, layout.group_size, layout.symmetric, dtype)


def device_of(tensor: Tensor) -> Device:
    """The device that a tensor is on, as the rules see it."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else _INTERPRETED_DEVICE


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.multi_processor_count, found.name)


def operand_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the matrix instruction's operands: that of x, except that the interpreter cannot multiply bf16."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]


def matmul_constants(problem: Problem, choice: Choice, arch: int) -> dict[str, Any]:
    """The compile-time arguments of `warp_k_kernel` and `rows_kernel`; shared by the launch and by `inspect`."""
    inputs = block_inputs(problem.bits)
    shares = choice.split * (choice.num_warps if choice.variant == "warp_k" else 1)
    edge = 2 if problem.k % inputs else int(choice.variant == "warp_k" and problem.k // inputs % shares != 0)
    constants = {
        **_scheme_constants(problem.bits, problem.group_size, problem.symmetric, problem.dtype),
        "K_EDGE": edge,
        "BLOCK_M": choice.block_m,
        "ROW_BLOCKS": choice.row_blocks,
        "SPLIT": choice.split,
        "STAGES": choice.num_stages,
        "OPERAND": operand_dtype(problem.dtype),
        "BF16": problem.dtype == torch.bfloat16,
        "ARCH": 0 if INTERPRETED else arch,
    }
    if choice.variant == "warp_k":
        constants["W"] = choice.num_warps
    return constants


def dequantize_constants(layout: WeightLayout, scale_dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `dequantize_kernel`; shared by the launch and by `inspect`."""
    scheme = _scheme_constants(layout.bits, layout.group_size, layout.symmetric, scale_dtype)
    return {**scheme, "W": max(256 // block_inputs(layout.bits), 1), "ROW_BLOCKS": 2}


def _scheme_constants(bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype) -> dict[str, Any]:
    bias = zero_bias(bits, dtype)
    return {"BITS": bits, "GROUP_SIZE": group_size or 0, "SYMMETRIC": symmetric, "ZERO_BIAS": bias}


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Triton's options. FP fusion is named because its default differs between Triton versions."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


DEQUANTIZE_OPTIONS = launch_options(num_warps=4, num_stages=1)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    variant: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x `[..., K]` -> `[..., N]`, contiguous. Arguments have been validated.

    Allocates y; x if it is strided; a split's partial sums, fp32 `[split, M, N]`; the dense weight for `dense`.
    """
    y = x.new_empty(*x.shape[:-1], layout.n)
    x = x.reshape(-1, layout.k).contiguous()
    m, n, k = x.shape[0], layout.n, layout.k
    if m == 0:
        return y
    if residual is not None:
        residual = residual.reshape(-1, n).contiguous()
    problem, device = problem_of(layout, m, x.dtype), device_of(x)
    choice = choose(problem, device, variant, batch_invariant)
    if choice.variant == "dense":
        out = linear(x, dequantize(weight, scale, layout, x.dtype), bias)
        return (out if residual is None else out.add_(residual)).view(y.shape)
    row_blocks, k_blocks = weight.shape[:2]
    tiles = triton.cdiv(m, choice.block_m) * triton.cdiv(row_blocks, choice.row_blocks)
    partial = counters = None
    with _on_device_of(x):
        if choice.split > 1:
            partial = torch.empty(choice.split, m, n, dtype=torch.float32, device=x.device)
            counters = split_counters(tiles, x.device)
        kernel = kernels.warp_k_kernel if choice.variant == "warp_k" else kernels.rows_kernel
        kernel[(tiles, choice.split)](
            x, weight, scale, bias, residual, y, partial, counters, m, n, k, row_blocks, k_blocks,
            **matmul_constants(problem, choice, device.arch),
            **launch_options(choice.num_warps, choice.num_stages),
        )  # fmt: skip
    return y


def dequantize(weight: Tensor, scale: Tensor, layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once. Arguments have been validated."""
    out = torch.empty(layout.n, layout.k, dtype=dtype, device=weight.device)
    row_blocks, k_blocks = weight.shape[:2]
    constants = dequantize_constants(layout, scale.dtype)
    grid = (triton.cdiv(row_blocks, constants["ROW_BLOCKS"]) * triton.cdiv(k_blocks, constants["W"]),)
    with _on_device_of(weight):
        kernels.dequantize_kernel[grid](
            weight, scale, out, layout.n, layout.k, row_blocks, k_blocks, **constants, **DEQUANTIZE_OPTIONS
        )
    return out


def _on_device_of(tensor: Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
