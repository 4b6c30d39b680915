"""What a decoder layer is made of: against transformers' own code, and for layers that no family has yet."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sliderquant.errors import InputError
from sliderquant.models import FAMILIES
from sliderquant.models.layer import LinearGroup, Mlp, describe_layer, model_layers
from sliderquant.models.source import open_model
from sliderquant.planning.memory import refining_memory, trying_memory
from sliderquant.planning.settings import GptqSettings, Settings
from sliderquant.planning.windows import schedule
from sliderquant.refine.sites import scale_sites
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme

IDS = torch.arange(2, 13)[None]


@pytest.fixture
def source(random_model, tmp_path):
    return open_model(random_model(tmp_path / "model", dtype="float32", tie_word_embeddings=False))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_the_parts_are_those_of_the_model(family, random_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(random_model(tmp_path / "model", model_type=family.model_types[0]))
    outputs, inputs = {}, {}
    for layer, module in model_layers(model, family):
        assert module is model.get_submodule(layer.name)
        for name in layer.norms:
            module.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: outputs.update({name: y}))
        for name in layer.linears:
            module.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    model(IDS)
    linears = {name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)}
    norms = {name for name, child in module.named_modules() if "norm" in name}
    assert set(layer.linears) == linears
    assert len(layer.linears) == len(linears)
    assert set(layer.norms) == norms
    for norm, names in layer.normed_groups:
        assert all(inputs[name] is outputs[norm] for name in names)
    assert inputs[layer.mlps[0].down].shape[-1] == layer.mlps[0].size == layer.active_channels
    attention = layer.attention
    assert inputs[attention.output].shape[-1] == attention.heads * attention.head_dim
    keys = module.get_submodule(attention.key).out_features
    assert keys == attention.kv_heads * attention.head_dim


def test_what_feeds_what(random_model, tmp_path):
    """Scaling the outputs of the first linear and the inputs of the second one changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(
        random_model(tmp_path / "model", dtype="float32", num_key_value_heads=4)
    )
    before = model(IDS).logits
    with torch.no_grad():
        for layer, module in model_layers(model, FAMILIES[0]):
            assert len(layer.feeds) == 2
            for previous, following in layer.feeds:
                module.get_submodule(previous).weight *= 4
                module.get_submodule(following).weight /= 4
    torch.testing.assert_close(model(IDS).logits, before)


def with_layers(source, *layers):
    """The source, as if its layers were these."""
    source.__dict__["layers"] = layers
    return source


def with_experts(layer, size):
    """A layer as a mixture of two experts would be, whose linears are in the model as those of its dense MLP."""
    dense = layer.mlps[0]
    experts = tuple(Mlp(f"mlp.experts.{i}", f"{i}.gate", f"{i}.up", dense.down, size) for i in range(2))
    groups = (*layer.groups[:2], LinearGroup((dense.gate, dense.up), layer.groups[2].norm, kept=("mlp.router",)))
    return replace(layer, groups=(*groups, layer.groups[3]), mlps=experts, mlps_per_token=2)


def test_memory_is_that_of_the_largest_layer(source):
    first, second = source.layers
    settings = Settings()
    windows = schedule(2, **settings.windows.model_dump())

    def bytes_of(*layers):
        here = with_layers(source, *layers)
        refining = refining_memory(here, ModelScheme.parse("W4A4KV4"), settings, windows, 4, 16, 1000)
        one_shot = refining_memory(here, ModelScheme.parse("W4A16"), GptqSettings(), (), 4, 16, 1000)
        return refining + one_shot + trying_memory(here, 4, 16, 1000)

    alike = bytes_of(first, second)
    larger = bytes_of(first, with_experts(second, size=10_000))
    assert all(more > less for more, less in zip(larger, alike, strict=True))
    assert larger == bytes_of(with_experts(first, size=10_000), second)


def test_rotations_of_layers_that_differ(source):
    first, second = source.layers
    mixed = with_layers(source, first, with_experts(second, size=32))
    with pytest.raises(
        InputError, match=r"the input of down_proj has 32 or 96 channels, expected one size: leave R4 out"
    ):
        Rotations.of_model(mixed, ["R1", "R4"])
    fused = replace(first, attention=replace(first.attention, value=None))
    with pytest.raises(InputError, match="values have no linear of their own in this model: leave R2 out"):
        Rotations.of_model(with_layers(source, fused, second), ["R1", "R2"])


def test_a_router_is_rotated_with_what_it_reads(source):
    first, second = source.layers
    experts = with_experts(second, size=96)
    rotated = RotatedSource.of(source, Rotations.of_model(source, ["R1"]))
    gate = rotated.layers[1].full("mlp.gate_proj")
    found = with_layers(rotated, first, experts)._folds
    assert found[experts.full("mlp.router")].norm == found[gate].norm == experts.full("post_attention_layernorm")
    x = torch.eye(64)
    assert torch.equal(found[experts.full("mlp.router")].inputs(x), found[gate].inputs(x))


def test_fused_projections_have_no_scales_of_their_own(source):
    layer = source.layers[0]
    fused = replace(
        layer,
        attention=replace(layer.attention, query=None, key=None, value=None),
        mlps=(replace(layer.mlps[0], gate=None, up=None),),
    )
    assert list(scale_sites(fused, rotated_down=False)) == ["input_layernorm", "post_attention_layernorm"]
    assert fused.feeds == ()


def test_sizes_that_config_json_leaves_out(source):
    config = source.config.to_dict() | {"head_dim": None, "num_key_value_heads": None}
    layer = describe_layer(FAMILIES[0], type("Config", (), config)(), 3)
    assert layer.name == "model.layers.3"
    assert (layer.attention.head_dim, layer.attention.kv_heads) == (16, 4)
