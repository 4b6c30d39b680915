"""Inference layers on top of `sliderquant_kernels`."""

from sliderquant.modules.linear import PackedLinear

__all__ = ["PackedLinear"]
