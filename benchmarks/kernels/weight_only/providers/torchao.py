"""torchao 0.18: `Int4TilePackedTo4dTensor` through torch.nn.functional.linear, its int4 weight-only layout for CUDA.

Underneath it is torch's `_weight_int4pack_mm`, with K padded to a multiple of 1024 in weight and activations. Its other
layouts (`Int4Tensor`, `Int4PreshuffledTensor`) call the kernels of MSLK, which `mslk` measures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ...harness.case import Prepared, Provider
from ..operands import Operands
from . import torch_int4

K_MULTIPLE = 1024


def prepare(weight: Operands) -> Prepared:
    """torch's int4 layout of the padded weight, wrapped into torchao's tensor subclass on every call."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    padded = pad_k(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack(torch_int4.pack_pairs(padded.codes), torch_int4.INNER_K_TILES)
    block, shape = [1, weight.group_size], torch.Size([weight.n, weight.k])

    def call(x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        return linear(x, Int4TilePackedTo4dTensor(tensors[0], tensors[1], block, shape))

    tensors = (packed, torch_int4.scale_and_zero(padded))
    return Prepared(tensors, call, lambda m: torch_int4.arithmetic(weight))


def pad_k(weight: Operands) -> Operands:
    """The weight with K padded as torchao pads it; what the padding holds is multiplied by 0."""
    more = -weight.k % K_MULTIPLE
    groups = more // weight.group_size
    zero_point = None if weight.zero_point is None else pad(weight.zero_point, (0, groups))
    return replace(
        weight, codes=pad(weight.codes, (0, more)), scale=pad(weight.scale, (0, groups)), zero_point=zero_point
    )


PROVIDERS = [
    Provider(
        "torchao",
        prepare,
        distribution="torchao==0.18.0",
        peer=True,
        computes=torch_int4.COMPUTES,
        accepts=torch_int4.accepts,
    )
]
