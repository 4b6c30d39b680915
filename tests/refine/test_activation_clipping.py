"""The factors of a site: learned, stored, read again."""

import pytest
import torch
from torch import nn

from sliderquant.checkpoint.clips import clip_from, clip_tensor
from sliderquant.errors import CheckpointError
from sliderquant.modules import AttentionRounding
from sliderquant.planning.methods import METHODS
from sliderquant.planning.settings import Settings
from sliderquant.quantizer.fake_quantize import fake_quantize_activations
from sliderquant.refine.activation_clipping import ActivationClipping
from sliderquant.refine.attention import LearnedRounding
from sliderquant.refine.layer import learned_parameters, learned_state, restore_learned
from sliderquant.refine.linear import RefinedLinear, generator_for
from sliderquant.refine.shared import SharedInput
from sliderquant.schemes import ModelScheme, Scheme
from sliderquant_kernels import quantize_activations


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def layer_of_two(start=1.5):
    """Two linears that read one input."""
    shared = SharedInput(2, ActivationClipping(start))
    linears = [
        RefinedLinear(weight, None, Scheme.parse("W4A4"), torch.bfloat16, Settings(), generator_for(2, i), shared)
        for i, weight in enumerate(normal(2, 24, 64))
    ]
    return nn.ModuleDict({"first": linears[0], "second": linears[1]})


def test_what_is_stored_is_what_is_multiplied_with():
    clipping = ActivationClipping(4.0)
    with torch.no_grad():
        clipping.low.fill_(1.2345678)
    clip = clip_from(clipping.stored(), "x.input_clip")
    assert clip[0] == clipping()[0].item()
    assert clip[1] == torch.tensor(4.0).sigmoid().item()
    assert torch.equal(clip_tensor(clip), clipping.stored())
    x = normal(100, 64)
    want = quantize_activations(x, 4, False, clip=clip).dequantize()
    assert torch.equal(fake_quantize_activations(x, 4, False, clip=clipping()), want)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([0.5, 0.5], dtype=torch.float16), r"a\.input_clip is float16 \[2\], expected float32 \[2\]"),
        (torch.tensor([0.5]), r"a\.input_clip is float32 \[1\], expected float32 \[2\]"),
        (torch.tensor([0.5, 1.5]), r"a\.input_clip is \[0\.5, 1\.5\], expected two factors above 0 and at most 1"),
        (torch.tensor([0.0, 1.0]), "expected two factors above 0 and at most 1"),
        (torch.tensor([float("nan"), 1.0]), "expected two factors above 0 and at most 1"),
    ],
)
def test_damaged_tensors(tensor, message):
    with pytest.raises(CheckpointError, match=message):
        clip_from(tensor, "a.input_clip")


def test_linears_that_share_an_input_share_its_clipping():
    layer, x = layer_of_two(), normal(9, 64)
    found = learned_parameters(layer)["activation_clipping"]
    assert len(found) == 2
    rounded = layer["first"].effective_input(x)
    assert layer["second"].effective_input(x) is rounded
    factor = torch.tensor(1.5).sigmoid().item()
    assert torch.equal(rounded, quantize_activations(x, 4, False, clip=(factor, factor)).dequantize())
    (layer["first"](x) + layer["second"](x)).square().sum().backward()
    assert all(parameter.grad.abs() > 0 for parameter in found.values())


def test_a_stage_clips_the_range_of_the_channels_that_pass():
    layer, x = layer_of_two(), normal(9, 64)
    layer["first"].fraction = 0.5
    factor = torch.tensor(1.5).sigmoid().item()
    got = layer["first"].effective_input(x)
    want = quantize_activations(x[:, :32], 4, False, clip=(factor, factor)).dequantize()
    assert torch.equal(got[:, :32], want)
    assert torch.equal(got[:, 32:], x[:, 32:])


def test_the_state_of_what_is_learned():
    layer = layer_of_two()
    start = learned_state(layer)
    found = learned_parameters(layer)["activation_clipping"]
    with torch.no_grad():
        for parameter in found.values():
            parameter.fill_(-1.0)
    restore_learned(layer, start)
    assert all(parameter == 1.5 for parameter in found.values())
    assert found.keys() <= start.keys()


def test_attention_learns_a_clipping_of_each():
    x, plain = normal(2, 3, 5, 16), AttentionRounding(4, None, None, None, "cache")
    rounding = LearnedRounding(plain, compiled=False, clip_start=2.0)
    sites = {"query": rounding.query, "key": rounding.key, "value": rounding.value}
    with torch.no_grad():
        without = [site(x) for site in sites.values()]
    found = learned_parameters(rounding)["activation_clipping"]
    assert len(found) == 6
    for (name, site), wanted in zip(sites.items(), without, strict=True):
        out = site(x)  # x takes no gradient: the clipping does
        assert torch.equal(out, wanted)
        assert not torch.equal(out, plain.query(x))
        gradients = torch.autograd.grad(out.square().sum(), list(found.values()), allow_unused=True)
        reached = {key for key, gradient in zip(found, gradients, strict=True) if gradient is not None}
        assert reached == {f"learned_clips.{name}.low", f"learned_clips.{name}.high"}


def test_which_schemes_have_one():
    def clips(choice, scheme, rotates_online=False):
        return Settings(activation_clipping=choice).clips_activations(ModelScheme.parse(scheme), rotates_online)

    schemes = ("W4A16", "W8A8", "W4A8KV8", "W4A16KV8", "W4A4", "W4A8KV4", "W4A16KV4", "W4A4KV4")
    assert [clips("auto", scheme) for scheme in schemes] == [False] * 5 + [True] * 3
    assert [clips("auto", scheme, True) for scheme in schemes] == [False] * 4 + [True] * 4
    assert [clips("always", scheme) for scheme in schemes] == [False] + [True] * 7
    assert not any(clips("never", scheme) for scheme in schemes)
    for name, method in METHODS.items():
        for scheme in ("W4A4KV4", "W4A16KV4"):
            settings = method.settings_for(ModelScheme.parse(scheme))
            found = isinstance(settings, Settings) and settings.clips_activations(ModelScheme.parse(scheme), False)
            assert found == (name == "sliderquant" and scheme == "W4A4KV4"), name
