"""The compiled loop of AVX512-VNNI instructions: low-bit linears, which have the bits of torch's ops, and weight-only
ones, which round tokens to 16 bits a group and are exact but for that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import (
    LowBitLayout,
    WeightLayout,
    choose_layout,
    choose_low_bit_layout,
    dequantize,
    direct_linear,
    direct_low_bit_linear,
    low_bit_linear,
    quantize_activations,
    reference,
    weight_only_linear,
)
from sliderquant_kernels.activations import op as activations
from sliderquant_kernels.cpu import native as cpu_native
from sliderquant_kernels.cpu import vnni as cpu_vnni
from sliderquant_kernels.cpu.vnni import Rounding
from tests.sliderquant_kernels.cpu.cpu_weights import LOW_BIT, WEIGHT_ONLY, random_weight, weight_only_case

if cpu_native.vnni(4) is None:
    pytest.skip("no AVX512-VNNI, or no C compiler, on this machine", allow_module_level=True)

_FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


@settings(deadline=None, max_examples=100)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 200),
    dtype=_FLOATS,
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    clip=st.sampled_from([None, (0.7, 0.9)]),
    exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**32),
)
def test_tokens_are_rounded_to_the_same_bits(m, k, dtype, bits, symmetric, clip, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    # Halves of a step are frequent: ties are rounded as torch rounds them.
    x = torch.randint(-40, 41, (m, k), generator=generator).float() + torch.rand(m, 1, generator=generator).round()
    x = torch.where(torch.rand(m, 1, generator=generator) < 0.2, 0, x * 2.0**exponent).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_vnni, "_VALUES_PER_THREAD", 64)
        found = cpu_vnni.quantize(x, bits, symmetric, clip)
    for got, want in zip(found, activations.quantize(x, bits, symmetric, clip), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@settings(deadline=None, max_examples=150)
@given(
    scheme=st.sampled_from(LOW_BIT),
    n=st.integers(1, 150),
    units=st.integers(1, 5),
    odd=st.integers(0, 31),
    m=st.integers(0, 21),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    x_bits=st.sampled_from([4, 8]),
    x_symmetric=st.booleans(),
    extras=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_products_have_the_same_bits(scheme, n, units, odd, m, dtype, x_bits, x_symmetric, extras, seed):
    bits, group_size, symmetric = scheme
    k = units * group_size if group_size else 32 * units + odd
    generator = torch.Generator().manual_seed(seed)
    codes, scale, zero = random_weight(scheme, n, k, generator)
    rows, blocks = (LowBitLayout(kind, bits, n, k, group_size, symmetric) for kind in ("cpu_int8_rows", "cpu_vnni"))
    x = (torch.randn(m, k, generator=generator) + 0.3).to(dtype)
    bias, residual = torch.randn(n, generator=generator).to(dtype), torch.randn(m, n, generator=generator).to(dtype)
    added = ((None, None), (bias, None), (bias, residual))[extras]
    quantized = quantize_activations(x, x_bits, x_symmetric, clip=(0.8, 0.9))
    packed = blocks.pack(codes, scale, zero)
    want = low_bit_linear(quantized, rows.pack(codes, scale, zero), rows, dtype, *added)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_vnni, "_PRODUCTS_PER_THREAD", 1 << 10)
        assert torch.equal(low_bit_linear(quantized, packed, blocks, dtype, *added), want)
        direct = direct_low_bit_linear(packed, blocks, dtype, added[0], Rounding(x_bits, x_symmetric, (0.8, 0.9)))
        if extras == 2 or direct is None:
            assert extras == 2 or dtype == torch.float16
            return
        assert direct.fits(x)
        assert torch.equal(direct(x), want)
        sizes = [n // 3 // 16 * 16, n // 2, n - n // 3 // 16 * 16 - n // 2]
        parts = direct.parts(x, sizes)
        assert [part.shape[-1] for part in parts] == sizes
        assert torch.equal(torch.cat(parts, -1), want)


def _direct(bits: int = 4, group_size: int | None = None, k: int = 96):
    torch.manual_seed(0)
    layout = choose_low_bit_layout(bits, 48, k, group_size, True, "cpu")
    packed = layout.pack(torch.randint(0, 2**bits, (48, k), dtype=torch.uint8), torch.rand(48, layout.groups) + 0.1)
    return packed, layout, direct_low_bit_linear(packed, layout, torch.bfloat16, None, Rounding(8, True, None))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (2, 70, 96), (0, 96)])
def test_shapes_and_strides(shape):
    packed, layout, direct = _direct()
    x = torch.randn(*shape).bfloat16()
    want = low_bit_linear(quantize_activations(x, 8, True), packed, layout, x.dtype)
    assert direct(x).shape == (*shape[:-1], 48)
    assert direct(x).is_contiguous()
    assert torch.equal(direct(x), want)
    if len(shape) > 1:
        strided = torch.cat((x, x), -1)[..., :96]
        assert not strided.is_contiguous() or 0 in shape or shape[0] == 1
        assert torch.equal(direct(strided), want)


def test_many_tokens_and_many_inputs_in_several_passes():
    """More tokens, and more bytes of a row, than stay in a cache at a time."""
    torch.manual_seed(0)
    n, k, m = 80, 20000, 50
    codes, scale = torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.rand(n, 1) + 0.1
    x = quantize_activations(torch.randn(m, k), 8, False)
    layouts = [LowBitLayout(kind, 4, n, k, None, True) for kind in ("cpu_int8_rows", "cpu_vnni")]
    want, got = (low_bit_linear(x, layout.pack(codes, scale), layout, torch.float32) for layout in layouts)
    assert torch.equal(got, want)


def test_what_does_not_fit():
    packed, layout, direct = _direct()
    x = torch.randn(2, 96).bfloat16()
    assert direct.fits(x)
    assert not direct.fits(x.float())
    assert not direct.fits(x[:, :64])
    assert not direct.fits(torch.nn.Parameter(x))
    assert direct_low_bit_linear(packed, layout, torch.float16, None, Rounding(8, True, None)) is None
    with pytest.raises(ValueError, match=r"bias: expected torch\.bfloat16 of shape \(48,\), got torch\.float32"):
        direct_low_bit_linear(packed, layout, torch.bfloat16, torch.zeros(48), Rounding(8, True, None))
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 3"):
        direct_low_bit_linear(packed, layout, torch.bfloat16, None, Rounding(3, True, None))
    other = LowBitLayout("cpu_vnni", 4, 64, 96, None, True)
    with pytest.raises(ValueError, match="weight: expected shape"):
        direct_low_bit_linear(packed, other, torch.bfloat16, None, Rounding(8, True, None))


@settings(deadline=None, max_examples=150)
@given(
    scheme=st.sampled_from(WEIGHT_ONLY),
    n=st.integers(1, 150),
    units=st.integers(1, 7),
    m=st.integers(0, 21),
    exponent=st.integers(-30, 30),
    extras=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_weight_only(scheme, n, units, m, exponent, extras, seed):
    """Beside the product in fp64: tokens are rounded by half of 1 / 32512 of the largest of their group, the sum of a
    group to fp32 twice, those of all groups once each, and the result to bf16."""
    x, layout, packed, (codes, scale, zero), added = weight_only_case(scheme, n, units, m, exponent, extras, seed)
    bits, k, group_size = layout.bits, layout.k, layout.group_size
    x = torch.where(torch.rand(m, 1, generator=torch.Generator().manual_seed(seed)) < 0.1, 0, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_vnni, "_PRODUCTS_PER_THREAD", 1 << 10)
        patch.setattr(cpu_vnni, "_MIN_AMX_TOKENS", 0)
        y = weight_only_linear(x, packed, layout, *added)
        direct = direct_linear(packed, layout, added[0])
        assert extras == 2 or torch.equal(direct(x), y)
        one_by_one = [weight_only_linear(x[i : i + 1], packed, layout, *(added[0], None)) for i in range(m)]
        assert extras == 2 or torch.equal(torch.cat([y[:0], *one_by_one]), y)
    weight = reference.dequantize(codes, scale, zero, bits)
    want = reference.weight_only_linear(x, codes, scale, zero, bits, *added)
    group = group_size or next(size for size in (128, 64, 32) if k % size == 0)
    largest = x.double().abs().view(m, k // group, group).amax(-1).repeat_interleave(group, 1)
    lost = 0.5001 / 32512 * largest @ weight.abs().t()
    sizes = x.double().abs() @ weight.abs().t() + sum(t.double().abs() for t in added if t is not None)
    sums = 2.0**-24 * (3 + k // group) * sizes
    assert ((y.double() - want).abs() <= 2.0**-8 * want.abs() + lost + sums + 1e-37 * k).all()


def _weight_only(n: int = 48, k: int = 128):
    torch.manual_seed(0)
    layout = choose_layout(4, n, k, 64, False, "cpu", torch.bfloat16)
    assert layout.kind == "cpu_vnni"
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zero = torch.randint(0, 16, (n, layout.groups), dtype=torch.uint8)
    return layout.pack(codes, (torch.rand(n, layout.groups) + 0.1).bfloat16(), zero), layout


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [1e-39, 1e38])
def test_weights_of_any_scale_are_rounded_once(bits, scale):
    """Denormals, and scales beside which a product of the code alone overflows; an odd number of blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (48, 64), dtype=torch.uint8, generator=generator)
    scales, zero = torch.full((48, 2), scale).bfloat16(), torch.full((48, 2), 2 ** (bits - 1), dtype=torch.uint8)
    layout = WeightLayout("cpu_vnni", bits, 48, 64, 32, False)
    packed = layout.pack(codes, scales, zero)
    steps = (codes.float() - 2 ** (bits - 1)) * scales.float().repeat_interleave(32, 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(packed, layout, dtype), steps.to(dtype))


