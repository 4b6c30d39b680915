"""The loop of AMX instructions: low-bit linears, which have the bits of the other loop, and weight-only ones, whose
tokens and integers q - z are exact, so that sums in fp32 are all that rounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import (
    LowBitLayout,
    WeightLayout,
    direct_linear,
    direct_low_bit_linear,
    low_bit_linear,
    quantize_activations,
    reference,
    weight_only_linear,
)
from sliderquant_kernels.cpu import native as cpu_native
from sliderquant_kernels.cpu import vnni as cpu_vnni
from sliderquant_kernels.cpu.vnni import Rounding
from tests.sliderquant_kernels.cpu.cpu_weights import LOW_BIT, WEIGHT_ONLY, random_weight, weight_only_case

if cpu_native.vnni(4) is None or not cpu_native.has_amx():
    pytest.skip("no AMX, or no C compiler, on this machine", allow_module_level=True)

_NEVER, _ALWAYS = 0, 1


@pytest.fixture(autouse=True)
def _several_threads(monkeypatch):
    monkeypatch.setattr(cpu_vnni, "_PRODUCTS_PER_THREAD", 1 << 10)
    monkeypatch.setattr(cpu_vnni, "_VALUES_PER_THREAD", 256)


def _with(amx_tokens, function):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_vnni, "_MIN_AMX_TOKENS", amx_tokens)
        return function()


@settings(deadline=None, max_examples=200)
@given(
    scheme=st.sampled_from(LOW_BIT),
    n=st.integers(1, 150),
    units=st.integers(1, 11),
    missing=st.sampled_from([0, 1, 3, 15]),
    m=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounding=st.builds(Rounding, st.sampled_from([4, 8]), st.booleans(), st.none()),
    extras=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_products_of_codes_have_the_same_bits(scheme, n, units, missing, m, dtype, rounding, extras, seed):
    bits, group_size, symmetric = scheme
    k = units * group_size if group_size else 32 * units - missing
    generator = torch.Generator().manual_seed(seed)
    layout = LowBitLayout("cpu_vnni", bits, n, k, group_size, symmetric)
    packed = layout.pack(*random_weight(scheme, n, k, generator))
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias, residual = torch.randn(n, generator=generator).to(dtype), torch.randn(m, n, generator=generator).to(dtype)
    added = ((None, None), (bias, None), (bias, residual))[extras]
    codes = quantize_activations(x, rounding.bits, rounding.symmetric)
    want, got = (_with(i, lambda: low_bit_linear(codes, packed, layout, dtype, *added)) for i in (_NEVER, _ALWAYS))
    assert torch.equal(got, want)
    if extras < 2:
        direct = direct_low_bit_linear(packed, layout, dtype, added[0], rounding)
        assert torch.equal(_with(_ALWAYS, lambda: direct(x)), want)
        sizes = (16, n - 16) if n > 16 else (n,)
        parts = _with(_ALWAYS, lambda: direct_low_bit_linear(packed, layout, dtype, added[0], rounding).parts(x, sizes))
        assert torch.equal(torch.cat(parts, -1), want)


@settings(deadline=None, max_examples=200)
@given(
    scheme=st.sampled_from(WEIGHT_ONLY),
    n=st.integers(1, 150),
    units=st.integers(1, 11),
    m=st.integers(1, 70),
    exponent=st.integers(-30, 30),
    extras=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_weight_only(scheme, n, units, m, exponent, extras, seed):
    """Beside the product in fp64: products are exact, sums of k of them are rounded to fp32, the result to bf16."""
    x, layout, packed, (codes, scale, zero), added = weight_only_case(scheme, n, units, m, exponent, extras, seed)
    bits, k = layout.bits, layout.k
    got = _with(_ALWAYS, lambda: weight_only_linear(x, packed, layout, *added)).double()
    want = reference.weight_only_linear(x, codes, scale, zero, bits, *added)
    weight = reference.dequantize(codes, scale, zero, bits)
    sizes = x.double().abs() @ weight.abs().t() + sum(t.double().abs() for t in added if t is not None)
    assert ((got - want).abs() <= 2.0**-8 * want.abs() + 2.0**-24 * (k + 4) * sizes).all()
    if extras < 2:
        direct = direct_linear(packed, layout, added[0])
        assert torch.equal(_with(_ALWAYS, lambda: direct(x)).double(), got)
        sizes = (16, n - 16) if n > 16 else (n,)
        parts = _with(_ALWAYS, lambda: direct_linear(packed, layout, added[0]).parts(x, sizes))
        assert torch.equal(torch.cat(parts, -1).double(), got)


@pytest.mark.parametrize(("bits", "k", "m"), [(2, 16384, 71), (4, 16384, 71), (8, 16384, 71), (4, 1152, 851)])
def test_many_tokens_and_many_inputs_in_several_passes(bits, k, m):
    """More tokens, and more bytes of a row, than stay in a cache at a time."""
    generator = torch.Generator().manual_seed(0)
    n = 48
    codes, scale, _ = random_weight((bits, None, True), n, k, generator)
    x = torch.randn(m, k, generator=generator)
    tokens = quantize_activations(x, 8, False)
    layout = LowBitLayout("cpu_vnni", bits, n, k, None, True)
    low = layout.pack(codes, scale)
    want, got = (_with(i, lambda: low_bit_linear(tokens, low, layout, torch.float32)) for i in (_NEVER, _ALWAYS))
    assert torch.equal(got, want)
    for group_size in (None, 128):
        scheme = (bits, group_size, False)
        codes, scale, zero = random_weight(scheme, n, k, generator)
        scale, layout = scale.bfloat16(), WeightLayout("cpu_vnni", bits, n, k, group_size, False)
        packed = layout.pack(codes, scale, zero)
        got = _with(_ALWAYS, lambda p=packed, u=layout: weight_only_linear(x.bfloat16(), p, u)).double()
        want = reference.weight_only_linear(x.bfloat16(), codes, scale, zero, bits)
        assert (got - want).norm() <= 2.0**-8 * want.norm()


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    layout = WeightLayout("cpu_vnni", 4, 80, 256, 64, False)
    codes, scale, zero = random_weight((4, 64, False), 80, 256, generator)
    packed = layout.pack(codes, scale.bfloat16(), zero)
    x = torch.randn(50, 256, generator=generator).bfloat16()
    x[7, 3], x[40] = float("inf"), float("nan")
    among = _with(_ALWAYS, lambda: weight_only_linear(x, packed, layout))
    assert not among[[7, 40]].isfinite().any()
    for i in (0, 6, 8, 31, 32, 49):
        assert torch.equal(
            _with(_ALWAYS, lambda i=i: weight_only_linear(x[i : i + 1], packed, layout)), among[i : i + 1]
        )
    # With those that come alone below eight tokens, by the other loop, only whoever asks for it has them equal.
    first = weight_only_linear(x[:1], packed, layout)
    invariant = weight_only_linear(x, packed, layout, batch_invariant=True)
    assert torch.equal(invariant[:1], first)


def test_the_loop_runs_where_it_is_meant_to():
    """The bits of weight-only products tell the two loops apart."""
    generator = torch.Generator().manual_seed(0)
    layout = WeightLayout("cpu_vnni", 4, 512, 1024, 64, False)
    codes, scale, zero = random_weight((4, 64, False), 512, 1024, generator)
    packed = layout.pack(codes, scale.bfloat16(), zero)
    x = torch.randn(8, 1024, generator=generator).bfloat16()
    never, always = (_with(i, lambda: weight_only_linear(x, packed, layout)) for i in (_NEVER, _ALWAYS))
    assert not torch.equal(never, always)
    assert torch.equal(weight_only_linear(x, packed, layout), always)
    assert torch.equal(weight_only_linear(x[:7], packed, layout), never[:7])
