"""Fused parts of decoder layers in whole models: against the same models as transformers has them."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from sliderquant.loading import load
from sliderquant.models import FAMILIES, family_of
from sliderquant.modules import fuse_layers, fused, fused_rotary
from sliderquant.pipeline import quantize

FAMILY_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]
IDS = torch.randint(2, 2000, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILY_TYPES)
def model(request: pytest.FixtureRequest, tmp_path: Path, random_model: Callable[..., Path]) -> PreTrainedModel:
    source = random_model(tmp_path / "source", model_type=request.param, dtype="float32")
    quantize(source, tmp_path / "out", scheme="W4A16-g32", method="rtn")
    return load(tmp_path / "out", device="cpu")


def fuse(model: PreTrainedModel) -> None:
    fuse_layers(model, family_of("", None, [type(model).__name__]))


def test_a_model_computes_what_it_computed(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model(IDS).logits
    state = model.state_dict()
    calls = {"rms_norm": 0, "silu_mul": 0}

    def count(name: str) -> None:
        function = getattr(fused, name)

        def counted(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(fused, name, counted)

    for name in calls:
        count(name)
    fuse(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    heads = 4 if type(model).__name__.startswith("Qwen3") else 0
    assert calls == {"rms_norm": 5 + heads, "silu_mul": 2}
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_it_is_copied_pickled_and_compiled(model: PreTrainedModel) -> None:
    expected = model(IDS).logits
    fuse(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        norm = other.model.norm
        assert norm.forward.module is norm
        assert norm is not model.model.norm
        torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheme", "rotate"), [("W4A8", None), ("W4A4", ["R4"])])
def test_an_input_that_is_rounded_is_gated_and_rotated_by_the_same_kernel(
    scheme: str,
    rotate: list[str] | None,
    tmp_path: Path,
    random_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = random_model(tmp_path / "source", dtype="float32")
    quantize(source, tmp_path / "out", scheme=scheme, method="rtn", rotate=rotate)
    model = load(tmp_path / "out", device="cpu")
    expected = model(IDS).logits
    fuse(model)
    gated = []
    monkeypatch.setattr(fused, "_takes_gate", lambda linear, x: gated.append(type(linear).__name__) or True)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-2, atol=1e-2)
    assert gated == ["PackedLinear"] * 2


def test_other_activation_functions_stay(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    source = random_model(tmp_path / "source", hidden_act="gelu")
    quantize(source, tmp_path / "out", scheme="W4A16-g32", method="rtn")
    model = load(tmp_path / "out", device="cpu")
    expected = model(IDS).logits
    fuse(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert torch.equal(model(IDS).logits, expected)


def test_rotary_is_replaced_for_a_while(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, before, calls = model(IDS).logits, modeling_llama.apply_rotary_pos_emb, []
    rotary = fused.rotary
    monkeypatch.setattr(fused, "rotary", lambda *arguments: calls.append(1) or rotary(*arguments))
    with fused_rotary(model, family_of("", None, [type(model).__name__])):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    assert torch.equal(model(IDS).logits, expected)
    assert len(calls) == 2
    assert modeling_llama.apply_rotary_pos_emb is before
