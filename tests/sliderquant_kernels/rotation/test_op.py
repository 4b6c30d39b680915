"""What the rotations promise whatever the device: values, inverse, gradients, validation, registration, tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import (
    HadamardTransform,
    factor_hadamard,
    hadamard,
    hadamard_quantize,
    quantize_activations,
    reference,
)
from sliderquant_kernels.activations.op import quantize

_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Each kind of rotation: powers of two, one or several other orders, blocks; and real sizes.
_SIZES = [1, 2, 6, 12, 64, 96, 128, 172, 192, 752, 1040, 1536, 4096, 4864]
_LARGE = [5120, 8192, 11008, 12288, 13824, 14336, 18944, 28672, 29568]


def _signs(n, dtype, seed=5):
    return (torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("n", _SIZES)
def test_equals_the_dense_matrix(n, dtype, make_x, assert_rotation_close):
    transform = factor_hadamard(n)
    x = make_x((3, n), dtype)
    for signs in (None, _signs(n, dtype)):
        for inverse in (False, True):
            y = hadamard(x, transform, signs, inverse=inverse)
            assert_rotation_close(y, x, reference.hadamard(x, transform, signs, inverse))


@pytest.mark.parametrize("n", _SIZES + _LARGE)
def test_the_transpose_is_the_inverse(n, make_x):
    transform = factor_hadamard(n)
    x, signs = make_x((2, n), torch.float32), _signs(n, torch.float32)
    for there in (False, True):
        y = hadamard(x, transform, signs, inverse=there)
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(hadamard(y, transform, signs, inverse=not there), x, rtol=0, atol=2e-5)
        assert n == 1 or (y - x).abs().max() > 0.1


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 600).map(lambda half: 2 * half), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_even_size_is_rotated_and_back(n, rows, seed):
    transform = factor_hadamard(n)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    y = hadamard(x, transform)
    torch.testing.assert_close(y.double(), reference.hadamard(x, transform), rtol=0, atol=2e-5)
    torch.testing.assert_close(hadamard(y, transform, inverse=True), x, rtol=0, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    half=st.integers(1, 300),
    heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_16_bits_and_heads_are_rotated_and_back(half, heads, dtype, signed, seed):
    """Two roundings of every value to 16 bits, and no more."""
    n = 2 * half
    transform, signs = factor_hadamard(n), _signs(n, dtype, seed) if signed else None
    x = torch.randn(2, heads, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = hadamard(x, transform, signs)
    back = hadamard(y, transform, signs, inverse=True)
    assert y.dtype == back.dtype == dtype
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    assert ((back.double() - x.double()).norm() <= 2 * unit * x.double().norm() + 1e-6).all()
    assert torch.equal(y[1, heads - 1], hadamard(x[1, heads - 1], transform, signs))


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(_DTYPES),
    gated=st.booleans(),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_equals_unfused(half, bits, symmetric, dtype, gated, signed, seed):
    """SiLU, product, rotation and quantization at once, and one after the other."""
    n = 2 * half
    generator = torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(3, n, generator=generator).to(dtype) for _ in range(2))
    x[1] = 0
    transform, signs = factor_hadamard(n), _signs(n, dtype, seed) if signed else None
    got = hadamard_quantize(x, transform, bits, symmetric, gate=gate if gated else None, signs=signs)
    ready = torch.nn.functional.silu(gate.float()).to(dtype) * x if gated else x
    rotated = hadamard(ready.float(), transform, None if signs is None else signs.float())
    want = quantize_activations(rotated, bits, symmetric)
    for name, fused, unfused in zip(want._fields, got, want, strict=True):
        assert (fused is None and unfused is None) or torch.equal(fused, unfused), name
    assert not got.codes[1].any()


def test_many_rows_go_in_parts(make_x):
    """More than is rotated at a time, in blocks with signs: each part begins with the first of the signs."""
    transform, signs = factor_hadamard(188), _signs(188, torch.float32)
    x = make_x((1000, 188), torch.float32)
    for inverse in (False, True):
        whole = hadamard(x, transform, signs, inverse=inverse)
        torch.testing.assert_close(whole.double(), reference.hadamard(x, transform, signs, inverse), rtol=0, atol=1e-5)


def test_shapes_and_strides(make_x):
    transform = factor_hadamard(64)
    x = make_x((64, 2, 3), torch.bfloat16).permute(2, 1, 0)
    kept = x.clone()
    y = hadamard(x, transform)
    assert y.shape == (3, 2, 64)
    assert y.is_contiguous()
    assert torch.equal(x, kept)
    assert torch.equal(y[1, 0], hadamard(x[1, 0], transform))
    assert hadamard(x[:0], transform).shape == (0, 2, 64)
    one = make_x((2, 1), torch.float32)
    out = hadamard(one, factor_hadamard(1))
    assert torch.equal(out, one)
    assert out.data_ptr() != one.data_ptr()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [12, 28, 188])
def test_gradient_is_the_transpose(n, inverse, make_x):
    """28 and 12 are not symmetric: the transpose is another matrix."""
    transform, signs = factor_hadamard(n), _signs(n, torch.float32)
    x, gradient = make_x((2, 3, n), torch.float32).requires_grad_(), make_x((2, 3, n), torch.float32, seed=2)
    y = hadamard(x, transform, signs, inverse=inverse)
    (got,) = torch.autograd.grad(y, x, gradient, create_graph=True)
    want = reference.hadamard(gradient, transform, signs, not inverse)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert not torch.allclose(want, reference.hadamard(gradient, transform, signs, inverse), atol=1e-2)


def test_gradients_of_gradients(make_x):
    transform = factor_hadamard(12)
    weight = make_x((12,), torch.float32).requires_grad_()
    x = make_x((2, 12), torch.float32).requires_grad_()
    (first,) = torch.autograd.grad((hadamard(x * weight, transform) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    # A rotation keeps the sum of squares: the gradient for x is 2 x weight^2.
    torch.testing.assert_close(second, (4 * x * weight).sum(0), rtol=1e-4, atol=1e-4)


def test_what_has_no_gradient(make_x):
    transform, x = factor_hadamard(12), make_x((2, 12), torch.float32)
    signs = _signs(12, torch.float32).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"hadamard has no gradient for signs; detach"):
        hadamard(x, transform, signs).sum().backward()
    with pytest.raises(NotImplementedError, match=r"hadamard_quantize is for inference and has no backward"):
        hadamard_quantize(x.requires_grad_(), transform).scale.sum().backward()
    with torch.no_grad():
        assert not hadamard(x, transform).requires_grad
        hadamard_quantize(x, transform)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [6, 64, 172, 1536])
def test_quantize(n, bits, symmetric, make_x):
    """As quantizing the rotated values themselves, in fp32 and not rounded to x's dtype."""
    transform = factor_hadamard(n)
    for dtype in _DTYPES:
        x, gate, signs = make_x((2, 3, n), dtype), make_x((2, 3, n), dtype, seed=4), _signs(n, dtype)
        rotated = hadamard(x.float(), transform)
        codes, scale, zero, total = quantize(rotated, bits, symmetric)
        got = hadamard_quantize(x, transform, bits, symmetric)
        assert torch.equal(got.codes, codes)
        assert torch.equal(got.scale, scale)
        assert (got.zero_point is None) if symmetric else torch.equal(got.zero_point, zero)
        assert torch.equal(got.token_sum, total)
        step = scale.unsqueeze(-1) * (1.01 if not symmetric else 0.51)
        assert ((got.dequantize() - rotated).abs() <= step).all()
        gated = torch.nn.functional.silu(gate.float()).to(dtype) * x
        want = hadamard_quantize(gated * signs, transform, bits, symmetric)
        got = hadamard_quantize(x, transform, bits, symmetric, gate=gate, signs=signs)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        clip = (0.93, 0.625)
        got, want = (
            hadamard_quantize(x, transform, bits, symmetric, clip=clip),
            quantize(rotated, bits, symmetric, clip),
        )
        assert torch.equal(got.codes, want[0])
        assert torch.equal(got.scale, want[1])
        assert not torch.equal(got.scale, scale)


