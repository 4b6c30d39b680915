"""Launching low-bit linears on CUDA: what a problem and a device lead to, and the launch itself."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..activations.kernels import quantize_activations, quantize_plan
from ..common import devices
from ..common.choices import Choice, family
from ..common.launch_plan import Dtypes, Grid, Launcher, PlanCache, dtype_of, launcher_for
from ..common.launching import FEWEST_TOKENS, INTERPRETED, device_of, launch_options, requires_grad
from ..common.layout import PackedWeight
from ..cpu.vnni import Rounding
from . import kernels
from .fragments import ROWS, block_inputs
from .layout import LowBitLayout
from .tiles import choose_low_bit

EXPAND_OPTIONS = launch_options(num_warps=4, num_stages=1)
TILE_K = 128
# Tiles of tokens that run side by side.
_BAND = 8


def matmul_constants(layout: LowBitLayout, choice: Choice, arch: int) -> dict[str, Any]:
    """The compile-time arguments of the chosen kernel; shared by the launch and by `inspect`. arch: such as 90."""
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
        return constants | {"W": choice.num_warps}
    constants["JOINED"] = 0
    if family(arch) == 90 and layout.group_size is None:
        constants |= {"JOINED": TILE_K // inputs, "K_EDGE": 2 if layout.k % TILE_K else 0}
    return constants


def matmul_options(choice: Choice) -> dict[str, Any]:
    """Triton's options for the chosen kernel. Two programs of the largest tiles fit on a multiprocessor: while one
    waits for its products or stores its tile, the other one multiplies."""
    options = launch_options(choice.num_warps, choice.num_stages)
    return options | {"maxnreg": 128} if choice.block_m == 128 else options


def expand_constants(layout: LowBitLayout) -> dict[str, Any]:
    """The compile-time arguments of `expand_kernel`."""
    return {"BITS": layout.bits, "W": max(256 // block_inputs(layout.bits), 1), "ROW_BLOCKS": 2}


class LowBitPlan(NamedTuple):
    """How one product is launched. expands: the weight is expanded to int8 before."""

    launcher: Launcher
    grid: Grid
    dtypes: Dtypes
    numbers: tuple[int, ...]
    expands: bool


_plans = PlanCache()
_expand_plans = PlanCache()


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
    plans: PlanCache | None = None,
) -> Tensor:
    """`[..., K]` -> `[..., N]` in `dtype`, contiguous. Arguments have been validated.

    plans: of a caller for whom all but the activations stays the same; found by the number of tokens alone.

    Allocates y, operands that are strided, and for `tiles` the weight as int8 `[N, K]`.
    """
    y = codes.new_empty(*codes.shape[:-1], layout.n, dtype=dtype)
    m = codes.numel() // layout.k
    if m == 0:
        return y
    # The kernels know no strides.
    x = codes if codes.is_contiguous() else codes.contiguous()
    if not x_scale.is_contiguous():
        x_scale = x_scale.contiguous()
    if not x_sum.is_contiguous():
        x_sum = x_sum.contiguous()
    if x_zero is not None and not x_zero.is_contiguous():
        x_zero = x_zero.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None and not residual.is_contiguous():
        residual = residual.contiguous()
    key: Hashable = m
    if plans is None:
        # Another function in the place of the chooser gets plans of its own.
        plans = _plans
        key = (layout, m, dtype, x.get_device(), x_zero is None, bias is None, residual is None, variant,
               choose_low_bit)  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        plan = plans.keep(key, _plan(x, x_zero, weight, scale, bias, residual, layout, dtype, m, variant))
    if plan.expands:
        weight = expand(weight, layout)
    tensors = (x, x_scale, x_zero, x_sum, weight, scale, constants, bias, residual, y)
    plan.launcher(plan.grid, tensors, plan.numbers)
    return y


def _plan(
    x: Tensor,
    x_zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: LowBitLayout,
    dtype: torch.dtype,
    m: int,
    variant: str | None,
) -> LowBitPlan:
    n, k = layout.n, layout.k
    device = device_of(x)
    choice = choose_low_bit(max(m, FEWEST_TOKENS), n, k, layout.bits, layout.group_size, device, variant)
    row_blocks, k_blocks = weight.shape[:2]
    tiles_m = triton.cdiv(m, choice.block_m)
    expands = choice.variant == "tiles"
    if expands:
        numbers: tuple[int, ...] = (m, n, k, row_blocks * ROWS)
        kernel = kernels.int8_tiles_kernel
        tiles = tiles_m * triton.cdiv(n, choice.row_blocks * ROWS)
    else:
        kernel = kernels.low_bit_warp_k_kernel if choice.variant == "warp_k" else kernels.low_bit_rows_kernel
        numbers = (m, n, k, row_blocks, k_blocks, scale.shape[0])
        tiles = tiles_m * triton.cdiv(row_blocks, choice.row_blocks)
    dtypes = (torch.int8, torch.float32, dtype_of(x_zero), torch.int32, torch.int8 if expands else weight.dtype,
              torch.float32, torch.int32, dtype_of(bias), dtype_of(residual), dtype)  # fmt: skip
    launcher = launcher_for(
        kernel, matmul_constants(layout, choice, device.arch), matmul_options(choice), x.get_device(), dtypes, numbers
    )
    return LowBitPlan(launcher, (tiles, 1, 1), dtypes, numbers, expands)


def expand(weight: Tensor, layout: LowBitLayout) -> Tensor:
    """Packed codes -> int8 `[N, K]`, less 128 at 8 bits."""
    out = weight.new_empty(layout.n, layout.k, dtype=torch.int8)
    launcher, grid, _, numbers = _expand_plan(weight, layout)
    launcher(grid, (weight, out), numbers)
    return out


def _expand_plan(weight: Tensor, layout: LowBitLayout) -> tuple[Launcher, Grid, Dtypes, tuple[int, ...]]:
    key = (layout, weight.get_device())
    plan = _expand_plans.get(key)
    if plan is None:
        row_blocks, k_blocks = weight.shape[:2]
        constants = expand_constants(layout)
        tiles = triton.cdiv(row_blocks, constants["ROW_BLOCKS"]) * triton.cdiv(k_blocks, constants["W"])
        numbers = (layout.n, layout.k, row_blocks, k_blocks)
        dtypes = (weight.dtype, torch.int8)
        launcher = launcher_for(kernels.expand_kernel, constants, EXPAND_OPTIONS, weight.get_device(), dtypes, numbers)
        plan = _expand_plans.keep(key, (launcher, (tiles, 1, 1), dtypes, numbers))
    return plan


class DirectLowBitLinear:
    """A product of rounded inputs with one packed weight on CUDA, whose tensors were checked before."""

    def __init__(
        self,
        packed: PackedWeight,
        layout: LowBitLayout,
        dtype: torch.dtype,
        bias: Tensor | None,
        rounding: Rounding,
    ) -> None:
        self._packed, self._layout, self._dtype, self._bias = packed, layout, dtype, bias
        self._bits, self._symmetric, self._clip = rounding
        self._index = packed.weight.get_device()
        self._plans, self._quantize_plans = PlanCache(), PlanCache()

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is what the ops would compute with these tensors, where nothing would see the ops."""
        return (
            devices.nothing_watches()
            and type(x) is Tensor
            and x.dtype is self._dtype
            and x.get_device() == self._index
            and devices.on_gpu(x)
            and x.ndim > 0
            and x.shape[-1] == self._layout.k
            and not (torch.is_grad_enabled() and (x.requires_grad or requires_grad(self._bias)))
        )

    def parts(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Slices of one product, with its strides: on CUDA what reads them does not mind."""
        return self(x).split(list(sizes), -1)

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, contiguous."""
        codes, scale, zero, total = quantize_activations(
            x, self._bits, self._symmetric, None, 0.0, None, False, self._clip, self._quantize_plans
        )
        return self.multiply(codes, scale, zero, total)

    def prepare(self, tokens: int) -> bool:
        """Compile and load what so many tokens launch, without a launch; whether it can go directly."""
        weight, scale, _ = self._packed
        zero = None if self._symmetric else scale.new_empty(0, dtype=torch.int32)
        plan = self._plans.get(tokens)
        if plan is None:
            plan = _plan(weight, zero, weight, scale, self._bias, None, self._layout, self._dtype, tokens, None)
            self._plans[tokens] = plan
        rounds = quantize_plan(self._quantize_plans, None, self._layout.k, self._dtype, self._index, self._bits,
                               self._symmetric, False, None, None, self._clip)  # fmt: skip
        numbers = (self._layout.k, 0.0, *(self._clip or (None, None)))
        ready = [plan.launcher.prepare(plan.dtypes, plan.numbers), rounds.launcher.prepare(rounds.dtypes, numbers)]
        if plan.expands:
            launcher, _, dtypes, sizes = _expand_plan(weight, self._layout)
            ready.append(launcher.prepare(dtypes, sizes))
        return all(ready)

    def multiply(self, codes: Tensor, scale: Tensor, zero: Tensor | None, total: Tensor) -> Tensor:
        """The product alone, for inputs that are rounded already."""
        weight, weight_scale, constants = self._packed
        assert constants is not None
        return low_bit_linear(codes, scale, zero, total, weight, weight_scale, constants, self._bias, None,
                              self._layout, self._dtype, plans=self._plans)  # fmt: skip
