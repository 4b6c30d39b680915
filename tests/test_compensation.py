"""Where the offsets of weights start with compensated rounding: merged at once, it is GPTQ on the same grid."""

import pytest
import torch
from torch import nn

from sliderquant.baselines.gptq import gptq
from sliderquant.compensation import input_grams, start_from_compensation
from sliderquant.methods import Settings
from sliderquant.quantizer import clipped_grid
from sliderquant.refine import RefinedLinear, generator_for
from sliderquant.scales import ChannelScale, Spread
from sliderquant.schemes import Scheme

SETTINGS = Settings(weights=True, grid="free", rank=0, clipping_start=1.5, weights_start="compensated")


def make(scheme, seed, out_features=24, in_features=64):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return RefinedLinear(weight, None, Scheme.parse(scheme), torch.float32, SETTINGS, generator_for(seed, "layer"))


def correlated(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) @ torch.randn(shape[-1], shape[-1], generator=generator)


def test_linears_that_share_an_input_share_its_gram():
    linears = {name: make("W2A16", seed) for seed, name in enumerate(("q", "k", "o"))}
    x, other = correlated(2, 5, 64), correlated(2, 5, 64, seed=1)
    with input_grams(linears, (("q", "k"), ("absent",))) as grams:
        for linear in linears.values():
            linear.quantized = False
        for batch in (x, other):
            linears["q"](batch[:1])
            linears["k"](batch[:1])
        linears["o"](other)
    rows = torch.cat((x[0], other[0]))
    torch.testing.assert_close(grams["q"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert grams["k"] is grams["q"]
    torch.testing.assert_close(grams["o"], other[0].T @ other[0] + other[1].T @ other[1], rtol=1e-4, atol=1e-3)
    assert not linears["q"]._forward_pre_hooks


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-g32", "W4A16-sym"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_start_is_what_gptq_rounds(scheme, scaled):
    linear, x = make(scheme, 3), correlated(200, 64)
    gram, weight = x.T @ x, linear.weight
    if scaled:
        scale = ChannelScale(64, True, torch.device("cpu"))
        alpha = torch.linspace(0.5, 2, 64)
        scale.start(alpha)
        linear.column = Spread(scale)
        weight, gram = weight * alpha, gram / alpha / alpha[:, None]
    clips = (linear.clip_low.detach().clone(), linear.clip_high.detach().clone())
    grid = clipped_grid(weight, *clips, linear.scheme, torch.float32)
    want = gptq(weight, gram, linear.scheme, torch.float32, grid=grid).stored
    nearest = linear.merge()[0]
    linear.start()
    start_from_compensation({"linear": linear}, {"linear": x.T @ x})
    got = linear.merge()[0]
    # The grid went through a logarithm: a code at the middle between two may fall either way.
    assert (got.codes != want.codes).float().mean() < 0.01
    assert (got.codes != nearest.codes).float().mean() > 0.1

    def error(stored):
        centre = linear.scheme.offset if stored.zero_point is None else stored.zero_point.float()[..., None]
        groups = stored.scale.shape[1]
        value = (stored.codes.view(24, groups, -1).float() - centre) * stored.scale[..., None]
        difference = value.view(24, 64) - weight
        return (difference @ gram * difference).sum().item()

    assert error(got) < 0.7 * error(nearest)


def test_the_setting_needs_offsets():
    with pytest.raises(ValueError, match="needs weights=true"):
        Settings(weights_start="compensated")
    assert isinstance(make("W2A16", 0).offset, nn.Parameter)
