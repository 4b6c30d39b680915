"""Low-bit linears on the CPU, their layouts and what they refuse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import (
    LowBitLayout,
    PackedWeight,
    QuantizedActivations,
    choose_low_bit_layout,
    low_bit_linear,
    quantize_activations,
    reference,
)
from sliderquant_kernels.low_bit import cpu as low_bit_cpu
from sliderquant_kernels.low_bit import fragments as int8_fragments

_SCHEMES = [
    (bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product((2, 4, 8), (None, 32, 64), (True, False))
    if bits != 8 or group_size is None or symmetric
]


def _packed(make_weight, bits, n, k, group_size, symmetric):
    weight = make_weight(bits, n, k, group_size, symmetric, torch.float32)
    layout = choose_low_bit_layout(bits, n, k, group_size, symmetric, "cpu")
    return weight, layout, layout.pack(*weight[:3])


@pytest.mark.parametrize("x_symmetric", [True, False], ids=["x-sym", "x-asym"])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), _SCHEMES)
def test_equals_the_simulation(bits, group_size, symmetric, x_bits, x_symmetric, make_weight, make_x):
    """What runs is what the dequantized operands would give, but for fp32's rounding of the result."""
    for n, k in ((33, 192), (16, 64)):
        weight, layout, packed = _packed(make_weight, bits, n, k, group_size, symmetric)
        activations = quantize_activations(make_x((2, 3, k), torch.float16) + 0.3, x_bits, x_symmetric)
        bias, residual = make_x((n,), torch.float32, 2), make_x((2, 3, n), torch.float32, 3)
        got = low_bit_linear(activations, packed, layout, torch.float32, bias, residual)
        x = activations.dequantize(torch.float64)
        want = reference.weight_only_linear(x, *weight, bias, residual)
        magnitude = reference.magnitude(x, *weight)
        # The sums are exact; scales, their product and the epilogue round a few times, once per group in groups.
        groups = weight.scale.shape[1]
        bound = 2.0**-24 * ((4 + 2 * groups) * magnitude + 4 * (want.abs() + bias.abs() + residual.abs()))
        assert ((got.double() - want).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), _SCHEMES)
