"""Inference layers on top of `sliderquant_kernels`."""

from sliderquant.modules.linear import PackedLinear, QuantizedLinear
from sliderquant.modules.merged import LinearSlice, MergedLinear, merge_linears, split_linears
from sliderquant.modules.rotated import OnlineRotation, RotatedLinear, insert_rotations, rotate_query_key

__all__ = [
    "LinearSlice",
    "MergedLinear",
    "OnlineRotation",
    "PackedLinear",
    "QuantizedLinear",
    "RotatedLinear",
    "insert_rotations",
    "merge_linears",
    "rotate_query_key",
    "split_linears",
]
