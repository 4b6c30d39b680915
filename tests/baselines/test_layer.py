"""Merged channel scales leave what a model computes as it is, whatever is rounded to be stored."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from sliderquant.baselines.layer import CalibratedLayer, relative_error, storable
from sliderquant.calibration.layerwise import RunningLayer
from sliderquant.errors import CheckpointError
from sliderquant.models import family_of
from sliderquant.models.layer import model_layers
from sliderquant.models.source import open_model
from sliderquant.pipeline import _copy_the_rest
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.schemes import ModelScheme, Scheme

IDS = torch.randint(2, 120, (2, 12), generator=torch.Generator().manual_seed(5))


def random_model(family, heads, kv_heads, head_dim, hidden, intermediate, biases, seed):
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=128,
        max_position_embeddings=32,
        attention_bias=biases,
        mlp_bias=biases,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        if "norm" in name or name.endswith("bias"):
            parameter[0] = 0  # a channel that a scale can do nothing about
    return model


def factors(size, generator):
    """None near 1."""
    x = torch.randn(size, generator=generator)
    return (1.5 * x + 0.5 * x.sign()).exp()


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    kv_heads=st.integers(1, 3),
    queries_per_value=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    width=st.integers(3, 9),
    intermediate=st.sampled_from([12, 33]),
    biases=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 10_000),
)
@example("llama", 1, 1, 8, 3, 12, False, torch.bfloat16, 142)  # two channels that can be scaled
def test_logits_stay_as_they_are(
    family, kv_heads, queries_per_value, head_dim, width, intermediate, biases, dtype, seed
):
    heads = kv_heads * queries_per_value
    hidden = heads * width  # not heads * head_dim: a model need not have that many
    model = random_model(family, heads, kv_heads, head_dim, hidden, intermediate, biases, seed)
    with torch.no_grad():
        want = model(IDS).logits
    g = torch.Generator().manual_seed(seed)
    for spec, module in model_layers(model, family_of(family, family, None)):
        dtypes = dict.fromkeys(module.state_dict(), dtype)
        running = RunningLayer(spec, module, {})
        layer = CalibratedLayer(running, {}, dtypes, dtype, None, 1, torch.device("cpu"))
        weights = {name: layer.weight(name).clone() for name in spec.linears}
        for norm, names in spec.normed_groups:
            layer.scale_after_norm(norm, names, factors(hidden, g))
        for previous, following in spec.feeds:
            layer.scale_between(previous, following, factors(layer.weight(previous).shape[0], g))
        assert all(not torch.allclose(layer.weight(name), weight, rtol=0.2) for name, weight in weights.items())
        for name, tensor in layer.changed.items():
            assert torch.equal(tensor.to(dtype).float(), tensor)
            assert torch.equal(module.get_parameter(name), tensor)
        biased = {name for name in ("self_attn.v_proj.bias", "mlp.up_proj.bias") if name in module.state_dict()}
        assert layer.changed.keys() == {f"{norm}.weight" for norm, _ in spec.normed_groups} | biased
    with torch.no_grad():
        got = model(IDS).logits
    assert ((got - want).norm() / want.norm()).item() < 1e-5


@settings(deadline=None)
@given(
    old=st.floats(-1e4, 1e4, width=32),
    scale=st.floats(2.0**-60, 2.0**60, width=32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@example(old=1e4, scale=2.0**-60, dtype=torch.float16)  # would be infinite
@example(old=1e-4, scale=2.0**60, dtype=torch.float16)  # would be 0
def test_the_scale_is_the_one_that_the_stored_value_implies(old, scale, dtype):
    old, scale = torch.tensor(old).to(dtype).float(), torch.tensor(scale)
    new, implied = storable(old, scale, dtype)
    assert new.isfinite()
    assert 0 < implied < torch.inf
    assert torch.equal(new.to(dtype).float(), new)
    assert (new * implied).item() == pytest.approx(old.item(), rel=3e-7, abs=1e-40)
    quotient = old / scale
    if old == 0:
        assert implied == scale
    elif torch.finfo(dtype).smallest_normal < quotient.abs() < torch.finfo(dtype).max / 2:
        assert implied.item() == pytest.approx(scale.item(), rel=torch.finfo(dtype).eps)


def test_the_error_is_relative_to_the_output():
    g = torch.Generator().manual_seed(0)
    x, weight, change = (torch.randn(*shape, generator=g) for shape in ((50, 8), (5, 8), (5, 8)))
    want = (x @ change.T).square().sum() / (x @ weight.T).square().sum()
    assert relative_error(change, weight, x.T @ x) == pytest.approx(want.item(), rel=1e-5)
    assert relative_error(change, weight, torch.zeros(8, 8)) == 0
    assert relative_error(change, weight, torch.full((8, 8), torch.nan)) is None


class _Writer:
    def __init__(self):
        self.tensors = {}

    def add_tensor(self, name, tensor):
        self.tensors[name] = tensor


def test_changed_norms_are_written_and_nothing_else_is(tiny_llama):
    plan = make_plan(open_model(tiny_llama), Request(tiny_llama, ModelScheme(Scheme(4)), METHODS["rtn"], seqlen=32))
    name = "model.layers.1.input_layernorm.weight"
    writer = _Writer()
    _copy_the_rest(plan, {name: torch.full((64,), 0.5)}, writer)
    assert torch.equal(writer.tensors[name], torch.full((64,), 0.5, dtype=torch.bfloat16))
    assert len(writer.tensors) == 2 + 2 * 2
    other = "model.layers.0.input_layernorm.weight"
    assert torch.equal(writer.tensors[other], plan.source.tensor(other))
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight: its changed values are not ones"):
        _copy_the_rest(plan, {name: torch.full((64,), 1 / 3)}, _Writer())
    for wrong in ("model.layers.0.self_attn.q_proj.weight", "model.layers.9.input_layernorm.weight"):
        with pytest.raises(CheckpointError, match="was changed, but is not one that the model keeps as it is"):
            _copy_the_rest(plan, {wrong: torch.ones(64)}, _Writer())
