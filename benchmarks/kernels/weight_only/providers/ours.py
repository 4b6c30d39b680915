"""sliderquant_kernels: the kernel that its chooser picks, and every variant by name."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sliderquant_kernels import PackedWeight, WeightLayout, choose_layout, weight_only_linear
from sliderquant_kernels.common import choices, workspace
from sliderquant_kernels.weight_only import tiles, tuned

from ...harness.case import DTYPES, Arithmetic, Case, Prepared, Provider
from ...harness.machine import current_device
from ...shared.schemes import WeightScheme
from ..operands import Operands
from . import dense

CHOSEN = "sliderquant"
# More tokens than one tile of the variant holds; the others take any number.
MOST_TOKENS = {"warp_k": 16}
# All variants read the same packed weight.
_packed: WeakKeyDictionary[Operands, PackedWeight] = WeakKeyDictionary()


def prepare(weight: Operands, variant: str | None = None) -> Prepared:
    """The weight, packed for the device it is on."""
    scheme, device = weight.scheme, weight.codes.device
    layout = choose_layout(scheme.bits, weight.n, weight.k, scheme.group_size, scheme.symmetric, device, weight.dtype)
    packed = _packed.get(weight) or layout.pack(weight.codes, weight.scale, weight.zero_point)
    _packed[weight] = packed
    tensors = tuple(tensor for tensor in packed if tensor is not None)

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        return weight_only_linear(x, PackedWeight(t[0], t[1], t[2] if len(t) == 3 else None), layout, variant=variant)

    if device.type == "cpu":
        return Prepared(tensors, call, lambda m: _cpu_arithmetic(layout))

    def choose(m: int) -> choices.Choice:
        return choice(_problem(layout, weight.dtype, m), variant)

    return Prepared(tensors, call, lambda m: arithmetic(choose(m)), note=lambda m: describe(choose(m)))


def choice(problem: choices.Problem, variant: str | None, device: choices.Device | None = None) -> choices.Choice:
    """What the op launches on the current device, or another one."""
    return tuned.choose(problem, device or current_device(), variant)


def compilation(case: Case, variant: str | None) -> Hashable:
    """Kernel and tile; Triton specializes on sizes of 1 and on multiples of 16, and the loop on how K is cut."""
    scheme, (n, k) = WeightScheme.parse(case.scheme), case.shape
    problem = choices.Problem(case.m, n, k, scheme.bits, scheme.group_size, scheme.symmetric, DTYPES[case.dtype])
    chosen = replace(choice(problem, variant), reason="")
    return chosen, replace(problem, m=0), case.m == 1, case.m % 16 == 0


def arithmetic(chosen: choices.Choice) -> Arithmetic:
    """The fused kernels multiply integers; weights are rounded where they are dequantized for a dense matmul."""
    return dense.ARITHMETIC if chosen.variant == "dense" else Arithmetic()


def tile_text(chosen: choices.Choice) -> str:
    """The kernel and its tile."""
    tile = f" {chosen.block_m} x {16 * chosen.row_blocks}, {chosen.num_warps} warps, {chosen.num_stages} stages"
    split = f", split {chosen.split}" if chosen.split > 1 else ""
    return f"{chosen.variant}{tile if chosen.num_warps else ''}{split}"


def describe(chosen: choices.Choice) -> str:
    """The kernel, its tile, and the reason."""
    return f"{tile_text(chosen)}: {chosen.reason}"


def release() -> None:
    """Captured launches keep their counters as long as the process lives, and a launch that finds none left is slower.
    The graph that was timed is gone: start over."""
    workspace.release_captured()


def name_of(variant: str) -> str:
    """The provider's name of a variant."""
    return f"{CHOSEN}:{variant}"


def _cpu_arithmetic(layout: WeightLayout) -> Arithmetic:
    return Arithmetic(weight_roundings=1, offset_roundings=int(layout.kind == "cpu_int4" and not layout.symmetric))


def _problem(layout: WeightLayout, dtype: torch.dtype, m: int) -> choices.Problem:
    return choices.Problem(m, layout.n, layout.k, layout.bits, layout.group_size, layout.symmetric, dtype)


def _accepts(variant: str, case: Case) -> str | None:
    most = MOST_TOKENS.get(variant)
    return f"one tile of {variant} holds {most} tokens" if most is not None and case.m > most else None


PROVIDERS = [
    Provider(
        CHOSEN,
        prepare,
        devices=("cuda", "cpu"),
        compilation=partial(compilation, variant=None),
        release=release,
    )
] + [
    Provider(
        name_of(variant),
        partial(prepare, variant=variant),
        compilation=partial(compilation, variant=variant),
        accepts=partial(_accepts, variant),
        release=release,
    )
    for variant in tiles.VARIANTS
]
