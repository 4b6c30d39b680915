"""Who computes the low-bit linear: cuBLAS in 16 bits, our fused and unfused steps, and every variant by name."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from sliderquant_kernels import (
    HadamardTransform,
    LowBitLayout,
    PackedWeight,
    QuantizedActivations,
    choose_low_bit_layout,
    hadamard,
    hadamard_quantize,
    low_bit_linear,
    quantize_activations,
)
from sliderquant_kernels.common import choices
from sliderquant_kernels.low_bit import tiles as low_bit_tiles

from ...harness.case import Case, Prepared, Provider
from ...harness.machine import current_device
from ...shared import inputs
from ...shared.rotations import launches
from ...shared.schemes import RMS_NORM, SILU_MUL, ActivationScheme, LowBitScheme
from ...weight_only.operands import Operands
from . import humming
from .operands import LowBitArithmetic, LowBitOperands

__all__ = ["BASELINE", "CHOSEN", "PROVIDERS", "UNFUSED", "choice", "describe", "name_of", "quantized"]

CUBLAS, ONEDNN = "cublas", "onednn"
BASELINE = {"cuda": CUBLAS, "cpu": ONEDNN}
CHOSEN = "sliderquant"
UNFUSED = f"{CHOSEN}-unfused"
# Beyond these a variant is hopeless.
MOST_TOKENS, FEWEST_TOKENS = {"warp_k": 16}, {"tiles": 64}
# Split-K inside cuBLAS may add partial sums in 16 bits, which torch allows by default.
DENSE = LowBitArithmetic(weight_roundings=1, output_roundings=2, quantizes=False)
# All variants read the same packed weight.
_packed: WeakKeyDictionary[Operands, PackedWeight] = WeakKeyDictionary()


def prepare_dense(given: LowBitOperands) -> Prepared:
    """The weight rounded once to 16 bits, after torch's own norm or SiLU and product. In 16 bits nothing has to be
    rotated: the rotation is taken out of the weight, too."""
    scheme, residual = given.scheme.activations, given.residual

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        ready = inputs.before(x, t[-1], scheme)
        return linear(ready, t[0]) if residual is None else torch.addmm(residual, ready, t[0].t())

    return Prepared((given.dense_weight(), *_norm(given)), call, lambda m: DENSE)


def prepare(given: LowBitOperands, variant: str | None = None, *, fused: bool = True) -> Prepared:
    """The packed weight. Without `fused`, torch's norm or SiLU and product, and our rotation alone, come before
    quantizing, and torch adds the residual."""
    weight, scheme, residual = given.weight, given.scheme.activations, given.residual
    device, dtype = weight.codes.device, weight.dtype
    layout = choose_low_bit_layout(
        weight.scheme.bits, weight.n, weight.k, weight.scheme.group_size, weight.scheme.symmetric, device
    )
    packed = _packed.get(weight) or layout.pack(weight.codes, weight.scale, weight.zero_point)
    _packed[weight] = packed
    tensors = tuple(tensor for tensor in packed if tensor is not None)

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        activations = quantized(x, t[-1], scheme, fused, given.transform)
        addend = residual if fused else None
        y = low_bit_linear(activations, PackedWeight(*t[:3]), layout, dtype, residual=addend, variant=variant)
        return y if fused or residual is None else y.add_(residual)

    between = 0
    if given.transform is not None:
        between = launches(given.transform, dtype, device, quantizes=fused) - fused
    arithmetic = LowBitArithmetic(
        output_roundings=1 if fused or residual is None else 2,
        rounded_once=False if fused else None,
        between=between,
    )

    def note(m: int) -> str:
        return describe(choice(m, layout, variant)) if device.type == "cuda" else ""

    return Prepared((*tensors, *_norm(given)), call, lambda m: arithmetic, note=note)


def quantized(
    x: Tensor,
    norm_weight: Tensor,
    scheme: ActivationScheme,
    fused: bool = True,
    transform: HadamardTransform | None = None,
) -> QuantizedActivations:
    """x through our op, with what comes before inside it or, without `fused`, by torch and our rotation; norm_weight is
    a norm's."""
    if transform is not None and fused:
        x, gate = (x[1], x[0]) if scheme.fused == SILU_MUL else (x, None)
        return hadamard_quantize(x, transform, scheme.bits, scheme.symmetric, gate=gate)
    quantize = partial(quantize_activations, bits=scheme.bits, symmetric=scheme.symmetric, packed=scheme.packed)
    if transform is not None:
        return quantize(hadamard(inputs.before(x, norm_weight, scheme), transform))
    if not fused or scheme.fused is None:
        return quantize(inputs.before(x, norm_weight, scheme))
    if scheme.fused == RMS_NORM:
        return quantize(x, norm_weight=norm_weight, norm_eps=inputs.NORM_EPS)
    return quantize(x[1], gate=x[0])


