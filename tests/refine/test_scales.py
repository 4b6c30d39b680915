"""Channel scales leave a model's function as it is, and start where statistics say."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.outliers import inject_outliers
from sliderquant.calibration.layerwise import LayerwiseModel
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import open_model
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.planning.settings import Settings
from sliderquant.refine.layer import merged_layer, refined_layer, refined_linears, starting
from sliderquant.refine.scales import ChannelScale, Spread, rounded_to
from sliderquant.refine.sites import scale_sites
from sliderquant.refine.weights import refined_weight
from sliderquant.refine.window import WindowLayers
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme

CPU = torch.device("cpu")
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
}
IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(5))


def refined_layers(source, scheme="W4A4KV4", **changes):
    settings = Settings.model_validate({"rank": 0, "clipping": False, **changes})
    method = METHODS["sliderquant-published"]
    request = Request(source.name, ModelScheme.parse(scheme), method, settings, samples=2, seqlen=8)
    plan = make_plan(source, request)
    model = LayerwiseModel(Decoder(source, CPU), IDS[:, :8], plan.rotations, plan.scheme.kv_bits)
    return plan, [refined_layer(plan, model, index, seed=0) for index in range(source.num_layers)]


def randomize(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = [module for module in layer.module.modules() if isinstance(module, ChannelScale)]
    for scale in scales:
        scale.start((torch.randn(scale.parameter.shape, generator=generator) * 0.5).exp())
    return scales


@torch.no_grad()
def merged_model(source, layers):
    """The model with all scales merged into its tensors, and nothing rounded."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    state = model.state_dict()
    for layer in layers:
        _, dense = merged_layer(layer.module)
        for name, tensor in dense.items():
            assert state[layer.spec.full(name)].shape == tensor.shape
            state[layer.spec.full(name)].copy_(tensor)
        for name, linear in refined_linears(layer.module).items():
            state[layer.spec.full(f"{name}.weight")].copy_(refined_weight(linear.learned_weight()))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@settings(max_examples=12, deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)), log=st.booleans(), seed=st.integers(0, 1000))
