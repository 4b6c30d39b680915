"""The Triton code, run by Triton's interpreter: every variant, dtype, width, grouping and symmetry, odd shapes."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import WeightLayout, reference
from sliderquant_kernels.common import launching
from sliderquant_kernels.common.choices import Choice, Device
from sliderquant_kernels.weight_only import launch

pytestmark = pytest.mark.skipif(
    not launching.INTERPRETED, reason="the kernels were imported without TRITON_INTERPRET=1"
)

# The interpreter truncates to bf16 instead of rounding: twice the unit roundoff.
_ROUNDOFF = {torch.float16: None, torch.float32: None, torch.bfloat16: 2.0**-7}
# Tiles that the rules would not take for such small shapes: several warps, splits, more than one tile each way.
_CHOICES = {
    "warp_k": Choice("warp_k", 8, 1, 2, 2),
    "warp_k-split": Choice("warp_k", 16, 2, 1, 2, split=2),
    "rows": Choice("rows", 16, 4, 4, 2),
    "rows-sm_80": Choice("rows", 16, 4, 4, 2),  # a plane of 32 inputs after the other, not up to four together
    "rows-split": Choice("rows", 32, 1, 4, 2, split=3),
    "dense": Choice("dense"),
}
_TOKENS = (1, 3, 17)
# N and K below, at and beyond a tile; an odd number of blocks along K; per channel also a K that fills no block.
_SHAPES = [(33, 256, 128), (17, 192, 64), (70, 96, 32), (48, 77, None), (1, 1, None), (16, 640, None), (40, 640, 128)]
_SCHEMES = list(itertools.product((2, 3, 4, 8), (True, False)))


def _pack(weight, group_size):
    layout = WeightLayout("triton", weight.bits, *weight.codes.shape, group_size, weight.zero_point is None)
    packed = layout.pack(*weight[:3])
    return layout, (packed.weight, packed.scale)


@pytest.fixture
def take(monkeypatch):
    """`take(name)`: whatever is launched next takes this choice, and what it compiles to where it was made for."""

    def use(name):
        monkeypatch.setattr(launch, "choose", lambda *_: _CHOICES[name])
        monkeypatch.setattr(launch, "device_of", lambda _: Device.typical(80 if name.endswith("sm_80") else 90))

    return use


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _CHOICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_only_linear(dtype, name, shape, take, make_weight, make_x, assert_matmul_close):
    n, k, group_size = shape
    take(name)
    for index, (bits, symmetric) in enumerate(_SCHEMES):
        weight = make_weight(bits, n, k, group_size, symmetric, dtype)
        layout, packed = _pack(weight, group_size)
        # One number of tokens for each scheme, all of them over the grid; epilogues in every combination.
        m = _TOKENS[(index + _SHAPES.index(shape)) % 3]
        x = make_x((m, k), dtype)
        bias = make_x((n,), dtype, seed=2) if index % 2 else None
        residual = make_x((m, n), dtype, seed=3) if index // 2 % 2 else None
        y = launch.weight_only_linear(x, *packed, bias, residual, layout)
        rounded = name == "dense"  # the dense weight is rounded to the activations' dtype
        assert_matmul_close(y, x, weight, bias, residual, roundoff=_ROUNDOFF[dtype], weights_rounded=rounded)


@pytest.mark.parametrize("variant", [None, "warp_k", "rows", "dense"])
@pytest.mark.parametrize("m", [0, 1, 9, 33])
def test_what_the_rules_choose(m, variant, make_weight, make_x, assert_matmul_close):
    weight = make_weight(4, 100, 384, 128, False, torch.float16)
    layout, packed = _pack(weight, 128)
    x = make_x((m, 384), torch.float16)
    y = launch.weight_only_linear(x, *packed, None, None, layout, variant)
    assert y.shape == (m, 100)
    assert_matmul_close(y, x, weight, weights_rounded=variant == "dense")


def test_float32_activations(make_weight, make_x, assert_matmul_close):
    for (bits, symmetric), (n, k, group_size) in zip(_SCHEMES, _SHAPES, strict=False):
        weight = make_weight(bits, n, k, group_size, symmetric, torch.float32)
        layout, packed = _pack(weight, group_size)
        x = make_x((3, k), torch.float32)
        assert_matmul_close(launch.weight_only_linear(x, *packed, None, None, layout), x, weight, weights_rounded=True)


@pytest.mark.parametrize("name", _CHOICES)
def test_strided_and_batched_operands(name, take, make_weight, make_x, assert_matmul_close):
    take(name)
    weight = make_weight(4, 33, 64, 64, False, torch.float16)
    layout, packed = _pack(weight, 64)
    x = make_x((64, 3, 2), torch.float16).permute(2, 1, 0)
    residual = make_x((33, 2, 3), torch.float16, seed=3).permute(1, 2, 0)
    y = launch.weight_only_linear(x, *packed, None, residual, layout)
    assert y.is_contiguous()
    assert_matmul_close(y, x, weight, None, residual, weights_rounded=name == "dense")


@pytest.mark.parametrize("name", _CHOICES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_lies_beyond_the_edges_never_counts(bits, name, take, make_weight, make_x):
    """K = 77, N = 5: garbage in the rest of the blocks and beyond x must be multiplied by nothing."""
    take(name)
    weight = make_weight(bits, 5, 77, None, False, torch.float16)
    layout, (codes, scale) = _pack(weight, None)
    beyond = torch.full((7, 2 * 77), float("nan"), dtype=torch.float16)
    beyond[1:3].view(-1)[:154] = make_x((2, 77), torch.float16).view(-1)
    x = beyond[1:3].view(-1)[:154].view(2, 77)
    want = launch.weight_only_linear(x, codes, scale, None, None, layout)
    assert want.isfinite().all()
    filled = layout.unpack(layout.pack(*weight[:3]))[0]
    full = torch.full((16, codes.shape[1] * _inputs(bits)), 2**bits - 1, dtype=torch.uint8)
    full[:5, :77] = filled
    whole = WeightLayout("triton", bits, *full.shape, None, True)
    garbage = whole.pack(full, torch.ones(16, 1, dtype=torch.float16)).weight
    assert not torch.equal(garbage, codes)
    assert torch.equal(launch.weight_only_linear(x, garbage, scale, None, None, layout), want)


def _inputs(bits):
    return {2: 256, 3: 256, 4: 128, 8: 64}[bits]


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
        assert torch.equal(launch.dequantize(*packed, layout, dtype), want)
    assert launch.dequantize(*packed, layout, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in _CHOICES if name != "dense"])
def test_runs_are_bitwise_equal(name, take, make_weight, make_x):
    take(name)
    weight = make_weight(2, 40, 768, 32, False, torch.float16)
    layout, packed = _pack(weight, 32)
    x = make_x((5, 768), torch.float16)
    first = launch.weight_only_linear(x, *packed, None, None, layout)
    assert torch.equal(first, launch.weight_only_linear(x, *packed, None, None, layout))


@pytest.mark.parametrize("bits", [2, 4])
def test_batch_invariance(bits, make_weight, make_x):
    """A row has the same bits alone, among others, and whatever these hold."""
    weight = make_weight(bits, 70, 512, 128, False, torch.float16)
    layout, packed = _pack(weight, 128)
    x = make_x((37, 512), torch.float16)
    whole = launch.weight_only_linear(x, *packed, None, None, layout, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 6), slice(30, 37)):
        alone = launch.weight_only_linear(x[rows], *packed, None, None, layout, batch_invariant=True)
        assert torch.equal(alone, whole[rows])
    others = x.clone()
    others[1:] = make_x((36, 512), torch.float16, seed=9) * 100
    assert torch.equal(
        launch.weight_only_linear(others, *packed, None, None, layout, batch_invariant=True)[0], whole[0]
    )


def test_split_counters_are_left_at_zero(take, make_weight, make_x, monkeypatch):
    taken = []

    def counters(count, device):
        taken.append(torch.zeros(count, dtype=torch.int32, device=device))
        return taken[-1]

    monkeypatch.setattr(launch, "split_counters", counters)
    take("rows-split")
    weight = make_weight(4, 70, 512, 128, True, torch.float16)
    layout, packed = _pack(weight, 128)
    launch.weight_only_linear(make_x((40, 512), torch.float16), *packed, None, None, layout)
    assert [len(counter) for counter in taken] == [2 * 5]
    assert not taken[0].any()


def test_registers_are_limited_where_ptxas_would_spill_for_a_further_program(monkeypatch):
    low, warp_k = Choice("warp_k", 16, 2, 4, 4), Choice("warp_k", 8, 2, 4, 4)
    rows, wide = Choice("rows", 32, 8, 4, 4), Choice("rows", 64, 16, 8, 5)

    def limits(arch):
        return [launch.matmul_options(choice, arch).get("maxnreg") for choice in (low, warp_k, rows, wide)]

    monkeypatch.setattr(launch, "triton_release", lambda: (3, 9))
    assert limits(90) == [255, 255, None, None]
    assert limits(80) == limits(100) == limits(120) == [255, 255, 255, None]
    monkeypatch.setattr(launch, "triton_release", lambda: (3, 6))
    assert limits(90) == [None] * 4
    assert limits(80) == limits(100) == [None, 255, 255, None]
