"""sliderquant_kernels: the kernel that its chooser picks, and every variant by name."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from sliderquant_kernels import PackedWeight, WeightLayout, choose_layout, tiles, tuned, weight_only_linear, workspace

from ...case import Arithmetic, Case, Prepared, Provider
from ..operands import Operands
from . import dense

CHOSEN = "sliderquant"
# More tokens than one tile of the variant holds; the others take any number.
MOST_TOKENS = {"warp_k": 16}


def prepare(weight: Operands, variant: str | None = None) -> Prepared:
    """The weight, packed for the device it is on."""
    scheme, device = weight.scheme, weight.codes.device
    layout = choose_layout(scheme.bits, weight.n, weight.k, scheme.group_size, scheme.symmetric, device, weight.dtype)
    packed = layout.pack(weight.codes, weight.scale, weight.zero_point)
    tensors = tuple(tensor for tensor in packed if tensor is not None)

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        return weight_only_linear(x, PackedWeight(t[0], t[1], t[2] if len(t) == 3 else None), layout, variant=variant)

    if device.type == "cpu":
        return Prepared(tensors, call, lambda m: _cpu_arithmetic(layout))
    choose = partial(choice, layout, weight.dtype, _device(device), variant)
    return Prepared(tensors, call, lambda m: arithmetic(choose(m)), note=lambda m: describe(choose(m)))


def choice(layout: WeightLayout, dtype: torch.dtype, device: tiles.Device, variant: str | None, m: int) -> tiles.Choice:
    """What the op launches for m tokens."""
    problem = tiles.Problem(m, layout.n, layout.k, layout.bits, layout.group_size, layout.symmetric, dtype)
    return tuned.choose(problem, device, variant)


def arithmetic(chosen: tiles.Choice) -> Arithmetic:
    """The fused kernels multiply integers; weights are rounded where they are dequantized for a dense matmul."""
    return dense.ARITHMETIC if chosen.variant == "dense" else Arithmetic()


def describe(chosen: tiles.Choice) -> str:
    """The kernel, its tile, and the reason."""
    tile = f" {chosen.block_m} x {16 * chosen.row_blocks}, {chosen.num_warps} warps, {chosen.num_stages} stages"
    split = f", split {chosen.split}" if chosen.split > 1 else ""
    return f"{chosen.variant}{tile if chosen.num_warps else ''}{split}: {chosen.reason}"


def release() -> None:
    """Captured launches keep their counters as long as the process lives, and a launch that finds none left is slower.
    The graph that was timed is gone: start over."""
    workspace._pools.clear()


def name_of(variant: str) -> str:
    """The provider's name of a variant."""
    return f"{CHOSEN}:{variant}"


def _cpu_arithmetic(layout: WeightLayout) -> Arithmetic:
    return Arithmetic(weight_roundings=1, offset_roundings=int(layout.kind == "cpu_int4" and not layout.symmetric))


@lru_cache(maxsize=8)
def _device(device: torch.device) -> tiles.Device:
    found = torch.cuda.get_device_properties(device)
    return tiles.Device(10 * found.major + found.minor, found.multi_processor_count, found.name)


def _accepts(variant: str, case: Case) -> str | None:
    most = MOST_TOKENS.get(variant)
    return f"one tile of {variant} holds {most} tokens" if most is not None and case.m > most else None


PROVIDERS = [Provider(CHOSEN, prepare, devices=("cuda", "cpu"), compiles=True, release=release)] + [
    Provider(
        name_of(variant),
        partial(prepare, variant=variant),
        compiles=True,
        accepts=partial(_accepts, variant),
        release=release,
    )
    for variant in tiles.VARIANTS
]
