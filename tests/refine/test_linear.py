import pytest
import torch

from sliderquant.planning.settings import Settings
from sliderquant.quantizer.fake_quantize import fake_quantize, fake_quantize_activations
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.refine.fused import adjacent
from sliderquant.refine.layer import learned_state, refined_linears, restore_learned
from sliderquant.refine.linear import RefinedLinear, WeightGroup, generator_for
from sliderquant.refine.shared import SharedInput
from sliderquant.refine.weights import refined_weight
from sliderquant.schemes import Scheme


def make(scheme="W3A16-g32", out_features=24, in_features=64, bias=True, group=None, **settings):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(3))
    return RefinedLinear(
        weight,
        torch.randn(out_features) if bias else None,
        Scheme.parse(scheme),
        torch.bfloat16,
        Settings(**settings),
        generator_for(2, "layer"),
        group=group,
    )


def test_without_the_quantizer_it_is_the_original_layer():
    linear, x = make(), torch.randn(5, 64)
    linear.quantized = False
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_nothing_learned_and_no_clipping_is_round_to_nearest():
    linear = make(rank=0, clipping=False)
    stored, trained = linear.merge()
    expected = round_to_nearest(linear.weight, linear.scheme, torch.bfloat16)
    assert torch.equal(stored.codes, expected.codes)
    assert torch.equal(trained, dequantize(expected, linear.scheme))