def test_what_is_not_finite_shows():
    packed, layout = _weight_only()
    x = torch.randn(4, 128).bfloat16()
    x[1, 3], x[2, 100] = float("inf"), float("nan")
    y = weight_only_linear(x, packed, layout)
    assert y[[0, 3]].isfinite().all()
    assert y[[1, 2]].isnan().all()


def test_an_outlier_hurts_its_own_group_only():
    """Beside x = 10,000 the others of its group, around 1, are rounded to 0.31: less than rounding the result loses."""
    packed, layout = _weight_only(k=256)
    x = torch.randn(1, 256)
    x[0, 70] = 1e4
    x = x.bfloat16()
    weight = dequantize(packed, layout, torch.float32).double()
    want = x.double() @ weight.t()
    # What the bias takes away leaves the share of the others, in which the roundings of all of them show.
    bias = (-weight[:, 70] * float(x[0, 70])).bfloat16()
    rest = want + bias.double()
    error = (weight_only_linear(x, packed, layout, bias).double() - rest).abs()
    steps = 0.5 * float(x[0, 70]) / 32512
    assert (error <= steps * weight[:, 64:128].abs().sum(1) + 2.0**-8 * rest.abs() + 1e-2).all()
    assert error.norm() < 0.2 * (want - weight[:, 70] * float(x[0, 70])).norm()
    assert error.norm() < 2.0**-8 * want.norm()


