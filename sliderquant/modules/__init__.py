"""Inference layers on top of `sliderquant_kernels`."""

from sliderquant.modules.attention import (
    AttentionRounding,
    cache_keyword,
    insert_rounding,
    round_attention,
    round_layer,
)
from sliderquant.modules.fused import fuse_layers, fused_rotary
from sliderquant.modules.linear import PackedLinear, QuantizedLinear
from sliderquant.modules.merged import LinearSlice, MergedLinear, merge_linears, split_linears
from sliderquant.modules.rotated import OnlineRotation, RotatedLinear, insert_rotation, insert_rotations

__all__ = [
    "AttentionRounding",
    "LinearSlice",
    "MergedLinear",
    "OnlineRotation",
    "PackedLinear",
    "QuantizedLinear",
    "RotatedLinear",
    "cache_keyword",
    "fuse_layers",
    "fused_rotary",
    "insert_rotation",
    "insert_rotations",
    "insert_rounding",
    "merge_linears",
    "round_attention",
    "round_layer",
    "split_linears",
]