def choice(m: int, layout: LowBitLayout, variant: str | None, device: choices.Device | None = None) -> choices.Choice:
    """What the op launches on the current device, or another one."""
    from sliderquant_kernels.common.launching import FEWEST_TOKENS as fewest  # A CPU does without Triton.

    return low_bit_tiles.choose_low_bit(
        max(m, fewest), layout.n, layout.k, layout.bits, layout.group_size, device or current_device(), variant
    )


def describe(chosen: choices.Choice) -> str:
    """The kernel, its tile, and the reason."""
    tile = f"{chosen.block_m} x {16 * chosen.row_blocks}, {chosen.num_warps} warps, {chosen.num_stages} stages"
    return f"{chosen.variant} {tile}: {chosen.reason}"


def compilation(case: Case, variant: str | None = None, fused: bool = True) -> Hashable:
    """Kernels and tile; Triton specializes on sizes of 1 and on multiples of 16."""
    scheme, (n, k) = LowBitScheme.parse(case.scheme), case.shape
    weight, activations = scheme.weight, scheme.activations
    layout = LowBitLayout("triton_int8", weight.bits, n, k, weight.group_size, weight.symmetric)
    chosen = replace(choice(case.m, layout, variant), reason="")
    quantizing = activations if fused else replace(activations, fused=None)
    separate = activations.rotated and not fused
    added = LowBitScheme.parse(case.scheme).residual and fused
    return chosen, layout, quantizing, separate, added, case.dtype, case.m == 1, case.m % 16 == 0


def accepts(case: Case, variant: str | None = None) -> str | None:
    """Why a case is not measured with a variant, or None."""
    if variant is None:
        return None
    most, fewest = MOST_TOKENS.get(variant), FEWEST_TOKENS.get(variant)
    if most is not None and case.m > most:
        return f"one tile of {variant} holds {most} tokens"
    if fewest is not None and case.m < fewest:
        return f"{variant} is for {fewest} tokens and more"
    if variant == "tiles" and LowBitScheme.parse(case.scheme).weight.group_size is not None:
        return "tiles has no groups"
    return None


def accepts_unfused(case: Case) -> str | None:
    """Without anything before, nothing is there to be fused."""
    steps = LowBitScheme.parse(case.scheme).steps
    return None if steps else f"nothing before quantizing or after the product in {case.scheme}"


def name_of(variant: str) -> str:
    """The provider's name of a variant."""
    return f"{CHOSEN}:{variant}"


def _norm(given: LowBitOperands) -> tuple[Tensor, ...]:
    return (given.norm_weight,) if given.scheme.activations.fused == RMS_NORM else ()


_EVERY = [
    Provider(CUBLAS, prepare_dense, computes="the dequantized 16-bit weight, 16-bit activations"),
    Provider(ONEDNN, prepare_dense, devices=("cpu",), computes="the dequantized 16-bit weight, 16-bit activations"),
    Provider(CHOSEN, prepare, devices=("cuda", "cpu"), compilation=compilation),
    Provider(
        UNFUSED,
        partial(prepare, fused=False),
        devices=("cuda", "cpu"),
        compilation=partial(compilation, fused=False),
        accepts=accepts_unfused,
    ),
] + [
    Provider(
        name_of(variant),
        partial(prepare, variant=variant),
        compilation=partial(compilation, variant=variant),
        accepts=partial(accepts, variant=variant),
    )
    for variant in low_bit_tiles.VARIANTS
]
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in [*_EVERY, humming.PROVIDER]}
