"""Linears behind an online rotation: what they compute, and that nothing else notices them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.modules import OnlineRotation, PackedLinear, RotatedLinear, insert_rotations
from sliderquant.quantizer.grids import round_to_nearest
from sliderquant.rotations.transforms import Rotation, Rotations, random_signs
from sliderquant.schemes import Scheme
from sliderquant_kernels.rotation.matrix import factor_hadamard


def rotation_of(size, seed=0):
    return Rotation(random_signs(seed, "test", size)[None], factor_hadamard(size))


@pytest.fixture
def rotated():
    torch.manual_seed(0)
    return RotatedLinear(nn.Linear(96, 40), OnlineRotation(rotation_of(96)))


@pytest.fixture
def x():
    return torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(1))


def test_it_rotates_and_multiplies(rotated, x):
    want = rotation_of(96)(x) @ rotated.weight.T + rotated.bias
    torch.testing.assert_close(rotated(x), want)
    assert (rotated.in_features, rotated.out_features) == (96, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_in_the_dtype_of_its_input(rotated, x, dtype):
    want = rotated(x)
    got = rotated.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).norm() < 4 * torch.finfo(dtype).eps * want.norm()


def test_the_state_dict_is_that_of_the_linear(rotated, x):
    class Mlp(nn.Module):
        def __init__(self, down_proj):
            super().__init__()
            self.down_proj = down_proj

    wrapped, bare = Mlp(rotated), Mlp(nn.Linear(96, 40))
    assert list(wrapped.state_dict()) == list(bare.state_dict()) == ["down_proj.weight", "down_proj.bias"]
    assert list(rotated.state_dict()) == ["weight", "bias"]
    wrapped.load_state_dict(bare.state_dict())
    assert torch.equal(rotated.weight, bare.down_proj.weight)
    bare.load_state_dict(wrapped.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias.*Unexpected key.*extra"):
        wrapped.load_state_dict({"down_proj.weight": bare.down_proj.weight, "down_proj.extra": torch.ones(1)})


def test_a_packed_linear_inside(x):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    scheme = Scheme(4, 32)
    packed = PackedLinear(round_to_nearest(weight, scheme, torch.float32), scheme)
    rotated = RotatedLinear(packed, OnlineRotation(rotation_of(96)))
    torch.testing.assert_close(rotated(x), rotation_of(96)(x) @ packed.weight.T, atol=1e-4, rtol=1e-4)
    saved = rotated.state_dict()
    assert set(saved) == {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    other = PackedLinear(round_to_nearest(weight * 2, scheme, torch.float32), scheme)
    again = RotatedLinear(other, OnlineRotation(rotation_of(96)))
    assert not torch.equal(again(x), rotated(x))
    again.load_state_dict(saved)
    assert torch.equal(again(x), rotated(x))


def test_copies_and_pickles_compute_the_same(rotated, x):
    for other in (copy.deepcopy(rotated), pickle.loads(pickle.dumps(rotated))):
        assert torch.equal(other(x), rotated(x))
        assert list(other.state_dict()) == ["weight", "bias"]
        other.load_state_dict(rotated.state_dict())


def test_torch_compile_takes_it_whole(rotated, x):
    compiled = torch.compile(rotated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), rotated(x))


def test_a_model_gets_one_before_every_down_proj(random_model, tmp_path):
    source = open_model(random_model(tmp_path / "model", dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    names = list(model.state_dict())
    rotations = Rotations.of_model(source, ["R1", "R4"], seed=4)
    insert_rotations(model, source.family, rotations)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    assert isinstance(first, RotatedLinear)
    assert torch.equal(first.rotation.signs, rotations.down(0).signs[0])
    assert not torch.equal(first.rotation.signs, second.rotation.signs)
    assert list(model.state_dict()) == names
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    with pytest.raises(InputError, match=r"layer 0: its mlp\.down_proj is rotated already"):
        insert_rotations(model, source.family, rotations)


def test_without_r4_nothing_is_inserted(random_model, tmp_path):
    source = open_model(random_model(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    insert_rotations(model, source.family, Rotations.of_model(source, ["R1", "R2"]))
    assert not any(isinstance(module, RotatedLinear) for module in model.modules())


def test_sizes_that_do_not_fit(rotated):
    with pytest.raises(InputError, match="rotation of size 64: expected 96, the linear's inputs"):
        RotatedLinear(rotated.linear, OnlineRotation(rotation_of(64)))
    with pytest.raises(InputError, match="rotation of 2 heads"):
        OnlineRotation(Rotation(torch.ones(2, 12), factor_hadamard(12)))


def test_what_a_gpu_multiplies_by_is_made_when_the_rotation_comes_to_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        "sliderquant.modules.rotated.prepare_hadamard", lambda transform, device, dtype: made.append(dtype)
    )
    rotation = OnlineRotation(Rotation(torch.ones(1, 64), factor_hadamard(64)))
    assert made == []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    rotation.to(torch.bfloat16)
    assert set(made) == {torch.float16, torch.bfloat16, torch.float32}
    made.clear()
    OnlineRotation(Rotation(torch.ones(1, 64), factor_hadamard(64)))
    assert set(made) == {torch.float16, torch.bfloat16, torch.float32}
