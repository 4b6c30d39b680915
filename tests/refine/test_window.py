import dataclasses
import math

import pytest
import torch
from torch import nn

from sliderquant.calibration.layerwise import RunningLayer
from sliderquant.calibration.streams import ActivationStream
from sliderquant.errors import SliderQuantError
from sliderquant.modules import AttentionRounding
from sliderquant.planning.precision import matmul_dtype
from sliderquant.planning.settings import Settings
from sliderquant.refine.layer import learned_state
from sliderquant.refine.linear import RefinedLinear, generator_for
from sliderquant.refine.window import Stage, WindowLayers, divergence, squared_error, train_stage
from sliderquant.schemes import Scheme

CPU = torch.device("cpu")
LEARNABLES = [
    {},
    {"weights": True, "grid": "free", "rank": 0},
    {"weights": True, "hardening": True, "grid": "free", "rank": 0},
]
SAMPLES, SEQLEN, HIDDEN = 7, 8, 32


class Layer(nn.Module):
    """A stand-in for a decoder layer: a refined linear with a residual; `poison` makes chosen calls not finite."""

    def __init__(self, settings, number, poison=lambda call: 1.0):
        super().__init__()
        weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(number)) / HIDDEN**0.5
        self.linear = RefinedLinear(weight, None, Scheme(2), torch.bfloat16, settings, generator_for(0, number))
        self.calls, self.poison = 0, poison

    def forward(self, hidden, gain):
        if self.training_call():
            hidden = hidden * self.poison(self.calls)
        return hidden + gain * self.linear(hidden)

    def training_call(self):
        self.calls += torch.is_grad_enabled()
        return torch.is_grad_enabled()


def window(settings, layers=2, poison=lambda call: 1.0):
    made = [Layer(settings, i, poison) for i in range(layers)]
    for layer in made:
        layer.linear.start()
    return WindowLayers([RunningLayer(None, layer, {"gain": 1.0}) for layer in made])


def streams(layers):
    inputs = ActivationStream(SAMPLES, SEQLEN, HIDDEN, memory_limit=1e9)
    inputs.fill(torch.randn(SAMPLES, 1, SEQLEN, HIDDEN, generator=torch.Generator().manual_seed(9)))
    targets = inputs.like()
    layers.set(quantized=False)
    layers.walk(inputs, 3, CPU, into=targets)
    return inputs, targets


def stage(layers, settings, epochs=6, seed=2):
    inputs, targets = streams(layers)
    return Stage(layers, inputs, targets, 1.0, epochs, settings, seed, "[0]", CPU)


def train(layers, settings, epochs=6, seed=2):
    steps = []
    result = train_stage(stage(layers, settings, epochs, seed), lambda n, loss: steps.append((n, loss)))
    return result, steps


def state(layers):
    return [tensor for layer in layers.layers for tensor in learned_state(layer.module).values()]


def test_training_reduces_the_loss_and_reports_each_epoch():
    settings = Settings(matmul="float32")
    layers = window(settings)
    result, steps = train(layers, settings, epochs=40)
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert [count for count, _ in steps] == [3] * 40  # 7 samples in batches of 3
    assert [loss for _, loss in steps] == result.losses
    assert (result.retries, result.rate_scale, result.converged) == (0, 1.0, True)


def test_offsets_harden_while_a_window_is_trained():
    def share_that_stays(hardening):
        settings = Settings(matmul="float32", weights=True, hardening=hardening, grid="free", rank=0)
        layers, seen = window(settings), []

        def kept(*_):
            seen.append(torch.cat([layer.module.linear.offset.detach().flatten().clone() for layer in layers.layers]))

        train_stage(stage(layers, settings, epochs=10), kept)  # 30 steps
        return [(seen[epoch] == seen[-1]).float().mean() for epoch in (2, 3, 5, 7)]  # 4 after steps 12, 18 and 24

    assert share_that_stays(False) == [0, 0, 0, 0]
    before, *after = share_that_stays(True)
    assert before < 0.01
    assert all(share >= wanted for share, wanted in zip(after, (0.4, 0.7, 0.9), strict=True))


