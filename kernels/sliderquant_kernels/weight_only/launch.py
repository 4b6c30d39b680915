"""Launching weight-only linears on CUDA: what a problem and a device lead to, and the launch itself.

What a launch needs beside its tensors is decided once for a layout, a number of tokens and so on, and kept as a plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ..common import devices
from ..common.choices import Choice, Problem, family
from ..common.launch_plan import Dtypes, Grid, Launcher, PlanCache, dtype_of, launcher_for
from ..common.launching import FEWEST_TOKENS, INTERPRETED, device_of, launch_options, operand_dtype, requires_grad
from ..common.releases import triton_release
from ..common.workspace import split_counters
from . import kernels
from .fragments import PLANE, block_inputs, zero_bias
from .layout import WeightLayout
from .tuned import choose


def problem_of(layout: WeightLayout, m: int, dtype: torch.dtype) -> Problem:
    """The problem, as the rules see it, of `m` tokens of `dtype` times a packed weight."""
    return Problem(max(m, FEWEST_TOKENS), layout.n, layout.k, layout.bits, layout.group_size, layout.symmetric, dtype)


def matmul_constants(problem: Problem, choice: Choice, arch: int) -> dict[str, Any]:
    """The compile-time arguments of `warp_k_kernel` and `rows_kernel`; shared by the launch and by `inspect`."""
    inputs = block_inputs(problem.bits)
    shares = choice.split * (choice.num_warps if choice.variant == "warp_k" else 1)
    edge = int(choice.variant == "warp_k" and problem.k // inputs % shares != 0)
    if problem.k % inputs:
        edge = 2 if problem.k % PLANE == 0 else 3
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
    else:
        constants["JOINED"] = 4 if family(arch) == 90 else 1
    return constants


def dequantize_constants(layout: WeightLayout, scale_dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `dequantize_kernel`; shared by the launch and by `inspect`."""
    scheme = _scheme_constants(layout.bits, layout.group_size, layout.symmetric, scale_dtype)
    return {**scheme, "W": max(256 // block_inputs(layout.bits), 1), "ROW_BLOCKS": 2}


def _scheme_constants(bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype) -> dict[str, Any]:
    bias = zero_bias(bits, dtype)
    return {"BITS": bits, "GROUP_SIZE": group_size or 0, "SYMMETRIC": symmetric, "ZERO_BIAS": bias}


def matmul_options(choice: Choice, arch: int) -> dict[str, Any]:
    """Triton's options for the chosen kernel. arch: such as 90.

    ptxas spills a register or two for one more program on a multiprocessor, which mostly has no shared memory for it.
    With a limit on registers that says nothing it does not. It never did so with `rows` on sm_90, nor before Triton 3.8
    with `warp_k` there and with 16 tokens of fewer than 64 rows: there the limit would only cost registers.
    """
    options = launch_options(choice.num_warps, choice.num_stages)
    late = triton_release() >= (3, 8)
    early = choice.row_blocks >= 4 or choice.block_m == 8
    limited = (late and choice.variant == "warp_k") if family(arch) == 90 else late or early
    return options | {"maxnreg": 255} if limited and choice.num_warps <= 4 else options


DEQUANTIZE_OPTIONS = launch_options(num_warps=4, num_stages=1)


class MatmulPlan(NamedTuple):
    """How one product is launched; `launcher` None: dequantize, then torch's matmul."""

    choice: Choice
    launcher: Launcher | None = None
    grid: Grid = (0, 0, 0)
    dtypes: Dtypes = ()
    numbers: tuple[int, ...] = ()


_plans = PlanCache()
_dequantize_plans = PlanCache()


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    variant: str | None = None,
    batch_invariant: bool = False,
    plans: PlanCache | None = None,
) -> Tensor:
    """x `[..., K]` -> `[..., N]`, contiguous. Arguments have been validated.

    plans: of a caller for whom all but x stays the same; found by the number of tokens alone, which is faster.

    Allocates y; x if it is strided; a split's partial sums, fp32 `[split, M, N]`; the dense weight for `dense`.
    """
    shape, n = x.shape, layout.n
    y = x.new_empty(*shape[:-1], n)
    m = x.numel() // layout.k
    if m == 0:
        return y
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None and not residual.is_contiguous():
        residual = residual.contiguous()
    key: Hashable = m
    if plans is None:
        # A tuner puts another function in the place of `choose`, which has to get plans of its own.
        plans = _plans
        key = (layout, m, x.dtype, x.get_device(), bias is None, residual is None, variant, batch_invariant, choose)
    plan = plans.get(key)
    if plan is None:
        plan = plans.keep(key, _plan(x, weight, bias, residual, layout, m, variant, batch_invariant))
    choice, launcher = plan.choice, plan.launcher
    if launcher is None:
        out = linear(x.reshape(m, layout.k), dequantize(weight, scale, layout, x.dtype), bias)
        return (out if residual is None else out.add_(residual.view(m, n))).view(y.shape)
    partial = counters = None
    if choice.split > 1:
        partial = x.new_empty(choice.split, m, n, dtype=torch.float32)
        counters = split_counters(plan.grid[0], x.device)
    launcher(plan.grid, (x, weight, scale, bias, residual, y, partial, counters), plan.numbers)
    return y


class DirectLinear:
    """A product with one packed weight on CUDA, whose tensors were checked before."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: WeightLayout) -> None:
        self._weight, self._scale, self._bias, self._layout = weight, scale, bias, layout
        self._k, self._dtype, self._index = layout.k, scale.dtype, weight.get_device()
        self._plans: PlanCache = PlanCache()

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is what the op would compute with these tensors, where nothing would see the op."""
        return (
            devices.nothing_watches()
            and type(x) is Tensor
            and x.dtype is self._dtype
            and x.get_device() == self._index
            and devices.on_gpu(x)
            and x.ndim > 0
            and x.shape[-1] == self._k
            and not (torch.is_grad_enabled() and (x.requires_grad or requires_grad(self._bias)))
        )

    def parts(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Slices of one product, with its strides: on CUDA what reads them does not mind."""
        return self(x).split(list(sizes), -1)

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, contiguous."""
        return weight_only_linear(x, self._weight, self._scale, self._bias, None, self._layout, plans=self._plans)

    def prepare(self, tokens: int) -> bool:
        """Compile and load what a product of so many tokens launches, without a launch; whether it can go directly."""
        weight, scale, layout = self._weight, self._scale, self._layout
        plan = self._plans.get(tokens)
        if plan is None:
            plan = self._plans.keep(tokens, _plan(scale, weight, self._bias, None, layout, tokens, None, False))
        if plan.launcher is not None:
            return plan.launcher.prepare(plan.dtypes, plan.numbers)
        launcher, _, dtypes, numbers = _dequantize_plan(weight, scale, layout, scale.dtype)
        return launcher.prepare(dtypes, numbers)


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: WeightLayout,
    m: int,
    variant: str | None,
    batch_invariant: bool,
) -> MatmulPlan:
    dtype, device = x.dtype, device_of(x)
    problem = problem_of(layout, m, dtype)
    choice = choose(problem, device, variant, batch_invariant)
    if choice.variant == "dense":
        return MatmulPlan(choice)
    row_blocks, k_blocks = weight.shape[:2]
    tiles = triton.cdiv(m, choice.block_m) * triton.cdiv(row_blocks, choice.row_blocks)
    shared = (torch.float32, torch.int32) if choice.split > 1 else (None, None)
    numbers = (m, layout.n, layout.k, row_blocks, k_blocks)
    dtypes = (dtype, weight.dtype, dtype, dtype_of(bias), dtype_of(residual), dtype, *shared)
    launcher = launcher_for(
        kernels.warp_k_kernel if choice.variant == "warp_k" else kernels.rows_kernel,
        matmul_constants(problem, choice, device.arch),
        matmul_options(choice, device.arch),
        x.get_device(),
        dtypes,
        numbers,
    )
    return MatmulPlan(choice, launcher, (tiles, choice.split, 1), dtypes, numbers)


def dequantize(weight: Tensor, scale: Tensor, layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`, rounded once. Arguments have been validated."""
    out = scale.new_empty(layout.n, layout.k, dtype=dtype)
    launcher, grid, _, numbers = _dequantize_plan(weight, scale, layout, dtype)
    launcher(grid, (weight, scale, out), numbers)
    return out


def _dequantize_plan(
    weight: Tensor, scale: Tensor, layout: WeightLayout, dtype: torch.dtype
) -> tuple[Launcher, Grid, Dtypes, tuple[int, ...]]:
    index = weight.get_device()
    key = (layout, scale.dtype, dtype, index)
    plan = _dequantize_plans.get(key)
    if plan is None:
        row_blocks, k_blocks = weight.shape[:2]
        constants = dequantize_constants(layout, scale.dtype)
        tiles = triton.cdiv(row_blocks, constants["ROW_BLOCKS"]) * triton.cdiv(k_blocks, constants["W"])
        numbers = (layout.n, layout.k, row_blocks, k_blocks)
        dtypes = (weight.dtype, scale.dtype, dtype)
        launcher = launcher_for(kernels.dequantize_kernel, constants, DEQUANTIZE_OPTIONS, index, dtypes, numbers)
        plan = _dequantize_plans.keep(key, (launcher, (tiles, 1, 1), dtypes, numbers))
    return plan
