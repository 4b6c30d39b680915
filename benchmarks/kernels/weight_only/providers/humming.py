"""humming-kernels 0.1.19: CUDA kernels compiled at run time for each shape, scheme and range of M.

All widths, groupings and symmetries, fp16 and bf16: it computes the scheme itself. Every M gets the kernel that its own
heuristics name, as in its `HummingLayer`, but only the kernels of the measured M are compiled.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ...harness.case import Arithmetic, Prepared, Provider, Unsupported
from ..operands import Operands

# Scales are applied to the weight in 16 bits where its kernels do not apply them to the accumulator.
ARITHMETIC = Arithmetic(weight_roundings=1)
# Counters of its split along K.
LOCKS = 2048


def prepare(weight: Operands) -> Prepared:
    """Tensors of `HummingWeightSchema`, transformed for the GPU by its own kernels."""
    from humming.forward import humming_forward
    from humming.ops import pack_weight
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    bits, device = weight.scheme.bits, weight.codes.device
    if weight.n % 64 or weight.k % 64:
        raise Unsupported(f"needs n and k multiples of 64, got n={weight.n}, k={weight.k}")
    schema = HummingWeightSchema(
        b_dtype=f"uint{bits}",
        weight_scale_group_size=weight.scheme.group_size or 0,
        has_zero_point=not weight.scheme.symmetric,
    )
    tensors = {"weight": pack_weight(weight.codes.int(), bits), "weight_scale": weight.scale.contiguous()}
    if weight.zero_point is not None:
        packed = pack_weight(weight.zero_point.int().t().contiguous(), bits)
        tensors["zero_point"] = packed.t().contiguous()
    config, tensors = prepare_and_transform_humming_tensors(
        tensors, weight.n, weight.k, schema, torch_dtype=weight.dtype, device=device
    )
    # Every copy of a weight has counters of its own, as every layer: a kernel may begin before the last one has ended.
    tensors["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device=device)
    names = sorted(tensors)
    tuned: dict[int, str] = {}

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Tensor:
        m = x.shape[0]
        if m not in tuned:
            tuned[m] = json.dumps(get_heuristics_config(config, shape_m=m, device=device))
        return humming_forward(config, x, tuning_config=tuned[m], **dict(zip(names, t, strict=True)))

    return Prepared(tuple(tensors[name] for name in names), call, lambda m: ARITHMETIC)


PROVIDERS = [
    Provider("humming", prepare, distribution="humming-kernels==0.1.19", peer=True, compilation=lambda case: case.key)
]