def test_merging_changes_nothing(any_size_model, data, family, log, seed):
    folder = any_size_model(data.draw, st.integers(3, 9), model_type=family, **FAMILIES[family])
    source = open_model(folder)
    _, layers = refined_layers(source, scales={"use": "always", "space": "log" if log else "direct"})
    scales = [randomize(layer, seed) for layer in layers]
    assert [len(found) for found in scales] == [5, 5]
    model = merged_model(source, layers)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert relative_error(logits(model), logits(original)) < 1e-5
    name = source.layers[0].norms[0]
    assert (
        relative_error(
            model.model.layers[0].get_submodule(name).weight, original.model.layers[0].get_submodule(name).weight
        )
        > 0.1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refined_layer_computes_what_is_merged(random_model, tmp_path, family):
    """With 8-bit grids all around, a layer and its merge are nearly the original; without, exactly."""
    folder = random_model(tmp_path / "model", dtype="float32", model_type=family, **FAMILIES[family])
    source = open_model(folder)
    _, layers = refined_layers(source, "W8A8KV8")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calls = []
    original.model.layers[0].register_forward_hook(
        lambda _, x, keywords, out: calls.append((x[0], keywords, out)), with_kwargs=True
    )
    logits(original)
    (x, keywords, want), layer = calls[0], layers[0]
    randomize(layer, 1)
    with torch.no_grad():
        layer = replace(layer, arguments=keywords)
        assert relative_error(layer(x), want) < 0.05
        window = WindowLayers([layer])
        window.set(quantized=False)
        assert relative_error(window(x), want) < 1e-6


def test_sites(random_model, tmp_path):
    source = open_model(random_model(tmp_path / "model"))
    sites = scale_sites(source.layers[0], rotated_down=False)
    assert {name: site.size for name, site in sites.items()} == {
        "input_layernorm": 64, "post_attention_layernorm": 64, "self_attn.v_proj": 32, "mlp.up_proj": 96,
        "self_attn.q_proj": 16,
    }  # fmt: skip
    assert "mlp.up_proj" not in scale_sites(source.layers[0], rotated_down=True)
    # 2 KV heads of 16 channels, 4 query heads: channels i and i + 8 of a head share one alpha.
    keys = sites["self_attn.q_proj"].rows["self_attn.k_proj"].index.view(2, 16)
    assert torch.equal(keys[:, :8], keys[:, 8:])
    assert len(keys.unique()) == 16
    queries = sites["self_attn.q_proj"].rows["self_attn.q_proj"].index.view(4, 16)
    assert torch.equal(queries, keys[[0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("scheme", "use", "expected"),
    [("W4A16", "auto", 0), ("W4A4", "auto", 5), ("W4A16KV4", "auto", 5), ("W4A16", "always", 5), ("W4A4", "never", 0)],
)
def test_where_there_are_scales(random_model, tmp_path, scheme, use, expected):
    source = open_model(random_model(tmp_path / "model"))
    _, layers = refined_layers(source, scheme, scales={"use": use})
    assert sum(isinstance(module, ChannelScale) for module in layers[0].module.modules()) == expected
    if use == "always":
        rotated = RotatedSource.of(source, Rotations.of_model(source))
        _, layers = refined_layers(rotated, scheme, scales={"use": use})
        assert sum(isinstance(module, ChannelScale) for module in layers[0].module.modules()) == 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_start_from_statistics(random_model, tmp_path, family):
    source = open_model(random_model(tmp_path / "model", dtype="float32", model_type=family, **FAMILIES[family]))
    plan, layers = refined_layers(source, scales={"start": "statistics"})
    layer = layers[0]
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    seen = {}
    plain = model.model.layers[0]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        plain.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
    plain.register_forward_pre_hook(
        lambda _, x, keywords: seen.__setitem__("layer", (x[0], keywords)), with_kwargs=True
    )
    ends = ("self_attn.q_norm", "self_attn.k_norm") if family == "qwen3" else ("self_attn.q_proj", "self_attn.k_proj")
    for name in ends:
        plain.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(f"{name} out", y))
    logits(model)
    x, keywords = seen["layer"]
    layer = replace(layer, arguments=keywords)
    window = WindowLayers([layer])
    window.set(quantized=False)
    with torch.no_grad(), starting(plan, layer):
        for row in x:  # sample by sample
            window(row[None])
    alpha = {name: scale().detach() for name, scale in layer.module.channel_scales.items()}

    def largest(name):
        return seen[name].abs().flatten(0, -2).amax(0)

    def columns(*names):
        return torch.stack([plain.get_submodule(name).weight.abs().amax(0) for name in names]).amax(0)

    close = torch.testing.assert_close
    qkv = [f"self_attn.{name}_proj" for name in "qkv"]
    close(alpha["input_layernorm"], (largest("self_attn.q_proj") / columns(*qkv)).sqrt())
    close(alpha["mlp-up_proj"], (largest("mlp.down_proj") / columns("mlp.down_proj")).sqrt())
    shared = [x.view(2, 2, 16).amax(1).flatten() for x in (largest("self_attn.o_proj"), columns("self_attn.o_proj"))]
    close(alpha["self_attn-v_proj"], (shared[0] / shared[1]).sqrt())
    pairs = [seen[f"{name} out"].unflatten(-1, (-1, 2, 8)).square().sum(-2).sqrt() for name in ends]
    if family == "qwen3":
        pairs = [pair.flatten(0, -2).amax(0) for pair in pairs]
    else:
        pairs = [pair.flatten(0, 1).unflatten(1, (2, -1)).amax((0, 2)).flatten() for pair in pairs]
    close(alpha["self_attn-q_proj"], (pairs[0] / pairs[1]).sqrt())


def test_start_with_outliers_alone(random_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(random_model(tmp_path / "model"), dtype=torch.float32)
    inject_outliers(model, open_model(tmp_path / "model").family, channels=2, factor=32.0)
    model.save_pretrained(tmp_path / "outliers")
    source, started = open_model(tmp_path / "outliers"), []
    for start in ("statistics", "outliers"):
        plan, (layer, *_) = refined_layers(source, scales={"start": start})
        samples, inputs = Decoder(source, CPU).embed(IDS)
        layer = replace(layer, arguments=inputs.arguments[0])
        window = WindowLayers([layer])
        window.set(quantized=False)
        with torch.no_grad(), starting(plan, layer):
            window(torch.cat(list(samples)))
        started.append({name: scale().detach() for name, scale in layer.module.channel_scales.items()})
    everywhere, alone = started
    for name, alpha in everywhere.items():
        ratio = alpha / alpha.median()
        torch.testing.assert_close(alone[name], torch.where(ratio > 4, ratio, 1.0))
    chosen = model.model.layers[0].input_layernorm.weight.abs() > 4
    assert torch.equal(alone["input_layernorm"] > 1, chosen)
    assert chosen.sum() == 2
    assert (alone["input_layernorm"][chosen] > 10).all()


def test_spreads_and_rounding():
    scale = ChannelScale(3, True, CPU)
    scale.start(torch.tensor([0.5, float("nan"), 4.0]))
    index = torch.tensor([2, 0, 2])
    torch.testing.assert_close(Spread(scale, index)(), torch.tensor([4.0, 0.5, 4.0]))
    torch.testing.assert_close(Spread(scale, inverse=True)(), torch.tensor([2.0, 1.0, 0.25]))
    other = copy.deepcopy(Spread(scale, index))
    assert other.scale is not scale
    direct = ChannelScale(2, False, CPU)
    direct.parameter.data = torch.tensor([-1.0, 2.0])
    assert torch.equal(direct(), torch.tensor([1e-4, 2.0]))
    x = torch.tensor([1.001, 3.0], requires_grad=True)
    rounded = rounded_to(x, torch.bfloat16)
    assert torch.equal(rounded, torch.tensor([1.0, 3.0]))
    assert torch.equal(torch.autograd.grad(rounded.sum(), x)[0], torch.ones(2))