@pytest.mark.parametrize("amx", [False, True])
def test_many_tokens_go_to_torch(amx, monkeypatch):
    packed, layout = _weight_only(n=200)
    monkeypatch.setattr(cpu_native, "has_amx", lambda: amx)
    least = 192 if amx else 160
    assert not cpu_vnni.prefers_torch(least - 1)
    assert cpu_vnni.prefers_torch(least)
    monkeypatch.setattr(cpu_vnni, "_CHUNK_WEIGHTS", 128 * 64)
    x, bias = torch.randn(200, 128).bfloat16(), torch.randn(200).bfloat16()
    weight = dequantize(packed, layout, torch.bfloat16)
    want = torch.nn.functional.linear(x, weight).add_(bias).double()
    for y in (weight_only_linear(x, packed, layout, bias), direct_linear(packed, layout, bias)(x)):
        assert (y.double() - want).norm() <= 2.0**-8 * want.norm()
    parts = direct_linear(packed, layout, bias).parts(x, (64, 100, 36))
    assert all(part.is_contiguous() for part in parts)
    assert (torch.cat(parts, -1).double() - want).norm() <= 2.0**-8 * want.norm()
    # Whoever asks for rows that do not depend on each other gets the loop.
    invariant = weight_only_linear(x, packed, layout, bias, batch_invariant=True)
    assert torch.equal(invariant[3:4], weight_only_linear(x[3:4], packed, layout, bias))


@pytest.mark.parametrize("which", ["weight", "scale", "zero_point", "bias"])
def test_tensors_that_move_are_followed(which):
    """What `share_memory` does: the same tensor, elsewhere."""
    packed, layout = _weight_only()
    bias, x = torch.randn(48).bfloat16(), torch.randn(2, 128).bfloat16()
    direct = direct_linear(packed, layout, bias)
    before = direct(x)
    moved = bias if which == "bias" else getattr(packed, which)
    other = moved.flip(-1).contiguous()
    moved.data = other
    want = weight_only_linear(x, packed, layout, bias)
    assert torch.equal(direct(x), want)
    assert not torch.equal(want, before)


def test_a_bias_with_strides():
    packed, layout = _weight_only()
    x, bias = torch.randn(2, 128).bfloat16(), torch.randn(48, 2).bfloat16()[:, 0]
    want = weight_only_linear(x, packed, layout, bias.contiguous()).double()
    assert torch.equal(weight_only_linear(x, packed, layout, bias).double(), want)
    assert (direct_linear(packed, layout, bias)(x).double() - want).norm() <= 2.0**-8 * want.norm()
    low_packed, low_layout, _ = _direct()
    assert direct_low_bit_linear(low_packed, low_layout, torch.bfloat16, bias, Rounding(8, True, None)) is None


def test_other_default_dtypes_and_devices_change_nothing():
    packed, layout = _weight_only()
    x = torch.randn(3, 128).bfloat16()
    low_packed, low_layout, low = _direct()
    tokens = torch.randn(60, 96).bfloat16()
    ops = (
        lambda: direct_linear(packed, layout)(x),
        lambda: torch.cat(direct_linear(packed, layout).parts(x, (16, 32)), -1),
        lambda: low(tokens),
        lambda: low_bit_linear(quantize_activations(tokens, 8, True), low_packed, low_layout, torch.bfloat16),
    )
    want = [op() for op in ops]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert all(torch.equal(op(), expected) for op, expected in zip(ops, want, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_the_loop_torch_computes(monkeypatch):
    _, _, direct = _direct()
    x = torch.randn(3, 96).bfloat16()
    want = direct(x)
    monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    packed, layout, direct = _direct()
    assert layout.kind == "cpu_int8_rows"
    assert direct is None
    assert torch.equal(low_bit_linear(quantize_activations(x, 8, True), packed, layout, x.dtype), want)