def test_a_token_of_zeros_gives_the_bias_exactly(bits, group_size, symmetric, x_bits, make_weight, make_x):
    _, layout, packed = _packed(make_weight, bits, 33, 192, group_size, symmetric)
    x = make_x((3, 192), torch.float16)
    x[1] = 0
    bias, residual = make_x((33,), torch.float32, 2), make_x((3, 33), torch.float32, 3)
    for x_symmetric in (True, False):
        activations = quantize_activations(x, x_bits, x_symmetric)
        assert torch.equal(low_bit_linear(activations, packed, layout, torch.float32, bias)[1], bias)
        got = low_bit_linear(activations, packed, layout, torch.float32, bias, residual)
        assert torch.equal(got[1], bias + residual[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_sum_overflows_at_the_documented_bound(bits):
    """Worst-case codes and zero-points at the largest K: 255 * (2^b - 1) * K just below 2^31."""
    k = int8_fragments.MAX_K[bits]
    assert 255 * (2**bits - 1) * k < 2**31 <= 255 * (2**bits - 1) * (k + 1)
    k = min(k, 300_000)
    top = 2**bits - 1
    layout = LowBitLayout("cpu_int8_rows", bits, 1, k, None, False)
    for code, zero in ((top, 0), (0, top)):
        codes = torch.full((1, k), code, dtype=torch.uint8)
        packed = layout.pack(codes, torch.ones(1, 1), torch.full((1, 1), zero, dtype=torch.uint8))
        for x_code, x_zero in ((127, -128), (-128, 127)):
            activations = QuantizedActivations(
                torch.full((1, k), x_code, dtype=torch.int8),
                torch.ones(1),
                torch.tensor([x_zero], dtype=torch.int32),
                torch.tensor([x_code * k], dtype=torch.int32),
            )
            got = low_bit_linear(activations, packed, layout, torch.float32)
            want = torch.tensor(float((x_code - x_zero) * (code - zero) * k), dtype=torch.float64).float()
            assert got.item() == want.item()


def test_a_larger_k_is_refused():
    with pytest.raises(
        ValueError, match=r"k from 1 to 33025, beyond which sums of 8-bit weights and 8-bit activations"
    ):
        LowBitLayout("cpu_int8_rows", 8, 16, 33026, None, True)


def test_int_mm_without_exact_instructions(monkeypatch, make_x):
    x = torch.randint(-128, 128, (3, 50), dtype=torch.int8)
    w = torch.randint(-128, 128, (7, 50), dtype=torch.int8)
    want = (x.double() @ w.double().t()).int()
    assert torch.equal(low_bit_cpu.int_mm(x, w), want)
    monkeypatch.setattr(low_bit_cpu, "is_exact", lambda: False)
    assert torch.equal(low_bit_cpu.int_mm(x, w), want)


@st.composite
def _packable(draw):
    bits, group_size, symmetric = draw(st.sampled_from(_SCHEMES))
    n = draw(st.integers(1, 40))
    k = group_size * draw(st.integers(1, 5)) if group_size else draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = k // group_size if group_size else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, groups, generator=generator) + 1e-3
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    kind = draw(st.sampled_from(["triton_int8", "cpu_int8_rows", "cpu_vnni"]))
    return LowBitLayout(kind, bits, n, k, group_size, symmetric), codes, scale, zero


@settings(deadline=None, max_examples=80)
@given(_packable())
def test_unpack_inverts_pack(case):
    layout, codes, scale, zero = case
    packed = layout.pack(codes, scale, zero)
    got = layout.unpack(packed)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scale)
    assert got[2] is None if zero is None else torch.equal(got[2], zero)
    assert LowBitLayout.from_metadata(layout.metadata()) == layout


def test_fragments_are_what_is_documented():
    for bits in (2, 4, 8):
        n, k = 20, 150
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        packed = int8_fragments.pack_codes(codes, bits)
        inputs = int8_fragments.block_inputs(bits)
        for row, column in ((0, 0), (19, 149), (7, 77), (16, 33)):
            m, g = divmod(row % 16, 8)
            i, kappa = divmod(column % inputs, 32)
            h, c, b = kappa // 16, kappa // 4 % 4, kappa % 4
            byte = (((g * 4 + c) * 2 + h) * 2 + m) * 4 + b
            stored = int(packed[row // 16, column // inputs, byte]) ^ int8_fragments.shift(bits)
            assert stored >> (bits * i) & (2**bits - 1) == int(codes[row, column])


_GOOD = {"kind": "triton_int8", "bits": 4, "n": 32, "k": 64, "group_size": 32, "symmetric": True, "version": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version: expected 1 for kind 'triton_int8', got 2; repack"),
        ({"kind": "marlin"}, r"kind: expected one of triton_int8, cpu_vnni, cpu_int8_rows, got 'marlin'"),
        ({"bits": 3}, r"bits: expected 2, 4 or 8, got 3; store 3-bit codes as 4-bit ones"),
        ({"group_size": 48}, r"group_size: expected 32, 64 or 128 that divides k=64, or None; got 48"),
        ({"k": 80}, r"group_size: expected 32, 64 or 128 that divides k=80"),
        ({"bits": 8, "symmetric": False}, r"symmetric: 8-bit weights in groups have no zero-points"),
    ],
)
def test_bad_layouts_are_refused(change, message):
    assert LowBitLayout(**_GOOD).version == 1
    with pytest.raises(ValueError, match=message):
        LowBitLayout(**{**_GOOD, **change})


def test_bad_weights_are_refused(make_weight):
    layout = LowBitLayout(**_GOOD)
    codes, scale = torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2)
    for arguments, error, message in (
        ((codes + 16, scale), ValueError, r"codes: expected values in 0\.\.15, got 16"),
        ((codes[:31], scale), ValueError, r"codes: expected shape \(32, 64\), got \(31, 64\)"),
        ((codes, scale[:, :1]), ValueError, r"scale: expected shape \(32, 2\), got \(32, 1\)"),
        ((codes, scale.double()), TypeError, r"scale: expected float16, bfloat16 or float32"),
        ((codes, -scale), ValueError, r"scale: expected finite values above 0"),
        ((codes, scale, codes[:, :2]), ValueError, r"zero_point: expected None with symmetric=True, got a tensor"),
    ):
        with pytest.raises(error, match=message):
            layout.pack(*arguments)


def _case(make_weight, make_x):
    _, layout, packed = _packed(make_weight, 4, 48, 64, None, False)
    return quantize_activations(make_x((2, 64), torch.bfloat16), 4, False), packed, layout


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": lambda t: t.int()}, TypeError, r"codes: expected dtype torch.int8, got torch.int32; quantize with"),
        ({"codes": lambda t: t[:, :63]}, ValueError, r"codes: expected shape \[\.\.\., 64\], got \(2, 63\)"),
        ({"scale": lambda t: t[:1]}, ValueError, r"scale of the activations: expected shape \(2,\), got \(1,\)"),
        ({"scale": lambda t: t.half()}, TypeError, r"scale of the activations: expected dtype torch.float32"),
        ({"zero_point": lambda t: t.long()}, TypeError, r"zero_point of the activations: expected dtype torch.int32"),
        ({"token_sum": lambda t: t[:0]}, ValueError, r"token_sum: expected shape \(2,\), got \(0,\)"),
    ],
)
def test_bad_activations_are_refused(change, error, message, make_weight, make_x):
    activations, packed, layout = _case(make_weight, make_x)
    (field, function), *_ = change.items()
    bad = activations._replace(**{field: function(getattr(activations, field))})
    with pytest.raises(error, match=message):
        low_bit_linear(bad, packed, layout, torch.bfloat16)