def test_the_low_rank_term_starts_at_zero_and_is_scaled_by_its_rank():
    linear = make(rank=4)
    assert torch.equal(refined_weight(linear.learned_weight()), linear.weight)
    assert linear.low_rank_a.abs().max() <= 1 / 64**0.5  # Kaiming-uniform, a = sqrt(5)
    assert linear.low_rank_a.std().item() == pytest.approx(1 / (3 * 64) ** 0.5, rel=0.15)
    with torch.no_grad():
        linear.low_rank_b.normal_()
    expected = linear.weight + linear.low_rank_b @ linear.low_rank_a / 4
    assert torch.allclose(refined_weight(linear.learned_weight()), expected, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_stage_quantizes_the_first_channels_only(fraction):
    linear = make()
    with torch.no_grad():
        linear.low_rank_b.normal_()
    full = linear.effective_weight()
    linear.fraction = fraction
    passed = round(64 * fraction)
    weight = linear.effective_weight()
    assert torch.equal(weight[:, :passed], full[:, :passed])
    assert torch.equal(weight[:, passed:], refined_weight(linear.learned_weight())[:, passed:])
    if fraction < 1:
        assert not torch.equal(weight, full)


def test_a_stage_per_channel_has_the_range_of_the_channels_that_pass():
    linear = make("W3A16")
    linear.fraction = 0.5
    want = fake_quantize(linear.weight[:, :32], linear.clip_low, linear.clip_high, linear.scheme, torch.bfloat16)
    assert torch.equal(linear.effective_weight()[:, :32], want)
    assert torch.equal(linear.effective_weight()[:, 32:], linear.weight[:, 32:])


def test_frozen_computes_the_same_and_forgets_afterwards():
    linear, x = make(), torch.randn(5, 64)
    before = linear(x)
    with linear.frozen():
        assert torch.equal(linear(x), before)
        with torch.no_grad():
            linear.clip_low.fill_(-1)
        assert torch.equal(linear(x), before)
    assert not torch.equal(linear(x), before)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-g32-sym", "W4A16-g64", "W8A16"])
def test_the_merge_is_what_was_trained(scheme):
    linear = make(scheme)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    stored, trained = linear.merge()
    assert torch.equal(trained, linear.effective_weight())
    assert torch.equal(dequantize(stored, linear.scheme), trained)


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.usefixtures("compiler")
def test_what_a_compiled_group_computes_is_merged(rank):
    group = WeightGroup()
    linears = [make("W2A16", out_features, group=group, rank=rank) for out_features in (24, 8, 16)]
    originals = [linear.weight.clone() for linear in linears]
    for linear in linears:
        linear.compiled = True
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.normal_()
    for linear, original in zip(linears, originals, strict=True):
        assert torch.equal(linear.effective_weight(), linear.merge()[1])
        assert torch.equal(linear.weight, original)
    assert adjacent([linear.weight for linear in linears])


def test_everything_learned_gets_a_gradient_and_the_weight_none():
    linear = make()
    with torch.no_grad():
        linear.low_rank_b.normal_(0, 0.01)
    linear(torch.randn(6, 64)).square().sum().backward()
    assert {name for name, _ in linear.named_parameters()} == {"low_rank_a", "low_rank_b", "clip_low", "clip_high"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in linear.parameters())


def test_learned_and_restore():
    linear = make()
    kept = learned_state(linear)
    assert set(kept) == {".low_rank_a", ".low_rank_b", ".clip_low", ".clip_high"}
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(1)
    restore_learned(linear, kept)
    assert all(torch.equal(parameter, kept[f".{name}"]) for name, parameter in linear.named_parameters())


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-g32-sym", "W4A16-g64"])
def test_offsets_and_free_grids_count_from_the_start(scheme):
    linear = make(scheme, weights=True, grid="free", rank=0, clipping_start=1.0)
    before = linear.effective_weight()
    assert linear.step is None
    linear.start()
    # What is learned starts with the values that were there, but for the rounding of exp(log(sigmoid)).
    assert (linear.effective_weight() - before).norm() < 0.01 * before.norm()
    scale = linear.merge()[0].scale.float()
    torch.testing.assert_close(linear.step, scale.mean(1))
    with torch.no_grad():
        linear.offset.fill_(1)
    codes, moved = (make_codes(linear, shift) for shift in (0, 1))
    assert torch.equal(moved, codes)
    assert torch.equal(linear.merge()[0].scale.float(), scale)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(0, 0.5)
    stored, trained = linear.merge()
    assert torch.equal(trained, linear.effective_weight())
    assert torch.equal(dequantize(stored, linear.scheme), trained)


def make_codes(linear, shift):
    """With every weight one step of its row higher, by V or in the weight itself."""
    with torch.no_grad():
        linear.offset.fill_(1 - shift)
        weight = linear.weight.clone()
        linear.weight += shift * linear.step[:, None]
        codes = linear.merge()[0].codes
        linear.weight.copy_(weight)
    return codes


def test_learned_and_restore_of_what_counts_from_the_start():
    linear, other = (make(weights=True, grid="free") for _ in range(2))
    linear.start()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(0.1)
    kept = learned_state(linear)
    assert {".offset", ".step", ".low", ".high"} < set(kept)
    restore_learned(other, kept)
    assert torch.equal(other.effective_weight(), linear.effective_weight())
    other.step.fill_(3)
    assert not torch.equal(kept[".step"], other.step)


def test_generators_depend_on_the_seed_and_the_name_alone():
    def draw(*what):
        return torch.rand(3, generator=generator_for(*what)).tolist()

    assert draw(2, "a") == draw(2, "a")
    assert draw(2, "a") != draw(3, "a")
    assert draw(2, "a") != draw(2, "b")


def test_refined_linears_are_found_by_name():
    module = torch.nn.ModuleDict({"inner": torch.nn.Sequential(make()), "other": torch.nn.Linear(2, 2)})
    assert list(refined_linears(module)) == ["inner.0"]


def test_a_layer_that_is_quantized_rounds_its_input():
    linear, x = make("W4A4-g32"), torch.randn(5, 64) * 2
    rounded = fake_quantize_activations(x, linear.scheme.activation_bits, linear.scheme.activation_symmetric)
    expected = torch.nn.functional.linear(rounded, linear.effective_weight(), linear.bias)
    assert not torch.equal(rounded, x)
    assert torch.equal(linear(x), expected)
    with linear.frozen():
        assert torch.equal(linear(x), expected)
    linear.quantized = False
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_stage_rounds_the_first_channels_of_the_input_only(fraction):
    linear, x = make("W4A4-act-sym"), torch.randn(5, 64)
    x[:, -1] = 100  # is not in the range of the channels that pass
    linear.fraction = fraction
    passed = round(64 * fraction)
    got = linear.effective_input(x)
    assert torch.equal(got[:, :passed], fake_quantize_activations(x[:, :passed], 4, True))
    assert torch.equal(got[:, passed:], x[:, passed:])
    expected = torch.nn.functional.linear(got, linear.effective_weight(), linear.bias)
    assert torch.equal(linear(x), expected)


def test_the_gradient_reaches_the_layers_before():
    linear, x = make("W4A4"), torch.randn(5, 64, requires_grad=True)
    linear(x).square().sum().backward()
    assert x.grad.norm() > 0
    assert linear.low_rank_b.grad.norm() > 0


def test_an_input_is_rounded_once_for_all_that_read_it(monkeypatch):
    import sliderquant.refine.shared as module

    calls = []

    def counted(*arguments):
        calls.append(arguments[0])
        return fake_quantize_activations(*arguments)

    monkeypatch.setattr(module, "fake_quantize_activations", counted)
    shared, scheme = SharedInput(3), Scheme.parse("W4A4")
    x, other = torch.randn(4, 64), torch.randn(4, 64)
    first = shared.rounded(x, scheme, 1.0, False)
    assert torch.equal(first, fake_quantize_activations(x, 4, False))
    assert shared.rounded(x, scheme, 1.0, False) is first
    assert torch.equal(shared.rounded(other, scheme, 1.0, False), fake_quantize_activations(other, 4, False))
    assert len(calls) == 2
    for _ in range(2):
        shared.rounded(other, scheme, 1.0, False)
    assert len(calls) == 2
    # The last of three has taken it: nothing is kept, and nothing is stale.
    assert shared._kept is None
    shared.rounded(other, scheme, 1.0, False)
    assert len(calls) == 3
    assert torch.equal(shared.rounded(other, scheme, 0.5, False)[:, 32:], other[:, 32:])