def test_opcheck(make_x):
    ops = torch.ops.sliderquant_kernels
    for n, shape in ((64, (64,)), (96, (2, 3, 96)), (172, (0, 172)), (188, (2, 188))):
        orders = factor_hadamard(n).orders
        for dtype in (torch.float32, torch.bfloat16):
            x = make_x(shape, dtype).requires_grad_()
            torch.library.opcheck(ops.hadamard.default, (x, None, n, orders, False))
            torch.library.opcheck(ops.hadamard.default, (x, _signs(n, dtype), n, orders, True))
            arguments = (x.detach(), _signs(n, dtype), make_x(shape, dtype, seed=2), n, orders)
            torch.library.opcheck(ops.hadamard_quantize.default, (*arguments, 4, False))
            torch.library.opcheck(ops.hadamard_quantize.default, (*arguments, 4, False, (0.9, 0.8)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, make_x):
    transform, signs = factor_hadamard(96), _signs(96, torch.float32)

    def function(x):
        y = hadamard(x * 2, transform, signs)
        activations = hadamard_quantize(y.detach(), transform, 4, False)
        return y.sin() + activations.dequantize()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for rows in (1, 3):
        x = make_x((rows, 96), torch.float32).requires_grad_()
        want, got = function(x), compiled(x)
        torch.testing.assert_close(got, want)
        (wanted,) = torch.autograd.grad(want.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], wanted)


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("x", "signs", "error", "message"),
    [
        (_x(2, 63), None, ValueError, r"x: expected shape \[\.\.\., 64\] for this transform, got \(2, 63\)"),
        (_x(()), None, ValueError, r"x: expected shape \[\.\.\., 64\] for this transform, got \(\)"),
        (_x(2, 64, dtype=torch.float64), None, TypeError, r"x: expected float16, bfloat16 or float32, got .*float64"),
        (_x(2, 64), _x(63), ValueError, r"signs: expected shape \(64,\), got \(63,\)"),
        (_x(2, 64), _x(64, dtype=torch.int8), TypeError, r"signs: expected dtype torch.float32 like x, got torch.int8"),
        (_x(2, 64), _x(64, device="meta"), ValueError, r"signs: expected device cpu like x, got meta; move it"),
    ],
)
def test_bad_arguments_are_refused(x, signs, error, message):
    transform = factor_hadamard(64)
    with pytest.raises(error, match=message):
        hadamard(x, transform, signs)
    with pytest.raises(error, match=message):
        hadamard_quantize(x, transform, signs=signs)


def test_other_bad_arguments_are_refused():
    transform = factor_hadamard(64)
    with pytest.raises(ValueError, match=r"gate: expected shape \(2, 64\), got \(64,\)"):
        hadamard_quantize(_x(2, 64), transform, gate=_x(64))
    with pytest.raises(ValueError, match=r"bits: expected 4 or 8, got 3"):
        hadamard_quantize(_x(2, 64), transform, 3)
    with pytest.raises(ValueError, match=r"clip: expected two factors above 0 and at most 1, got \(0\.5, 2\.0\)"):
        hadamard_quantize(_x(2, 64), transform, clip=(0.5, 2.0))
    for function in (hadamard, hadamard_quantize):
        with pytest.raises(TypeError, match=r"transform: expected a HadamardTransform, got int; use factor_hadamard"):
            function(_x(2, 64), 64)
    with pytest.raises(ValueError, match=r"orders: expected orders whose product divides n=64"):
        torch.ops.sliderquant_kernels.hadamard(_x(2, 64), None, 64, [3], False)
    assert hadamard(_x(2, 64, device="meta"), HadamardTransform(64, (64,))).shape == (2, 64)
