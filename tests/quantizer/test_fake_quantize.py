"""Fake quantization compiled and uncompiled: the same bits. Values and gradients are tested with the quantizer."""

import pytest
import torch

from sliderquant.quantizer import fake_quantize as module
from sliderquant.quantizer.fake_quantize import fake_quantize, fake_quantize_activations
from sliderquant.schemes import Scheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(4, 32, symmetric=True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_weights(scheme, dtype):
    # Square, wide, with rows that lie apart, and a row of zeros.
    for weight in (normal(64, 64), normal(8, 128), normal(16, 128)[:, :64], torch.zeros(3, 64)):
        clips = [normal(len(weight), scheme.groups(weight.shape[1]), seed=i) for i in (1, 2)]
        upstream, results = normal(*weight.shape, seed=3), []
        for compiled in (False, True):
            inputs = [x.clone().requires_grad_() for x in (weight, *clips)]
            value = fake_quantize(*inputs, scheme, dtype, compiled)
            results.append((value, torch.autograd.grad(value, inputs, upstream)))
        (plain, gradients), (value, others) = results
        assert torch.equal(value, plain)
        for got, want in zip(others, gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(4, symmetric=True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_free_ends(scheme, dtype):
    rows, ends = normal(24, 64), [normal(24, seed=i) * 0.1 for i in (1, 2)]
    inputs = [rows, *ends, -normal(24, seed=4).abs(), normal(24, seed=5).abs()]
    grid = module.Grid(0, scheme.levels, scheme.symmetric, (scheme, dtype))
    results = []
    for compiled in (False, True):
        forward, gradients = module.grid_functions(grid, "free", compiled)
        value, *of_rows = forward(*inputs)
        results.append((value, gradients(normal(24, 64, seed=3), *inputs, *of_rows)))
    (plain, expected), (value, others) = results
    assert torch.equal(value, plain)
    for got, want in zip(others, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_activations(symmetric, dtype):
    for shape in ((3, 5, 64), (2, 4, 7, 8)):
        x, upstream, results = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype), []
        for compiled in (False, True):
            inputs = x.clone().requires_grad_()
            value = fake_quantize_activations(inputs, 4, symmetric, compiled)
            results.append((value, *torch.autograd.grad(value, inputs, upstream)))
        (plain, gradient), (value, other) = results
        assert value.dtype == dtype
        assert torch.equal(value, plain)
        torch.testing.assert_close(
            other.float(), gradient.float(), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_clipped_activations(symmetric, dtype):
    x, upstream, results = normal(7, 5, 64).to(dtype), normal(7, 5, 64, seed=1).to(dtype), []
    for compiled in (False, True):
        leaves = [leaf.requires_grad_() for leaf in (x.clone(), torch.tensor(0.93), torch.tensor(0.71))]
        value = fake_quantize_activations(leaves[0], 4, symmetric, compiled, tuple(leaves[1:]))
        results.append((value, torch.autograd.grad(value, leaves, upstream)))
    (plain, gradients), (value, others) = results
    assert torch.equal(value, plain)
    for got, want in zip(others, gradients, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-5)


def test_equal_ends_share_the_gradient():
    """Of the minimum: as that of `torch.amin`."""
    x = torch.tensor([[-2.0, -2.0, 1.0, 0.5]], requires_grad=True)
    upstream = torch.tensor([[0.3, 0.3, -0.2, 1.0]])
    (gradient,) = torch.autograd.grad(fake_quantize_activations(x, 4, False), x, upstream)
    assert gradient[0, 0] == gradient[0, 1]
    low = x.detach()[:, :1].clone().requires_grad_()
    other = torch.cat((low, low, x.detach()[:, 2:]), 1)
    (whole,) = torch.autograd.grad(fake_quantize_activations(other, 4, False), low, upstream)
    torch.testing.assert_close(gradient[:, :2].sum(), whole[0, 0])
    # A lone minimum next to it gets what both would.
    lone = torch.tensor([[-2.0, -1.999, 1.0, 0.5]], requires_grad=True)
    (single,) = torch.autograd.grad(fake_quantize_activations(lone, 4, False), lone, upstream)
    torch.testing.assert_close(single[:, :2].sum(), gradient[:, :2].sum(), rtol=1e-2, atol=1e-2)
