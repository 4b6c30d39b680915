"""Fused low-bit matmuls: weights of 2, 3, 4 or 8 bits times fp16, bf16 or fp32 activations, on CUDA and on CPUs.

    layout = choose_layout(4, n, k, 128, True, x.device, x.dtype)
    packed = layout.pack(codes, scale)
    y = weight_only_linear(x, packed, layout)

Depends on torch, and on triton for CUDA. `reference` says what is computed, `inspect` compiles the kernels for GPUs
that are not there.
"""

from .activations.op import quantize_activations
from .common.layout import PackedWeight
from .common.ptxas import pin_ptxas
from .common.quantized import QuantizedActivations
from .elementwise.op import rms_norm, rotary, silu_mul
from .low_bit.layout import LowBitLayout, choose_low_bit_layout
from .low_bit.op import direct_low_bit_linear, low_bit_linear
from .rotation.matrix import HadamardTransform, factor_hadamard
from .rotation.op import hadamard, hadamard_quantize, prepare_hadamard
from .weight_only.layout import WeightLayout, choose_layout
from .weight_only.op import dequantize, direct_linear, weight_only_linear

# Before anything is compiled, by whomever.
pin_ptxas()

__all__ = [
    "HadamardTransform",
    "LowBitLayout",
    "PackedWeight",
    "QuantizedActivations",
    "WeightLayout",
    "choose_layout",
    "choose_low_bit_layout",
    "dequantize",
    "direct_linear",
    "direct_low_bit_linear",
    "factor_hadamard",
    "hadamard",
    "hadamard_quantize",
    "low_bit_linear",
    "prepare_hadamard",
    "quantize_activations",
    "rms_norm",
    "rotary",
    "silu_mul",
    "weight_only_linear",
]
