"""The op that quantizes activations: its formulas, its fusions, its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import quantize_activations, reference
from sliderquant_kernels.activations.op import MAX_K, prepared
from sliderquant_kernels.common.quantized import unpack_int4


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_formulas(dtype, bits, symmetric, make_x):
    x = make_x((5, 3, 77), dtype) * 3 + 0.5
    got = quantize_activations(x, bits, symmetric)
    codes, scale, zero = reference.quantize_activations(x, bits, symmetric)
    assert got.codes.dtype == torch.int8
    assert got.codes.shape == x.shape
    assert (got.scale.double() / scale - 1).abs().max() <= 2.0**-22
    # fp32 arithmetic may round a code that lies between two to the other one.
    assert (got.codes.double() - codes).abs().max() <= 1
    assert (got.codes.double() == codes).double().mean() > 0.99
    assert torch.equal(got.token_sum, got.codes.int().sum(-1).int())
    assert (got.zero_point is None) == symmetric
    if not symmetric:
        assert torch.equal(got.zero_point.double(), zero)
    # Half a step, and what the zero-point's own rounding pushes out of the range.
    error = (got.dequantize().double() - x.double()).abs()
    assert (error <= scale.unsqueeze(-1) * (1.01 if not symmetric or bits else 0.51)).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [(0.9, 0.6), (0.55, 1.0), (1.0, 1.0)], ids=str)
def test_clipping(clip, bits, symmetric, make_x):
    x = make_x((50, 77), torch.float32) * 3 + 0.5
    got = quantize_activations(x, bits, symmetric, clip=clip)
    codes, scale, zero = reference.quantize_activations(x, bits, symmetric, clip)
    assert ((got.scale.double() / scale - 1).abs() <= 2.0**-22).all()
    assert (got.codes.double() == codes).double().mean() > 0.99
    assert symmetric or torch.equal(got.zero_point.double(), zero)
    assert torch.equal(got.token_sum, got.codes.int().sum(-1).int())
    # The ends are where they should be, and what lies outside of them is at their codes.
    low, high = x.double().amin(-1, keepdim=True) * clip[0], x.double().amax(-1, keepdim=True) * clip[1]
    low, high = (-torch.maximum(-low, high), torch.maximum(-low, high)) if symmetric else (low, high)
    dequantized, step = got.dequantize().double(), scale.unsqueeze(-1)
    assert (dequantized >= low - step * 1.01).all()
    assert (dequantized <= high + step * 1.01).all()
    for outside, code in ((x < low - step, -(2 ** (bits - 1))), (x > high + step, 2 ** (bits - 1) - 1)):
        assert (got.codes[outside] == code).all()
    plain = quantize_activations(x, bits, symmetric)
    assert all(a is None or torch.equal(a, b) == (clip == (1.0, 1.0)) for a, b in zip(got[:2], plain[:2], strict=True))


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([4, 8]),
    st.booleans(),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.none() | st.tuples(*[st.floats(2.0**-10, 1.0, width=32)] * 2),
)
def test_zero_is_exact_and_codes_stay_in_range(bits, symmetric, values, clip):
    """The range always holds 0, so that 0 is a code."""
    got = quantize_activations(torch.tensor([[*values, 0.0]]), bits, symmetric, clip=clip)
    assert got.dequantize()[0, -1] == 0
    assert int(got.codes.min()) >= -(2 ** (bits - 1))
    assert int(got.codes.max()) <= 2 ** (bits - 1) - 1


def test_tokens_of_zeros(make_x):
    for bits in (4, 8):
        for symmetric in (True, False):
            got = quantize_activations(torch.zeros(2, 8), bits, symmetric)
            assert torch.equal(got.scale, torch.ones(2))
            assert torch.equal(got.dequantize(), torch.zeros(2, 8))
            assert not got.codes.any()
            assert not got.token_sum.any()
            assert symmetric or not got.zero_point.any()
            assert not any(t.any() for t in reference.quantize_activations(torch.zeros(2, 8), bits, symmetric)[::2])


def test_the_same_grid_as_compressed_tensors(make_x):
    """What other readers of a checkpoint simulate."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    x = make_x((6, 96), torch.float32) * 2 + 0.3
    for bits in (4, 8):
        for symmetric in (True, False):
            arguments = quantization.QuantizationArgs(
                num_bits=bits, type="int", symmetric=symmetric, strategy="token", dynamic=True
            )
            scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), arguments)
            got = quantize_activations(x, bits, symmetric)
            assert torch.equal(got.scale, scale.squeeze(-1))
            if not symmetric:
                assert torch.equal(got.zero_point, zero.squeeze(-1).int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_is_that_of_llama(dtype, make_x):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    x, weight = make_x((4, 96), dtype), norm.weight.detach()
    got = quantize_activations(x, 4, False, norm_weight=weight, norm_eps=1e-5)
    want = quantize_activations(norm(x).detach(), 4, False)
    assert torch.equal(prepared(x, weight, 1e-5, None), norm(x))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_silu_gate_is_that_of_llama(make_x):
    gate, up = make_x((4, 96), torch.bfloat16), make_x((4, 96), torch.bfloat16, seed=2)
    got = quantize_activations(up, 8, True, gate=gate)
    want = quantize_activations(torch.nn.functional.silu(gate) * up, 8, True)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)