def test_other_bad_arguments_are_refused(make_weight, make_x):
    activations, packed, layout = _case(make_weight, make_x)
    bias = torch.zeros(48, dtype=torch.bfloat16)
    for arguments, keywords, error, message in (
        ((activations, packed, layout, torch.int8), {}, TypeError, r"dtype: expected float16, bfloat16 or float32"),
        ((activations, packed, layout, torch.float16, bias), {}, TypeError, r"bias: expected dtype torch.float16"),
        ((activations, packed, layout, torch.bfloat16, bias[:3]), {}, ValueError, r"bias: expected shape \(48,\)"),
        (
            (activations, packed, layout, torch.bfloat16, None, bias),
            {},
            ValueError,
            r"residual: expected shape \(2, 48\)",
        ),
        ((activations, packed, layout, torch.bfloat16, bias.to("meta")), {}, ValueError, r"bias: expected device cpu"),
        ((tuple(activations), packed, layout, torch.bfloat16), {}, TypeError, r"activations: expected Quantized"),
        ((activations, packed[0], layout, torch.bfloat16), {}, TypeError, r"packed: expected a PackedWeight"),
        ((activations, packed, None, torch.bfloat16), {}, TypeError, r"layout: expected a LowBitLayout"),
        ((activations, packed, layout, torch.bfloat16), {"variant": "rows"}, ValueError, r"variant: expected one of"),
    ):
        with pytest.raises(error, match=message):
            low_bit_linear(*arguments, **keywords)
    with pytest.raises(ValueError, match=r"scale: expected shape \(1, 48\) for this layout, got \(1, 47\)"):
        low_bit_linear(activations, packed._replace(scale=packed.scale[:, :47]), layout, torch.bfloat16)
    other = LowBitLayout("triton_int8", 4, 48, 64, None, False)
    repacked = other.pack(*layout.unpack(packed))
    with pytest.raises(ValueError, match=r"weight: kind 'triton_int8' runs on cuda, got tensors on cpu; unpack"):
        low_bit_linear(activations, repacked, other, torch.bfloat16)
    with pytest.raises(ValueError, match="device: expected cuda or cpu, got 'meta'"):
        choose_low_bit_layout(4, 48, 64, None, False, "meta")


def test_opcheck_and_compile(make_weight, make_x):
    activations, packed, layout = _case(make_weight, make_x)
    fields = (layout.kind, layout.bits, layout.n, layout.k, 0, layout.symmetric)
    operands = (*activations, *packed, None, None)
    torch.library.opcheck(
        torch.ops.sliderquant_kernels.low_bit_linear.default, (*operands, *fields, torch.bfloat16, "")
    )

    def function(x):
        return low_bit_linear(quantize_activations(x * 2, 4, False), packed, layout, x.dtype)

    for m in (0, 1, 3):
        x = make_x((m, 64), torch.bfloat16)
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_rows_do_not_depend_on_each_other(make_weight, make_x):
    _, layout, packed = _packed(make_weight, 4, 48, 64, None, True)
    x = make_x((37, 64), torch.bfloat16)
    whole = low_bit_linear(quantize_activations(x, 8), packed, layout, x.dtype)
    for rows in (slice(0, 1), slice(5, 20)):
        alone = low_bit_linear(quantize_activations(x[rows], 8), packed, layout, x.dtype)
        assert torch.equal(alone, whole[rows])


def test_gradients_are_refused(make_weight, make_x):
    activations, packed, layout = _case(make_weight, make_x)
    scale = activations.scale.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="for inference and has no backward"):
        low_bit_linear(activations._replace(scale=scale), packed, layout, torch.float32).sum().backward()
    assert isinstance(packed, PackedWeight)
