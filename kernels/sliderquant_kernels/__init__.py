"""Fused low-bit matmuls: weights of 2, 3, 4 or 8 bits times fp16, bf16 or fp32 activations, on CUDA and on CPUs.

    layout = choose_layout(4, n, k, 128, True, x.device, x.dtype)
    packed = layout.pack(codes, scale)
    y = weight_only_linear(x, packed, layout)

Depends on torch, and on triton for CUDA. `reference` says what is computed, `inspect` compiles the kernels for GPUs
that are not there.
"""

from .activations import QuantizedActivations, quantize_activations
from .elementwise import rms_norm, rotary, silu_mul
from .hadamard import hadamard, hadamard_quantize, prepare_hadamard
from .hadamard_matrix import HadamardTransform, factor_hadamard
from .layout import PackedWeight, WeightLayout, choose_layout
from .low_bit import direct_low_bit_linear, low_bit_linear
from .low_bit_layout import LowBitLayout, choose_low_bit_layout
from .ptxas import pin_ptxas
from .weight_only import dequantize, direct_linear, weight_only_linear

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
