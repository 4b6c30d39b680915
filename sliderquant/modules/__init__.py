"""Inference layers on top of `sliderquant_kernels`."""

from sliderquant.modules.linear import PackedLinear, QuantizedLinear
from sliderquant.modules.merged import LinearSlice, MergedLinear, merge_linears, split_linears

__all__ = ["LinearSlice", "MergedLinear", "PackedLinear", "QuantizedLinear", "merge_linears", "split_linears"]
