"""Rotations and folded norms leave a model's function as it is, and spread outliers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.source import open_model
from sliderquant.modules import insert_rotations, round_attention
from sliderquant.rotations.folded import RotatedSource, fold_linear
from sliderquant.rotations.transforms import ROTATIONS, Rotation, Rotations, random_signs, rotate
from sliderquant_kernels.rotation.matrix import factor_hadamard

CPU = torch.device("cpu")

FAMILIES = {
    "llama": {},
    "llama with biases and a head of its own": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"sliding_window": 16, "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": True, "num_key_value_heads": 1},
}


def rotated_model(source):
    """The model that a source describes, fp32, with its online rotations."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    weights = {name: source.weight(name, CPU) for name in source.files}
    model.load_state_dict(weights, strict=False)
    missing = set(dict(model.named_parameters())) - weights.keys()
    assert not missing
    insert_rotations(model, source.family, source.rotations)
    round_attention(model, source.family, 16, source.rotations)
    return model


@torch.no_grad()
def logits(model, length=24):
    ids = torch.randint(2, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, use_cache=False).logits


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture
def model_of(random_model, tmp_path):
    def make(family, dtype="float32", **changes):
        configuration = {"model_type": family, **FAMILIES.get(family, {}), **changes}
        return open_model(random_model(tmp_path / "model", dtype=dtype, **configuration))

    return make


@pytest.mark.parametrize("names", [(), ("R1",), ("R2",), ("R4",), ("R1", "R2", "R4")], ids=lambda n: "+".join(n))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(model_of, family, names):
    source = model_of(family)
    want = logits(AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval())
    rotated = RotatedSource.of(source, Rotations.of_model(source, names, seed=3))
    assert relative_error(logits(rotated_model(rotated)), want) < 1e-5


@pytest.mark.parametrize("names", [("R1",), ("R2",), ("R4",)], ids=lambda n: n[0])
def test_every_weight_that_a_rotation_concerns_changes(model_of, names):
    concerned = {
        "R1": {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "R2": {"v_proj", "o_proj"},
        "R4": {"down_proj"},
    }[names[0]]
    source = model_of("llama")
    plain = RotatedSource.of(source, Rotations.of_model(source, (), seed=3))
    rotated = RotatedSource.of(source, Rotations.of_model(source, names, seed=3))
    changed = {
        name.split(".")[-2]
        for name in plain.files
        if relative_error(rotated.weight(name, CPU), plain.weight(name, CPU)) > 0.1
    }
    assert changed == concerned


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    tied=st.booleans(),
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    seed=st.integers(0, 2**32),
)
def test_any_sizes(any_size_model, data, tied, family, seed):
    even = st.sampled_from([4, 6, 10, 12, 20, 22])
    folder = any_size_model(data.draw, even, model_type=family, tie_word_embeddings=tied)
    source = open_model(folder)
    want = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), length=8)
    rotated = RotatedSource.of(source, Rotations.of_model(source, list(ROTATIONS), seed))
    assert relative_error(logits(rotated_model(rotated), length=8), want) < 1e-5


def test_the_rotated_source_is_a_model_of_its_own(model_of):
    source = model_of("llama", dtype="bfloat16")
    rotated = RotatedSource.of(source, Rotations.of_model(source))
    assert source.config.tie_word_embeddings
    assert not rotated.config.tie_word_embeddings
    assert set(rotated.files) == set(rotated.shapes) == {*source.files, "lm_head.weight"}
    assert rotated.dtype == torch.bfloat16
    for name, (shape, size) in rotated.shapes.items():
        tensor = rotated.tensor(name)
        assert (tuple(tensor.shape), tensor.numel() * tensor.element_size(), tensor.dtype) == (
            shape,
            size,
            rotated.dtype,
        )
        weight = rotated.weight(name, CPU)
        assert weight.dtype == torch.float32
        # What is quantized is folded in fp32; what is stored as it is, is computed with as it is stored.
        quantized = "proj.weight" in name
        assert torch.equal(weight, tensor.float()) != quantized, name
        if "layernorm" in name or name == "model.norm.weight":
            assert torch.equal(weight, torch.ones_like(weight))


