"""The quantizer against an oracle in fp64 NumPy for values, and against autograd for gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sliderquant.quantizer.fake_quantize import fake_quantize, fake_quantize_activations
from sliderquant.quantizer.grids import clipped_grid, dequantize, in_groups, quantize, round_to_nearest
from sliderquant.schemes import BITS, Scheme
from sliderquant_kernels import quantize_activations

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32, 64)), st.booleans())
weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from((64, 128))),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


def oracle(weight, scheme, dtype):
    """Round to nearest, group by group, as the module's docstring defines it."""
    values = np.empty_like(weight, dtype=np.float64)
    near_tie = np.empty_like(weight, dtype=bool)
    size = scheme.group_size or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].astype(np.float64)
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            if scheme.symmetric:
                wide = max(-low, high) / ((2**scheme.bits - 1) / 2)
                zero = 2 ** (scheme.bits - 1)
            else:
                wide = (high - low) / (2**scheme.bits - 1)
            tiny = torch.finfo(dtype).smallest_normal
            if dtype == torch.float16:  # subnormal scales, rounded up
                if 0 < wide < tiny:
                    wide = np.ceil(np.float32(wide) / 2.0**-24) * 2.0**-24
                tiny = 2.0**-24
            scale = torch.tensor(max(wide, tiny) if wide > 0 else 1.0, dtype=torch.float32).to(dtype).double().item()
            if not scheme.symmetric:
                zero = np.clip(np.round(-low / scale), 0, 2**scheme.bits - 1)
            zero_ties = not scheme.symmetric and is_near_tie(-low / scale)
            near_tie[row, start : start + size] = is_near_tie(group / scale) | zero_ties
            codes = np.clip(np.round(group / scale) + zero, 0, 2**scheme.bits - 1)
            values[row, start : start + size] = (codes - zero) * scale
    return values, near_tie


def is_near_tie(steps):
    """fp32 and fp64 may round a number close to a half to different sides."""
    return np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-4