def test_the_walk_without_the_quantizer_is_the_full_precision_window():
    layers = window(Settings(matmul="float32"))
    inputs, targets = streams(layers)
    hidden = inputs.data.clone()
    for layer in layers.layers:
        hidden = hidden + hidden @ layer.module.linear.weight.T
    assert torch.allclose(targets.data, hidden, atol=1e-5)


def test_attention_is_rounded_only_when_the_window_is_quantized():
    layers = window(Settings())
    for layer in layers.layers:
        layer.module.rounding = AttentionRounding(4, None, None, None, "cache")
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(1))
    for quantized in (False, True):
        layers.set(quantized=quantized)
        assert [torch.equal(layer.module.rounding.query(x), x) for layer in layers.layers] == [not quantized] * 2


@pytest.mark.parametrize("learnables", LEARNABLES, ids=["low rank", "every weight", "hardening"])
def test_same_seed_same_bits_and_another_seed_others(learnables):
    settings = Settings(matmul="float32", **learnables)
    runs = []
    for seed in (2, 2, 3):
        layers = window(settings)
        train(layers, settings, epochs=2, seed=seed)
        runs.append(state(layers))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("learnables", LEARNABLES, ids=["low rank", "every weight", "hardening"])
def test_a_non_finite_loss_rolls_back_halves_the_rates_and_tries_again(learnables):
    settings = Settings(matmul="float32", retries=4, **learnables)
    layers = window(settings, layers=1, poison=lambda call: float("nan") if call in (2, 7) else 1.0)
    result, _ = train(layers, settings)
    assert (result.retries, result.rate_scale, result.converged) == (2, 0.25, True)
    assert len(result.losses) == 6
    # The same as a run that starts with a quarter of the rates: nothing of the failed attempts is left.
    quarter = settings.model_copy(
        update={
            "learning_rates": settings.learning_rates.model_copy(
                update={name: rate / 4 for name, rate in settings.learning_rates.model_dump().items()}
            )
        }
    )
    clean = window(quarter, layers=1)
    train(clean, quarter)
    assert all(torch.equal(a, b) for a, b in zip(state(layers), state(clean), strict=True))


def test_a_window_that_never_works_is_left_as_it_was():
    settings = Settings(matmul="float32", retries=2)
    layers = window(settings, layers=1, poison=lambda call: float("inf"))
    before = state(layers)
    result, _ = train(layers, settings)
    assert (result.retries, result.converged) == (2, False)
    assert all(torch.equal(a, b) for a, b in zip(before, state(layers), strict=True))


def test_activations_that_are_not_finite_are_an_error():
    settings = Settings(matmul="float32", retries=0)
    layers = window(settings, layers=1)
    poisoned = stage(layers, settings)
    poisoned.inputs.data[0, 0, 0] = float("nan")
    with pytest.raises(SliderQuantError, match=r"window \[0\]: the loss is not finite even before training"):
        train_stage(poisoned, lambda n, loss: None)


def test_nothing_to_learn_is_no_error():
    settings = Settings(matmul="float32", rank=0, clipping=False)
    layers = window(settings)
    result, _ = train(layers, settings)
    assert len(set(result.losses)) == 1


def test_matmul_dtype_follows_the_setting():
    assert matmul_dtype(Settings(matmul="bfloat16"), CPU, 8) == torch.bfloat16
    assert matmul_dtype(Settings(matmul="float32"), CPU, 4096) == torch.float32


@pytest.mark.parametrize(
    ("units", "dtype"),
    [
        ({}, torch.float32),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, torch.float32),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, torch.bfloat16),
        ({"_is_amx_tile_supported": True}, torch.bfloat16),
    ],
)
def test_a_cpu_multiplies_in_bfloat16_where_it_has_units_for_it(monkeypatch, units, dtype):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, found in units.items():
        monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
    assert matmul_dtype(Settings(), CPU, 512) == dtype
    assert matmul_dtype(Settings(), CPU, 511) == torch.float32


