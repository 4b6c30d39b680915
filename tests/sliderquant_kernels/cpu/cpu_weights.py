"""What the tests of the compiled CPU loops multiply with: the schemes that they take, and random weights of each."""

import itertools

import torch

from sliderquant_kernels import WeightLayout

WEIGHT_ONLY = list(itertools.product((2, 3, 4, 8), (None, 32, 64, 128), (True, False)))
"""Bits, group size, symmetric."""

LOW_BIT = [
    (bits, group_size, symmetric)
    for bits, group_size, symmetric in WEIGHT_ONLY
    if bits != 3 and (bits != 8 or group_size is None or symmetric)
]


def random_weight(scheme, n, k, generator):
    """Codes `[n, k]`, fp32 scales and zero-points or None of a scheme."""
    bits, group_size, symmetric = scheme
    groups = k // group_size if group_size else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, groups, generator=generator) + 0.01
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return codes, scale, zero


def weight_only_case(scheme, n, units, m, exponent, extras, seed):
    """A random weight-only linear: tokens and packed weight, its parts, bias and residual or None of each."""
    bits, group_size, symmetric = scheme
    k = units * (group_size or 32)
    generator = torch.Generator().manual_seed(seed)
    codes, scale, zero = random_weight(scheme, n, k, generator)
    scale = scale.bfloat16()
    layout = WeightLayout("cpu_vnni", bits, n, k, group_size, symmetric)
    x = (torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp() * 2.0**exponent).bfloat16()
    bias, residual = torch.randn(n, generator=generator).bfloat16(), torch.randn(m, n, generator=generator).bfloat16()
    added = ((None, None), (bias, None), (bias, residual))[extras]
    return x, layout, layout.pack(codes, scale, zero), (codes, scale, zero), added
