"""humming-kernels 0.1.19: activations of 4 bits on the int4 units of GPUs that have them, of 8 bits on the int8 units.

Symmetric only: neither weights nor activations have zero-points, and a token's scale is its maximum over the largest
code. It quantizes in a kernel of its own, with a matrix multiplication compiled for each shape and range of M.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ...harness.case import Case, Prepared, Provider, Unsupported
from ...shared import inputs
from ...shared.schemes import RMS_NORM, ActivationScheme, LowBitScheme
from ...weight_only.providers.humming import LOCKS
from .operands import LowBitArithmetic, LowBitOperands

__all__ = ["PROVIDER", "accepts", "prepare"]


def prepare(given: LowBitOperands) -> Prepared:
    """Tensors of `HummingWeightSchema`, transformed for the GPU by its own kernels."""
    from humming.forward import humming_forward
    from humming.ops import pack_weight
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    weight, scheme = given.weight, given.scheme.activations
    bits, device = weight.scheme.bits, weight.codes.device
    if weight.n % 64 or weight.k % 64:
        raise Unsupported(f"needs n and k multiples of 64, got n={weight.n}, k={weight.k}")
    config, tensors = prepare_and_transform_humming_tensors(
        {"weight": pack_weight(weight.codes.int(), bits), "weight_scale": weight.scale.contiguous()},
        weight.n,
        weight.k,
        HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_group_size=weight.scheme.group_size or 0),
        HummingInputSchema(a_dtype=f"int{scheme.bits}"),
        torch_dtype=weight.dtype,
        device=device,
    )
    # Every copy of a weight has counters of its own, as every layer.
    tensors["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device=device)
    names = sorted(tensors)
    tuned: dict[int, str] = {}

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        ready = inputs.before(x, t[-1], scheme)
        m = ready.shape[0]
        if m not in tuned:
            tuned[m] = json.dumps(get_heuristics_config(config, shape_m=m, device=device))
        named = dict(zip(names, t[: len(names)], strict=True))
        return humming_forward(config, ready, tuning_config=tuned[m], **named)

    own = None
    if not weight.scheme.symmetric:
        middle = 2 ** (bits - 1)
        own = (weight.codes.float() - middle) * weight.scale.float().repeat_interleave(weight.group_size, 1)
    grid = ActivationScheme(scheme.bits, True, scheme.fused, narrow=True)
    # The sum is scaled by the token's and by the channel's scale, and may be 16 bits wide before the latter.
    arithmetic = LowBitArithmetic(output_roundings=3, rounded_once=None, grid=grid)
    norm = (given.norm_weight,) if scheme.fused == RMS_NORM else ()
    return Prepared((*(tensors[name] for name in names), *norm), call, lambda m: arithmetic, weight=own)


def accepts(case: Case) -> str | None:
    """Why it does not compute a case's scheme, or None."""
    scheme = LowBitScheme.parse(case.scheme)
    if scheme.weight.group_size is not None:
        return f"per channel only, as in groups it rounds the weight's scales to integers, got {case.scheme}"
    if scheme.activations.rotated or scheme.residual:
        return f"it rotates nothing and adds nothing, got {case.scheme}"
    if scheme.weight.bits > scheme.activations.bits:
        return f"weights as wide as activations or narrower, got {case.scheme}"
    return None


PROVIDER = Provider(
    "humming",
    prepare,
    distribution="humming-kernels==0.1.19",
    peer=True,
    computes="no zero-points; a token's scale is its maximum over 7 or 127",
    compilation=lambda case: case.key,
    accepts=accepts,
)