@pytest.mark.parametrize("relative", [0.0, 0.25, 1.0])
def test_errors_are_weighted_by_the_energy_of_the_token(relative):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 5, 8, generator=generator)
    targets[:, 0] *= 1000  # a token that collects attention
    out = (targets * (1 + 0.01 * torch.randn(2, 5, 8, generator=generator))).requires_grad_()
    loss = squared_error(out, targets, relative)
    errors = [((o - t) ** 2).mean().item() for o, t in zip(out.flatten(0, 1), targets.flatten(0, 1), strict=True)]
    weights = [(t**2).mean().item() ** -relative for t in targets.flatten(0, 1)]
    want = sum(e * w for e, w in zip(errors, weights, strict=True)) / sum(weights)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, out)
    shares = gradient.flatten(0, 1).norm(dim=1) / gradient.norm()
    assert (shares[[0, 5]].square().sum() > 0.9) == (relative < 1)  # nearly all of it is that token's


def test_a_token_of_zeros_has_a_finite_weight():
    targets = torch.zeros(1, 3, 4)
    targets[0, 1] = 1
    out = targets.clone().requires_grad_()
    loss = squared_error(out, targets, 1.0)
    (gradient,) = torch.autograd.grad(loss, out)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_divergence_is_the_kl_of_the_two_distributions():
    logits, wanted = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(2, 3, 5)
    p, q = wanted.softmax(-1), logits.softmax(-1)
    want = (p * (p / q).log()).sum(-1).mean()
    assert divergence(logits, wanted).item() == pytest.approx(want.item(), rel=1e-5)
    assert divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_a_window_may_match_what_is_made_of_its_output():
    """The head sees a few directions alone: the error in these falls further than by matching all of the output."""
    settings = Settings(matmul="float32", weights=True, rank=0)
    head = torch.randn(HIDDEN, 6, generator=torch.Generator().manual_seed(5))

    def trained(output):
        layers = window(settings)
        inputs, targets = streams(layers)
        job = Stage(layers, inputs, targets, 1.0, 30, settings, 2, "[0]", CPU, output)
        result = train_stage(job, lambda steps, loss: None)
        with torch.no_grad():
            return result.losses, divergence(layers(inputs.data) @ head, targets.data @ head).item()

    (losses, of_logits), (_, of_hidden) = trained(lambda hidden: hidden @ head), trained(None)
    assert losses[-1] < 0.5 * losses[0]
    assert of_logits < of_hidden


@pytest.mark.parametrize(("epochs", "batch_size"), [(10, 3), (40, 3), (20, 1)])
def test_offsets_alone_decay(epochs, batch_size):
    """With nothing to learn from, an offset goes back towards 0, equally far in however many steps, and the clipping
    stays where it is."""
    settings = Settings(matmul="float32", weights=True, weights_decay=0.7, rank=0, batch_size=batch_size)
    layers = window(settings, layers=1)
    linear = layers.layers[0].module.linear
    job = dataclasses.replace(stage(layers, settings, epochs=epochs), output=lambda hidden: hidden * 0)
    with torch.no_grad():
        linear.offset.fill_(0.5)
    clipping = linear.clip_low.detach().clone()
    train_stage(job, lambda steps, loss: None)
    torch.testing.assert_close(linear.offset, torch.full_like(linear.offset, 0.5 * math.exp(-0.7)), rtol=0.02, atol=0)
    assert torch.equal(linear.clip_low, clipping)


def test_offsets_do_not_decay_beyond_zero():
    settings = Settings(matmul="float32", weights=True, weights_decay=50.0, rank=0, batch_size=64)
    layers = window(settings, layers=1)
    job = dataclasses.replace(stage(layers, settings, epochs=1), output=lambda hidden: hidden * 0)
    with torch.no_grad():
        layers.layers[0].module.linear.offset.fill_(0.5)
    train_stage(job, lambda steps, loss: None)
    assert layers.layers[0].module.linear.offset.abs().max() < 1e-6


def test_offsets_with_a_rate_of_zero_do_not_decay():
    settings = Settings(matmul="float32", weights=True, weights_decay=0.7, rank=0, learning_rates={"weights": 0})
    layers = window(settings, layers=1)
    with torch.no_grad():
        layers.layers[0].module.linear.offset.fill_(0.5)
    assert train_stage(stage(layers, settings, epochs=2), lambda steps, loss: None).converged
    assert (layers.layers[0].module.linear.offset == 0.5).all()