@given(weights, schemes, st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_rounding_agrees_with_the_oracle(weight, scheme, dtype):
    stored = round_to_nearest(torch.from_numpy(weight), scheme, dtype)
    got = dequantize(stored, scheme).double().numpy()
    want, near_tie = oracle(weight, scheme, dtype)
    step = stored.scale.double().numpy().repeat(weight.shape[1] // stored.scale.shape[1], axis=1)
    error = np.abs(got - want)
    # The scale itself may differ in the last bit of fp32, 2^-24 relative, and a code is up to 255 of it.
    assert (error[~near_tie] <= 1e-4 * step[~near_tie]).all()
    assert (error <= 1.001 * step).all()


@given(weights, schemes, st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_what_is_stored_is_on_the_grid_and_is_what_was_trained(weight, scheme, dtype):
    weight = torch.from_numpy(weight)
    groups = scheme.groups(weight.shape[1])
    clip = torch.randn(2, weight.shape[0], groups, generator=torch.Generator().manual_seed(0)) + 2
    trained = fake_quantize(weight, clip[0], clip[1], scheme, dtype)
    grid = clipped_grid(weight, clip[0], clip[1], scheme, dtype)
    stored = quantize(weight, grid, scheme, dtype)
    assert torch.equal(dequantize(stored, scheme), trained)
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.max() <= scheme.levels
    assert stored.scale.dtype == dtype
    assert (stored.scale > 0).all()
    assert torch.equal(stored.scale.float(), grid.scale)
    assert (stored.zero_point is None) == scheme.symmetric
    if stored.zero_point is not None:
        assert stored.zero_point.max() <= scheme.levels


@given(weights, st.sampled_from(BITS), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_zero_is_always_on_the_grid(weight, bits, dtype):
    weight = torch.from_numpy(weight).abs()  # a range that does not hold 0 by itself
    weight[:, 0] = 0
    assert (dequantize(round_to_nearest(weight, Scheme(bits), dtype), Scheme(bits))[:, 0] == 0).all()


@given(weights, schemes)
@settings(max_examples=60, deadline=None)
def test_rounding_twice_changes_nothing(weight, scheme):
    stored = round_to_nearest(torch.from_numpy(weight), scheme, torch.float32)
    once = dequantize(stored, scheme)
    again = dequantize(round_to_nearest(once, scheme, torch.float32), scheme)
    if scheme.symmetric:  # such a grid may lose its widest level, and with it the range
        return
    # A zero-point half way between two integers may leave one end of the grid unused: the range is then smaller.
    codes = in_groups(stored.codes, scheme)
    full = (codes.amin(-1) == 0) & (codes.amax(-1) == scheme.levels)
    assert torch.allclose(in_groups(again, scheme)[full], in_groups(once, scheme)[full], rtol=1e-5, atol=1e-6)


def test_a_group_of_zeros_stays_zero():
    for scheme in (Scheme(2), Scheme(4, 32), Scheme(8, 32, symmetric=True)):
        for dtype in DTYPES:
            stored = round_to_nearest(torch.zeros(3, 64), scheme, dtype)
            assert (dequantize(stored, scheme) == 0).all()
            assert stored.scale.isfinite().all()


def straight_through(rounding, x):
    return x + (rounding(x) - x).detach()


def clamped(x, low, high):
    """With a gradient also at the ends, which `torch.clamp` has before 2.14 alone."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def autograd_oracle(weight, clip_low, clip_high, scheme, dtype):
    """The same function written plainly, with rounding passed straight through, differentiated by autograd."""
    groups = scheme.groups(weight.shape[1])
    grouped = weight.view(weight.shape[0], groups, -1)
    low = grouped.amin(-1).clamp(max=0) * torch.sigmoid(clip_low)
    high = grouped.amax(-1).clamp(min=0) * torch.sigmoid(clip_high)
    if scheme.symmetric:
        wide = torch.maximum(-low, high) / (scheme.levels / 2)
    else:
        wide = (high - low) / scheme.levels
    scale = straight_through(lambda x: x.to(dtype).to(x.dtype), wide)[..., None]
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.offset)
    else:
        zero = clamped(straight_through(torch.round, -low[..., None] / scale), 0, scheme.levels)
    codes = clamped(straight_through(torch.round, grouped / scale) + zero, 0, scheme.levels)
    return ((codes - zero) * scale).view_as(weight)


@pytest.mark.parametrize("name", ["W2A16", "W3A16-g32", "W4A16-g64-sym", "W8A16", "W2A16-g32-sym"])
def test_gradients_agree_with_autograd(name):
    scheme = Scheme.parse(name)
    generator = torch.Generator().manual_seed(1)
    shape = (7, scheme.groups(128))
    leaves = [torch.randn(7, 128, generator=generator)] + [torch.randn(shape, generator=generator) for _ in range(2)]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn(7, 128, generator=generator)
    got = torch.autograd.grad(fake_quantize(*leaves, scheme, torch.bfloat16), leaves, upstream)
    want = torch.autograd.grad(autograd_oracle(*leaves, scheme, torch.bfloat16), leaves, upstream)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
        assert theirs.norm() > 0


def test_gradients_of_a_one_sided_group():
    """A range extended to hold 0 does not pull the weight at its end."""
    scheme = Scheme(3)
    leaves = [torch.rand(4, 64) + 0.5, torch.randn(4, 1), torch.randn(4, 1)]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn(4, 64)
    got = torch.autograd.grad(fake_quantize(*leaves, scheme, torch.bfloat16), leaves, upstream)
    want = torch.autograd.grad(autograd_oracle(*leaves, scheme, torch.bfloat16), leaves, upstream)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# Activations


ACTIVATIONS = ("W4A4", "W4A8", "W4A4-act-sym", "W4A8-act-sym")


def random_tokens(dtype=torch.float32):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)) * 3
    x[0, 0], x[0, 1], x[0, 2] = 0, x[0, 1].abs() + 0.1, -x[0, 2].abs() - 0.1  # no range, and ranges that must reach 0
    return x.to(dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", [None, (3.0, 0.7), (-1.3, 4.0)])
def test_activations_are_rounded_as_the_kernels_do(name, dtype, logits):
    scheme, x = Scheme.parse(name), random_tokens(dtype)
    bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
    factors = None if logits is None else torch.tensor(logits).sigmoid().unbind()
    clip = None if factors is None else tuple(factor.item() for factor in factors)
    got = fake_quantize_activations(x, bits, symmetric, clip=factors)
    assert got.dtype == dtype
    assert torch.equal(got, quantize_activations(x, bits, symmetric, clip=clip).dequantize(dtype))
    assert torch.equal(got, fake_quantize_activations(x, bits, symmetric)) == (clip is None)


@given(
    hnp.arrays(np.float32, (2, 9), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(ACTIVATIONS),
    st.none() | st.tuples(*[st.floats(2.0**-10, 1.0, width=32)] * 2),
)
@settings(max_examples=300, deadline=None)
def test_any_activations_are_rounded_as_the_kernels_do(values, name, clip):
    scheme, x = Scheme.parse(name), torch.from_numpy(values)
    bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
    factors = None if clip is None else torch.tensor(clip).unbind()
    want = quantize_activations(x, bits, symmetric, clip=clip).dequantize()
    assert torch.equal(fake_quantize_activations(x, bits, symmetric, clip=factors), want)


def test_the_zero_point_is_rounded_as_the_kernels_do_even_next_to_a_tie():
    """-8 + 1.4999999 is -6.5 in fp32, which rounds to -6; 1.4999999 alone would round to 1, and make -7."""
    x = torch.tensor([[-1.5 + 2**-23, 13.5, 0.6]])
    want = quantize_activations(x, 4, symmetric=False)
    assert want.zero_point.item() == -6
    assert torch.equal(fake_quantize_activations(x, 4, False), want.dequantize())


def activations_oracle(x, bits, symmetric, clip=(1.0, 1.0)):
    """The same function written plainly, with rounding passed straight through, differentiated by autograd."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0) * clip[0], x.amax(-1, keepdim=True).clamp(min=0) * clip[1]
    scale = torch.maximum(-low, high) / ((2**bits - 1) / 2) if symmetric else (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.zeros_like(scale) if symmetric else straight_through(torch.round, least - low / scale)
    zero = clamped(zero, least, most)
    return (clamped(straight_through(torch.round, x / scale) + zero, least, most) - zero) * scale


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_agree_with_autograd(name):
    scheme = Scheme.parse(name)
    x = random_tokens()[0, 1:].requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad(
        fake_quantize_activations(x, scheme.activation_bits, scheme.activation_symmetric), x, upstream
    )
    wanted = activations_oracle(x, scheme.activation_bits, scheme.activation_symmetric)
    (want,) = torch.autograd.grad(wanted, x, upstream)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert (got - upstream).abs().max() > 0.01  # the ends of the range get more than their own


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_the_clipping_of_activations_agree_with_autograd(name):
    scheme = Scheme.parse(name)
    bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
    # One-sided tokens among them: an end that was extended to 0 has no gradient.
    leaves = [random_tokens()[0, 1:], torch.tensor(1.7), torch.tensor(0.4)]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream, results = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(2)), []
    for function in (lambda *of: fake_quantize_activations(*of[:3], clip=of[3]), activations_oracle):
        value = function(leaves[0], bits, symmetric, (leaves[1].sigmoid(), leaves[2].sigmoid()))
        results.append(torch.autograd.grad(value, leaves, upstream))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.norm() > 0


def test_gradients_of_a_token_of_zeros_and_of_half_precision():
    x = random_tokens(torch.bfloat16).requires_grad_()
    upstream = torch.ones_like(x)
    (got,) = torch.autograd.grad(fake_quantize_activations(x, 4, False), x, upstream)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0, 0], upstream[0, 0])
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["tiny", "small", "huge", "largest", "positive", "negative", "zero", "outlier"])
def test_the_ends_of_what_a_dtype_holds(kind, bits, symmetric, dtype):
    """Within a step of the ideal grid, and finite, however small or large the weights of a row are."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight /= weight.abs().amax(1, keepdim=True)
    weight = {
        "tiny": weight * 1e-7,
        "small": weight * 1e-4,
        "huge": weight * 6e4,
        "largest": weight.sign() * 65504,
        "positive": weight.abs() * 65504,
        "negative": -weight.abs() * 65504,
        "zero": weight * 0,
        "outlier": torch.cat([weight[:, :1] * 6e4, weight[:, 1:] * 1e-5], 1),
    }[kind]
    weight = weight.to(dtype).float()
    stored = round_to_nearest(weight, Scheme(bits, None, symmetric), dtype)
    value = dequantize(stored, Scheme(bits, None, symmetric))
    assert (stored.scale > 0).all()
    assert value.to(dtype).isfinite().all()
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = (2 * torch.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
    assert ((value - weight).abs().amax(1) <= 1.15 * step).all()
