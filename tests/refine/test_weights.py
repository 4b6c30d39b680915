"""Effective weights of several linears at once: against one at a time, composed of plain operations and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant.quantizer.fake_quantize import fake_quantize
from sliderquant.quantizer.grids import in_groups
from sliderquant.refine import weights as refined_weights
from sliderquant.refine.weights import LearnedWeight, effective_weights, refined_weight
from sliderquant.schemes import Scheme

SCHEMES = (Scheme(2), Scheme(3, 32), Scheme(4, 32, symmetric=True), Scheme(4, symmetric=True))


def make(out_features, in_features, scheme, rank=3, clipped=True, scaled=True, seed=0, offset=False, free=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    groups = scheme.groups(in_features)
    return LearnedWeight(
        normal(out_features, in_features),
        normal(rank, in_features).requires_grad_() if rank else None,
        (0.1 * normal(out_features, rank)).requires_grad_() if rank else None,
        normal(out_features, groups).requires_grad_() if clipped else None,
        normal(out_features, groups).requires_grad_() if clipped else None,
        (normal(in_features) * 0.3).exp().requires_grad_() if scaled else None,
        (normal(out_features) * 0.3).exp().requires_grad_() if scaled else None,
        normal(out_features, in_features).requires_grad_() if offset else None,
        normal(out_features).abs() if offset else None,
        -1 - normal(out_features, groups).abs() if free else None,
        1 + normal(out_features, groups).abs() if free else None,
    )


class StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes."""

    @staticmethod
    def forward(_, x):
        return x.round()

    @staticmethod
    def backward(_, grad):
        return grad


def clamped(x, low, high):
    """With a gradient also at the ends, which `torch.clamp` has before 2.14 alone."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def free_grid(refined, learned, scheme):
    """Rounding to a grid whose ends are parameters, from operations that autograd knows."""
    rows = in_groups(refined, scheme)
    bottom, top = learned.low * learned.clip_low.exp(), learned.high * learned.clip_high.exp()
    if scheme.symmetric:
        scale, zero = torch.maximum(-bottom, top) / (scheme.levels / 2), torch.tensor(float(scheme.offset))
        scale = scale + (scale.detach().bfloat16().float() - scale.detach())
    else:
        scale = (top - bottom) / scheme.levels
        scale = scale + (scale.detach().bfloat16().float() - scale.detach())
        zero = clamped(StraightThrough.apply(-bottom / scale), 0, scheme.levels)[..., None]
    codes = clamped(StraightThrough.apply(rows / scale[..., None]) + zero, 0, scheme.levels)
    return ((codes - zero) * scale[..., None]).view_as(refined)


def composed(learned, scheme, fraction):
    """One weight by the formulas, from operations that autograd knows, and `fake_quantize`."""
    refined = learned.weight
    if learned.column is not None:
        refined = refined * learned.column / learned.row[:, None]
    if learned.low_rank_a is not None:
        refined = refined + learned.low_rank_b @ learned.low_rank_a / len(learned.low_rank_a)
    if learned.offset is not None:
        refined = refined + learned.step[:, None] * learned.offset
    passed = round(fraction * refined.shape[1])
    part = refined[:, :passed] if scheme.group_size is None else refined
    if learned.low is None:
        value = fake_quantize(part, learned.clip_low, learned.clip_high, scheme, torch.bfloat16)
    else:
        value = free_grid(part, learned, scheme)
    return torch.cat((value[:, :passed], refined[:, passed:]), dim=1)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    scheme=st.sampled_from(SCHEMES),
    rank=st.integers(0, 3),
    clipped=st.booleans(),
    scaled=st.booleans(),
    offset=st.booleans(),
    free=st.booleans(),
    fraction=st.sampled_from([0.25, 0.5, 2 / 3, 1.0]),
    rows_at_once=st.integers(1, 40),
)
def test_values_and_gradients(sizes, groups, scheme, rank, clipped, scaled, offset, free, fraction, rows_at_once):
    clipped = clipped or free
    weights = [
        make(size, 32 * groups, scheme, rank, clipped, scaled, seed, offset, free) for seed, size in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        # Pieces of a weight, of several, and of parts of both.
        patch.setattr(refined_weights, "_ELEMENTS_AT_ONCE", rows_at_once * 32 * groups)
        check_values_and_gradients(weights, scheme, fraction)


def check_values_and_gradients(weights, scheme, fraction):
    got = effective_weights(weights, scheme, torch.bfloat16, fraction)
    want = [composed(weight, scheme, fraction) for weight in weights]
    inputs = [
        tensor for weight in weights for tensor in weight.tensors() if tensor is not None and tensor.requires_grad
    ]
    for one, other in zip(got, want, strict=True):
        # A code at the middle between two may fall either way.
        assert ((one - other).abs() > 1e-5).sum() <= 1
    if inputs:
        upstream = [torch.randn(one.shape, generator=torch.Generator().manual_seed(9)) for one in got]
        gradients = torch.autograd.grad(got, inputs, upstream)
        for one, other in zip(gradients, torch.autograd.grad(want, inputs, upstream), strict=True):
            assert one.shape == other.shape
            assert (one - other).norm() <= 1e-3 * other.norm() + 1e-5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refined_weight(scheme):
    weight = make(6, 64, scheme)
    want = weight.weight * weight.column / weight.row[:, None] + weight.low_rank_b @ weight.low_rank_a / 3
    torch.testing.assert_close(refined_weight(weight), want)
    plain = make(6, 64, scheme, rank=0, scaled=False)
    assert torch.equal(refined_weight(plain), plain.weight)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("scheme", "clipped", "free", "dtype"),
    [
        (Scheme(2), True, False, torch.float32),
        (Scheme(4, symmetric=True), False, False, torch.float32),
        (Scheme(3, 32), True, True, torch.bfloat16),
        (Scheme(4, 32, symmetric=True), True, False, torch.bfloat16),
    ],
    ids=str,
)
def test_compiled(scheme, clipped, free, dtype, fraction, monkeypatch):
    monkeypatch.setattr(refined_weights, "_ELEMENTS_AT_ONCE", 11 * 64)  # parts of weights
    weights = [make(size, 64, scheme, 4, clipped, False, size, False, free) for size in (9, 5, 16)]
    inputs = [tensor for weight in weights for tensor in weight.tensors() if tensor is not None]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for compiled in (False, True):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = effective_weights(weights, scheme, torch.bfloat16, fraction, compiled)
        upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in found]
        results.append((found, torch.autograd.grad(found, inputs, upstream)))
    (plain, gradients), (values, others) = results
    for got, want in zip(values, plain, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want)
    for got, want in zip(others, gradients, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.usefixtures("compiler")
def test_compiled_columns_that_do_not_pass():
    """They are the refined weight that is merged."""
    weight = make(9, 64, Scheme(2), 4, True, False)
    (value,) = effective_weights([weight], Scheme(2), torch.bfloat16, 0.5, compiled=True)
    assert torch.equal(value[:, 32:], refined_weight(weight)[:, 32:])
