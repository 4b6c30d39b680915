"""The Triton code itself, run by Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sliderquant_kernels import WeightLayout, reference  # noqa: E402
from sliderquant_kernels import weight_only_triton as kernels  # noqa: E402

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="the kernels were imported without TRITON_INTERPRET=1")

# The interpreter truncates to bf16 instead of rounding: twice the unit roundoff.
_ROUNDOFF = {torch.float16: None, torch.float32: None, torch.bfloat16: 2.0**-7}
_TOKENS = (0, 1, 3, 17, 65)
# N and K below, at and beyond a tile; per channel also with a K that no plane of bits divides.
_SHAPES = [(33, 128, 128), (17, 192, 64), (70, 96, 32), (48, 77, None), (1, 1, None), (32, 128, None)]


def _pack(weight, group_size):
    layout = WeightLayout("triton", weight.bits, *weight.codes.shape, group_size, weight.zero_point is None)
    return layout, layout.pack(*weight[:3])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weight_only_linear(dtype, bits, shape, symmetric, make_weight, make_x, assert_matmul_close):
    n, k, group_size = shape
    weight = make_weight(bits, n, k, group_size, symmetric, dtype)
    layout, packed = _pack(weight, group_size)
    # One or two token counts for each combination, all of them over the grid, with a bias every other time.
    index = _SHAPES.index(shape) + bits + symmetric
    for m in {_TOKENS[index % 5], _TOKENS[(index + 2) % 5]}:
        x = make_x((m, k), dtype)
        bias = make_x((n,), dtype, seed=2) if (m + index) % 2 else None
        y = kernels.weight_only_linear(x, *packed, bias, layout)
        assert_matmul_close(y, x, weight, bias, roundoff=_ROUNDOFF[dtype])


@pytest.mark.parametrize("m", _TOKENS)
def test_every_token_class(m, make_weight, make_x, assert_matmul_close):
    weight = make_weight(3, 70, 96, 32, False, torch.float16)
    layout, packed = _pack(weight, 32)
    x = make_x((m, 96), torch.float16)
    y = kernels.weight_only_linear(x, *packed, None, layout)
    assert y.shape == (m, 70)
    assert_matmul_close(y, x, weight)


def test_strided_and_batched_x(make_weight, make_x, assert_matmul_close):
    weight = make_weight(4, 33, 64, 64, False, torch.float16)
    layout, packed = _pack(weight, 64)
    x = make_x((64, 3, 2), torch.float16).permute(2, 1, 0)
    y = kernels.weight_only_linear(x, *packed, None, layout)
    assert y.is_contiguous()
    assert_matmul_close(y, x, weight)


def test_padding_never_reaches_the_result(make_weight, make_x):
    """K = 77 in rows padded to 96: garbage in the padding must be multiplied by nothing."""
    weight = make_weight(4, 16, 77, None, False, torch.float32)
    layout, packed = _pack(weight, None)
    x = make_x((2, 77), torch.float32)
    want = kernels.weight_only_linear(x, *packed, None, layout)
    garbage = packed.weight.clone()
    garbage[:, 39:] = 255
    garbage[:, 38] |= 0xF0
    assert torch.equal(kernels.weight_only_linear(x, garbage, *packed[1:], None, layout), want)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize(bits, shape, symmetric, make_weight):
    n, k, group_size = shape
    for dtype in (torch.float16, torch.float32):
        weight = make_weight(bits, n, k, group_size, symmetric, dtype)
        layout, packed = _pack(weight, group_size)
        # One rounding of the exact product, which fp32 holds for fp16 scales: equality, not closeness.
        want = reference.dequantize(*weight).to(dtype)
        assert torch.equal(kernels.dequantize(*packed, layout, dtype), want)
    assert kernels.dequantize(*packed, layout, torch.bfloat16).dtype == torch.bfloat16


def test_runs_are_bitwise_equal(make_weight, make_x):
    weight = make_weight(2, 40, 128, 32, False, torch.float16)
    layout, packed = _pack(weight, 32)
    x = make_x((5, 128), torch.float16)
    first = kernels.weight_only_linear(x, *packed, None, layout)
    assert torch.equal(first, kernels.weight_only_linear(x, *packed, None, layout))
