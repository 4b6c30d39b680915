"""The packed order against a slow reading of its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels.weight_only import fragments


def _code_at(packed, bits, row, k):
    """One code, by the words of the module's docstring, in Python integers."""
    inputs = fragments.block_inputs(bits)
    block = packed[row // 16, k // inputs].tolist()
    m, g = divmod(row % 16, 8)
    i, kappa = divmod(k % inputs, 32)
    j, h, c, b = kappa // 16, kappa // 8 % 2, kappa // 2 % 4, kappa % 2
    word = ((((j * 8 + g) * 4 + c) * 2 + h) * 2 + m) * 2 + b
    value = block[2 * word] | block[2 * word + 1] << 8
    if bits != 3:
        return value >> (bits * i) & (2**bits - 1)
    byte = block[1024 + word]
    if i < 5:
        return value >> (0, 3, 6, 9, 13)[i] & 7
    if i < 7:
        return byte >> (0, 3)[i - 5] & 7
    return byte >> 6 & 3 | (value >> 12 & 1) << 2


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
def test_every_code_is_where_the_definition_says(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = fragments.pack_codes(codes, bits)
    assert packed.shape == fragments.weight_shape(n, k, bits)
    assert torch.equal(fragments.unpack_codes(packed, bits, n, k), codes)
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 3), (seed % n, seed % k)):
        assert _code_at(packed, bits, row, column) == int(codes[row, column])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_large_weights_are_packed_in_parts(bits):
    """More rows than one part holds, and not a multiple of it."""
    n, k = 8200, 520
    codes = (torch.arange(n * k) * 7919 % 2**bits).to(torch.uint8).view(n, k)
    packed = fragments.pack_codes(codes, bits)
    assert torch.equal(fragments.unpack_codes(packed, bits, n, k), codes)
    assert torch.equal(packed[512:513], fragments.pack_codes(codes[8192:], bits))


def test_memory_per_weight():
    for bits in (2, 3, 4, 8):
        shape = fragments.weight_shape(4096, 4096, bits)
        assert shape[0] * shape[1] * shape[2] * 8 == 4096 * 4096 * bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), [(33, 160, 32), (16, 128, None), (1, 77, None), (70, 192, 64)])
@pytest.mark.parametrize("bits", [2, 8])
def test_scales(bits, n, k, group_size, dtype):
    groups = k // group_size if group_size else 1
    scale = torch.rand(n, groups).to(dtype)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    for zero_point in (None, zero):
        shape = fragments.scale_shape(n, k, bits, group_size, zero_point is None)
        packed = fragments.pack_scales(scale, zero_point, bits, shape)
        assert packed.shape == shape
        got_scale, got_zero = fragments.unpack_scales(packed, bits, n, groups, zero_point is None)
        assert torch.equal(got_scale, scale)
        assert got_zero is None if zero_point is None else torch.equal(got_zero, zero_point)
        # What a kernel reads beyond K and N is a number: it is multiplied by zeros of x.
        assert packed.isfinite().all()
    row, group = n - 1, groups - 1
    pairs = fragments.pack_scales(scale, zero, bits, fragments.scale_shape(n, k, bits, group_size, False))
    assert pairs[group, row].tolist() == [
        scale[row, group].item(),
        int(zero[row, group]) + fragments.zero_bias(bits, dtype),
    ]
    halves = fragments.pack_scales(scale, None, bits, fragments.scale_shape(n, k, bits, group_size, True))
    assert halves[group, row // 16, row % 8, row % 16 // 8] == scale[row, group]
