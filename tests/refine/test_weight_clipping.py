"""Where the clipping starts: the share with the least error, weighted by what the inputs are."""

import pytest
import torch

from sliderquant.planning.settings import Settings
from sliderquant.quantizer.grids import clipped_grid, dequantize, in_groups, quantize, round_to_nearest
from sliderquant.quantizer.search import search_clipping
from sliderquant.refine.linear import RefinedLinear, generator_for
from sliderquant.refine.scales import ChannelScale, Spread
from sliderquant.refine.weight_clipping import start_from_search
from sliderquant.schemes import Scheme


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(weight, logits, importance, scheme):
    """Of each group, in fp64."""
    grid = clipped_grid(weight, logits, logits, scheme, torch.bfloat16)
    value = dequantize(quantize(weight, grid, scheme, torch.bfloat16), scheme)
    return in_groups((value - weight).double().square() * importance.double(), scheme).sum(-1)


@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(3, 32, symmetric=True), Scheme(4, 64)], ids=str)
def test_no_share_that_is_tried_is_better(scheme):
    weight, importance = normal(12, 128), normal(128, seed=1).square()
    found = search_clipping(weight, importance, scheme, torch.bfloat16)
    assert found.shape == (12, scheme.groups(128))
    best = errors(weight, found, importance, scheme)
    for share in (0.982, 0.96, 0.8, 0.6, 0.4, 0.24):
        other = errors(weight, torch.full_like(found, share).logit(), importance, scheme)
        assert (best <= other * (1 + 1e-5)).all()
    assert found.sigmoid().min() < 0.9 or scheme.bits == 4
    assert found.sigmoid().max() <= 0.983


def test_importance_decides():
    """An outlier that no input ever multiplies is clipped; one that matters is not."""
    weight = normal(1, 64) * 0.1
    weight[0, 5] = 3.0
    importance = torch.ones(64)
    importance[5] = 0
    scheme = Scheme(3)
    clipped = search_clipping(weight, importance, scheme, torch.float32).sigmoid().item()
    importance[5] = 1e4
    kept = search_clipping(weight, importance, scheme, torch.float32).sigmoid().item()
    assert clipped < 0.4
    assert kept > 0.9


@pytest.mark.parametrize("scaled", [False, True])
def test_it_looks_at_what_comes_in(scaled):
    scheme = Scheme(2)
    linear = RefinedLinear(normal(8, 64), None, scheme, torch.bfloat16, Settings(), generator_for(0, "x"))
    linear.quantized = False
    x = normal(2, 5, 64, seed=3) * normal(64, seed=4).exp()
    alpha = torch.ones(64)
    if scaled:
        scale = ChannelScale(64, True, torch.device("cpu"))
        alpha = normal(64, seed=5).exp()
        scale.start(alpha)
        linear.column = Spread(scale)
    with start_from_search({"linear": linear}):
        for sample in x:
            linear(sample[None])
    want = search_clipping(linear.weight * alpha, x.square().mean((0, 1)) / alpha**2, scheme, torch.bfloat16)
    for logits in (linear.clip_low, linear.clip_high):
        assert ((logits - want).abs() > 1e-4).sum() <= 1
    rtn = dequantize(round_to_nearest(linear.weight * alpha, scheme, torch.bfloat16), scheme)
    linear.quantized = True

    def error(weight):
        return ((x / alpha) @ (weight - linear.weight * alpha).T).norm()

    assert error(linear.effective_weight()) < 0.8 * error(rtn)