def test_the_same_seed_rotates_alike(model_of):
    source = model_of("qwen2")
    first, again, other = (
        RotatedSource.of(source, Rotations.of_model(source, seed=seed)).weight(
            "model.layers.1.self_attn.o_proj.weight", CPU
        )
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert relative_error(other, first) > 0.5


def test_rotations_are_plain_data(model_of):
    source = model_of("llama")
    rotations = Rotations.of_model(source, ["R4", "R1", "R3"], seed=11)
    data = json.loads(json.dumps(rotations.to_dict()))
    assert Rotations.from_dict(data) == rotations
    assert list(data) == ["seed", "R1", "R3", "R4"]
    assert rotations.online == ("R3", "R4")
    assert Rotations.of_model(source, ["R1", "R2"]).online == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R5": {}}, "rotations: unknown R5; expected seed and some of R1, R2, R3, R4"),
        ({"seed": "x"}, "rotations: seed is 'x'"),
        ({"R1": {"nonsense": 1}}, "rotations: R1 is not a Hadamard transform"),
    ],
)
def test_damaged_data_is_refused(model_of, change, message):
    data = {**Rotations.of_model(model_of("llama")).to_dict(), **change}
    with pytest.raises(CheckpointError, match=message):
        Rotations.from_dict(data)


def test_rotations_of_another_model_are_refused(model_of):
    source = model_of("llama")
    rotations = Rotations(0, {"R4": factor_hadamard(64)})
    with pytest.raises(CheckpointError, match="R4 is of size 64, but the input of down_proj has 96 channels"):
        RotatedSource.of(source, rotations)
    with pytest.raises(InputError, match="rotations R9: expected some of R1, R2, R3, R4"):
        Rotations.of_model(source, ["R9"])


def test_what_overflows_is_named(model_of):
    source = model_of("llama", dtype="float16", tie_word_embeddings=False)
    rotated = RotatedSource.of(source, Rotations.of_model(source))
    head = source.weight("lm_head.weight", CPU)
    rotated.original.__dict__["weight"] = lambda name, device: torch.full_like(head[0] if "norm" in name else head, 3e4)
    with pytest.raises(InputError, match=r"tensor lm_head\.weight, with norm and rotations folded in, overflows"):
        rotated.tensor("lm_head.weight")


def test_signs_are_those_of_every_version():
    """They are remade from config.json: a change here would break every checkpoint."""
    assert random_signs(0, "hidden", 16).tolist() == [1, -1, 1, -1, 1, -1, 1, -1, -1, -1, 1, -1, -1, 1, -1, 1]
    many = random_signs(1, "hidden", 10_000)
    assert many.unique().tolist() == [-1, 1]
    assert abs(many.mean()) < 0.03
    assert torch.equal(many[:9], random_signs(1, "hidden", 9))
    assert not torch.equal(many[:64], random_signs(1, "layers.0.down", 64))


@pytest.mark.parametrize("size", [1, 2, 12, 64, 172, 192])
def test_a_rotation_is_orthogonal(size):
    rotation = Rotation(random_signs(0, "x", size)[None], factor_hadamard(size))
    matrix = rotation(torch.eye(size)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [12, 40, 96, 128, 6, 44])
def test_rotations_are_those_of_the_kernels(size):
    """`x -> (x * signs) R^T`, R as the transform says: what is folded undoes what is computed online."""
    signs, transform = random_signs(2, "x", size), factor_hadamard(size)
    blocks = [transform.matrix().double() / transform.block**0.5] * transform.blocks
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    want = (x * signs).double() @ torch.block_diag(*blocks).T
    torch.testing.assert_close(rotate(x, signs[None], transform).double(), want, atol=1e-6, rtol=1e-6)


def test_heads_rotate_each_on_its_own():
    rotation = Rotation(random_signs(0, "x", 24).view(2, 12), factor_hadamard(12))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    got = rotation(x)
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        torch.testing.assert_close(got[:, part], rotate(x[:, part], rotation.signs[head][None], factor_hadamard(12)))
    with pytest.raises(InputError, match=r"x of 23 channels, signs \[2, 12\]: expected signs \[heads, 12\]"):
        rotation(x[:, 1:])


@settings(max_examples=20, deadline=None)
@given(inputs=st.sampled_from([4, 12, 20, 24]), outputs=st.sampled_from([2, 8, 28]), seed=st.integers(0, 1000))
def test_a_folded_linear(inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x, norm = (torch.randn(*shape, inputs, generator=generator) for shape in [(5,), ()])
    linear = nn.Linear(inputs, outputs)
    of_inputs, of_outputs = (
        Rotation(random_signs(seed, "x", size)[None], factor_hadamard(size)) for size in (inputs, outputs)
    )
    folded = fold_linear(linear.weight, norm, of_inputs, of_outputs)
    got = of_inputs(x) @ folded.T + of_outputs(linear.bias)
    torch.testing.assert_close(got, of_outputs(linear(x * norm)), atol=1e-5, rtol=1e-5)