def test_packed_codes(make_x):
    x = make_x((2, 3, 64), torch.float16)
    packed, plain = quantize_activations(x, 4, False, packed=True), quantize_activations(x, 4, False)
    assert packed.codes.shape == (2, 3, 32)
    assert torch.equal(unpack_int4(packed.codes), plain.codes)
    assert torch.equal(packed.dequantize(), plain.dequantize())


def test_opcheck_and_compile(make_x):
    op = torch.ops.sliderquant_kernels.quantize_activations.default
    for shape in ((64,), (0, 64), (2, 3, 64)):
        torch.library.opcheck(op, (make_x(shape, torch.bfloat16), 4, False, None, 1e-6, None, True))
    weight = make_x((64,), torch.bfloat16)
    torch.library.opcheck(op, (make_x((3, 64), torch.bfloat16), 8, True, weight, 1e-6, None, False))
    compiled = torch.compile(lambda x: quantize_activations(x * 2, 4).codes, fullgraph=True, backend="aot_eager")
    x = make_x((3, 64), torch.bfloat16)
    assert torch.equal(compiled(x), quantize_activations(x * 2, 4).codes)


def _x(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"x": _x(2, 8, dtype=torch.float64)},
            TypeError,
            r"x: expected float16, bfloat16 or float32, got torch.float64",
        ),
        ({"x": _x(())}, ValueError, r"x: expected shape \[\.\.\., K\] with K from 1 to 32768, got \(\)"),
        ({"x": _x(1, MAX_K + 1)}, ValueError, r"with K from 1 to 32768, got \(1, 32769\)"),
        ({"bits": 3}, ValueError, r"bits: expected 4 or 8, got 3"),
        ({"packed": True}, ValueError, r"packed: two codes a byte need bits=4 and an even K, got bits=8 and K=8"),
        ({"norm_weight": _x(7)}, ValueError, r"norm_weight: expected shape \(8,\), got \(7,\)"),
        ({"norm_weight": _x(8, dtype=torch.float32)}, TypeError, r"norm_weight: expected dtype torch.bfloat16 like x"),
        ({"gate": _x(8)}, ValueError, r"gate: expected shape \(2, 8\), got \(8,\)"),
        ({"gate": _x(2, 8, device="meta")}, ValueError, r"gate: expected device cpu like x, got meta; move it"),
        ({"gate": _x(2, 8), "norm_weight": _x(8)}, ValueError, r"gate: not together with norm_weight"),
        ({"clip": (0.5,)}, ValueError, r"clip: expected two factors above 0 and at most 1, got \(0\.5,\)"),
        ({"clip": (0.0, 1.0)}, ValueError, r"clip: expected two factors above 0 and at most 1, got \(0\.0, 1\.0\)"),
        ({"clip": (0.5, 1.5)}, ValueError, r"clip: expected two factors above 0 and at most 1"),
        ({"clip": (0.5, float("nan"))}, ValueError, r"clip: expected two factors above 0 and at most 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_activations(**{"x": _x(2, 8), **arguments})


def test_gradients_are_refused(make_x):
    x = make_x((2, 8), torch.float32).requires_grad_()
    with pytest.raises(NotImplementedError, match="for inference and has no backward"):
        quantize_activations(x).scale.sum().backward()
