"""Queries, keys and values in attention: what they are rotated and rounded to, and that nothing else notices."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.modules import AttentionRounding, cache_keyword, insert_rounding, round_attention
from sliderquant.refine.attention import learn_rounding
from sliderquant.rotations.transforms import Rotations

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.randint(2, 2000, (2, 24), generator=torch.Generator().manual_seed(5))
START = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def load(random_model, tmp_path):
    def make(family="llama", bits=4, rotated=True, **changes):
        source = open_model(random_model(tmp_path / "model", dtype="float32", model_type=family, **changes))
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval().requires_grad_(False)
        plain = copy.deepcopy(model)
        rotations = Rotations.of_model(source, ["R3"], seed=1) if rotated else None
        round_attention(model, source.family, bits, rotations)
        return model, plain, rotations

    return make


def logits(model, **keywords):
    return model(input_ids=IDS, use_cache=False, **keywords).logits


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attention_multiplies(load, round_tokens, monkeypatch, family):
    """Against an attention function that rotates and rounds all three itself, in fp64, after RoPE."""
    model, plain, rotations = load(family)
    layers = iter(range(len(plain.model.layers)))
    module = __import__(type(plain.model.layers[0].self_attn).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def simulated(attention, query, key, value, mask, **keywords):
        rotation = rotations.query_key(next(layers))
        query, key = (rotation(x.transpose(1, 2)).transpose(1, 2) for x in (query, key))
        query, key, value = (round_tokens(x, 4, False).float() for x in (query, key, value))
        return eager(attention, query, key, value, mask, **keywords)

    got = logits(model)
    monkeypatch.setattr(module, "eager_attention_forward", simulated)
    plain.set_attn_implementation("eager")
    want = logits(plain)
    assert relative_error(got, want) < 1e-5
    model.set_attn_implementation("eager")
    monkeypatch.setattr(module, "eager_attention_forward", eager)
    assert relative_error(logits(model), want) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_alone_changes_nothing(load, family):
    model, plain, rotations = load(family, bits=16)
    seen = []
    model.model.layers[0].self_attn.rounding.rotation.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    want = logits(plain)
    assert relative_error(logits(model), want) < 1e-6
    assert len(seen) == 2  # queries and keys
    for x, y in seen:
        assert torch.allclose(y, rotations.query_key(0)(x), atol=1e-5)
        assert relative_error(y, x) > 0.1


def test_without_rotation(load):
    model, plain, _ = load(rotated=False, bits=8)
    error = relative_error(logits(model), logits(plain))
    assert 0 < error < 0.01
    for layer in model.model.layers:
        layer.self_attn.rounding.enabled = False
    assert torch.equal(logits(model), logits(plain))


def test_nothing_is_inserted_for_16_bits(load):
    model, plain, _ = load(bits=16, rotated=False)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_what_is_learned_is_what_runs(load):
    """The path with gradients gives the values of the one without."""
    model, _, _ = load()
    attention = model.model.layers[0].self_attn
    running = attention.rounding
    learn_rounding(attention, compiled=False, clip_start=None)
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(3))
    for site in ("query", "key", "value"):
        tracked = x.clone().requires_grad_()
        got = getattr(attention.rounding, site)(tracked)
        torch.testing.assert_close(got, getattr(running, site)(x), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(got.square().sum(), tracked)
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


def test_the_cache_holds_what_is_rounded_once(load):
    model, _, _ = load()
    whole, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    keyword = cache_keyword(model.forward)
    want = model(input_ids=IDS, **{keyword: whole}).logits
    steps = [model(input_ids=IDS[:, i : i + 6], **{keyword: cache}).logits for i in range(0, 24, 6)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-5)
    for stored, other in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(stored.keys, other.keys, rtol=1e-4, atol=1e-5)
        # 4 bits: at most 16 values in a head of a token
        assert max(len(row.unique()) for row in stored.values.flatten(0, 2)) <= 16
    assert torch.equal(want, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(load, implementation, cache):
    model, _, _ = load("qwen3")
    model.set_attn_implementation(implementation)
    settings = {"attention_mask": torch.ones_like(START), "max_new_tokens": 6, "do_sample": False}
    without = model.generate(START, use_cache=False, **settings)
    assert torch.equal(model.generate(START, cache_implementation=cache, **settings), without)


def test_sliding_windows(load):
    model, plain, _ = load("mistral", bits=16, sliding_window=8)
    assert relative_error(logits(model), logits(plain)) < 1e-6
    settings = {"attention_mask": torch.ones_like(START), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(START, **settings), plain.generate(START, **settings))


def test_torch_compile_takes_the_model_whole(load):
    model, _, _ = load()
    want = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), want)


def test_copies_and_pickles(load, tmp_path):
    model, plain, _ = load()
    want = logits(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        other.set_attn_implementation("eager")
        assert other.model.layers[0].self_attn.rounding.attention().__name__ == "eager_attention_forward"
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(plain))


def test_twice_is_refused(load):
    model, _, _ = load()
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.rounding, AttentionRounding)
    with pytest.raises(InputError, match="rounded already"):
        insert_rounding(attention, 4, None)


def test_a_module_without_a_cache_is_refused():
    """Not passed over: its keys and values would stay as they are."""

    class Attention(torch.nn.Module):
        config = None

        def forward(self, hidden_states):
            return hidden_states

    with pytest.raises(InputError, match="expected an argument `cache`"):
        insert_rounding(Attention(), 4, None)
