import json
from dataclasses import replace

import pytest

from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.schemes import ModelScheme, Scheme


def plan_for(model, scheme="W4A16-g32", method="sliderquant", samples=8, seqlen=32, **kwargs):
    chosen = METHODS[method]
    parsed = ModelScheme.parse(scheme)
    request = Request(model, parsed, chosen, chosen.settings, samples=samples, seqlen=seqlen, **kwargs)
    return make_plan(open_model(model), request)


def test_what_is_quantized_and_what_stays(tiny_llama):
    plan = plan_for(tiny_llama)
    assert len(plan.schemes) == 2 * 7
    assert plan.kept == ("model.embed_tokens.weight",)
    assert all(scheme == Scheme(4, 32) for scheme in plan.schemes.values())
    assert [str(window) for window in plan.windows] == ["[0..1]"]
    assert plan.steps == 1 * 8 * 3  # windows x epochs x batches of 3 in 8 samples
    json.dumps(plan.as_dict())


def test_a_method_without_learning_has_no_steps(tiny_llama):
    plan = plan_for(tiny_llama, method="rtn")
    assert (plan.windows, plan.steps) == ((), 0)


def test_a_group_that_does_not_divide_is_refused_with_what_works(tiny_llama):
    with pytest.raises(InputError) as caught:
        plan_for(tiny_llama, "W4A16-g64")  # down_proj has 96 inputs
    message = str(caught.value)
    assert "groups of 64 do not divide the inputs of mlp.down_proj (96 inputs)" in message
    assert "every layer of this model: g32" in message
    assert "W4A16" in message
    assert "--per-channel-fallback" in message


def test_the_fallback_takes_only_the_layers_that_do_not_fit(tiny_llama):
    plan = plan_for(tiny_llama, "W4A16-g64", per_channel_fallback=True)
    by_kind = {name.rpartition(".")[2]: str(scheme) for name, scheme in plan.schemes.items()}
    assert by_kind.pop("down_proj") == "W4A16"
    assert set(by_kind.values()) == {"W4A16-g64"}


def test_the_size_on_disk_is_what_the_checkpoint_takes(tiny_llama, tmp_path):
    import sliderquant
    from sliderquant.checkpoint import describe

    for scheme in ("W3A16-g32", "W4A16", "W2A16-g32-sym"):
        out = tmp_path / scheme
        result = sliderquant.quantize(tiny_llama, out, scheme=scheme, method="rtn")
        assert result.plan.disk_bytes == describe(out).total_bytes
        assert result.plan.bits_per_weight == pytest.approx(describe(out).quantized_bits_per_weight, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples 0: expected at least 1"),
        ({"seqlen": 1}, "seqlen 1: expected 2 to 128"),
        ({"seqlen": 129}, "seqlen 129: expected 2 to 128"),
    ],
)
def test_numbers_out_of_range(tiny_llama, arguments, message):
    with pytest.raises(InputError, match=message):
        plan_for(tiny_llama, **arguments)


def test_more_inputs_than_a_token_can_have(tiny_llama, monkeypatch):
    monkeypatch.setattr("sliderquant.planning.plan.MAX_K", 95)  # down_proj has 96
    assert plan_for(tiny_llama, "W4A16").schemes
    with pytest.raises(
        InputError, match=r"W4A4: .*down_proj has 96 inputs, and tokens are quantized up to 95: use W4A16"
    ):
        plan_for(tiny_llama, "W4A4")


def test_quantized_activations_take_memory_while_learning_and_none_on_disk(tiny_llama):
    plain, low_bit = plan_for(tiny_llama, "W4A16"), plan_for(tiny_llama, "W4A4")
    assert low_bit.memory_bytes > plain.memory_bytes
    assert low_bit.disk_bytes == plain.disk_bytes


def test_the_optimizer_holds_two_moments_of_what_is_learned_in_a_window(tiny_llama):
    weights, outputs = 64 * (64 + 32 + 32 + 64 + 3 * 96), 64 + 32 + 32 + 64 + 96 + 96 + 64
    inputs = 4 * 64 + 2 * 64 + 96
    plain = plan_for(tiny_llama, "W4A16", "sliderquant-published")
    longest = max(map(len, plain.windows))
    assert plain.optimizer_bytes == 8 * longest * (4 * (outputs + inputs) + 2 * outputs)
    every = plan_for(tiny_llama, "W4A16", "sliderquant")
    assert every.optimizer_bytes == 8 * longest * (weights + 2 * outputs)
    assert every.memory_bytes - plain.memory_bytes == (
        every.optimizer_bytes - plain.optimizer_bytes + 4 * longest * 2 * weights + 5 * longest * weights
    )
    # Without hardening no offset is kept in fp32, nor in a byte that it is.
    method = METHODS["sliderquant"]
    settings = method.settings.model_copy(update={"hardening": False})
    soft = make_plan(every.source, replace(every.request, settings=settings))
    assert every.memory_bytes - soft.memory_bytes == 5 * longest * weights
    assert plan_for(tiny_llama, "W4A16", "rtn").optimizer_bytes == 0


def test_one_shot_methods_take_memory_for_their_inputs_products(tiny_llama, random_model, tmp_path):
    plan = plan_for(tiny_llama, method="gptq")
    assert (plan.windows, plan.steps) == ((), 0)
    inputs, largest, weights, largest_weight = 3 * 64**2 + 96**2, 96**2, 64 * (64 + 32 + 32 + 64 + 3 * 96), 64 * 96
    batch = 4 * 32 * (16 * 64 + 5 * 96)
    assert plan.memory_bytes == 4 * (2 * weights + 6 * largest_weight + inputs + 7 * largest + batch)
    assert plan.host_memory_bytes - plan.memory_bytes == 2048 * 64 * 4 + 8 * 32 * 64 * 4
    with pytest.raises(InputError, match="method awq with scheme W4A4"):
        plan_for(tiny_llama, "W4A4", "awq")
