"""The tensors of the files against those of the model class."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sliderquant.errors import InputError
from sliderquant.models import matching
from sliderquant.models.source import open_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def changed(tiny_llama, tmp_path):
    """`changed(lambda tensors: ..., **config)`: a copy of the model with other tensors and another configuration."""

    def make(change, **config):
        folder = shutil.copytree(tiny_llama, tmp_path / "copy")
        tensors = load_file(folder / "model.safetensors")
        result = change(tensors)
        save_file(tensors if result is None else result, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return make


@pytest.fixture
def notes(caplog):
    matching.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, matching.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == matching.__name__]


def untied(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone().add_(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(EMBEDDING), r"tensor model\.embed_tokens\.weight is missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"), r"layers\.1\.input_layernorm\.weight"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]],
            r"tensors .*, .*, .* and \d+ more are miss",
        ),
        (
            lambda tensors: tensors.update({EMBEDDING: torch.zeros(7, 64)}),
            r"has shape \[7, 64\] .* makes it \[2048, 64",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)}), "F8_E4M3"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "stored as I32"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).double()}), "F64 .*: convert"),
        (lambda tensors: {f"_orig_mod.{k}": v for k, v in tensors.items()}, r"without '_orig_mod\.'"),
        (lambda tensors: {f"base_model.model.{k}": v for k, v in tensors.items()}, r"without 'base_model\.model\.'"),
    ],
)
def test_what_is_not_a_whole_model(changed, change, message):
    def only_in_place(tensors):
        result = change(tensors)
        return result if isinstance(result, dict) else None

    with pytest.raises(InputError, match=message):
        open_model(changed(only_in_place))


def test_a_head_that_is_missing(changed):
    with pytest.raises(InputError, match=r"lm_head\.weight is missing .*set tie_word_embeddings to true"):
        open_model(changed(lambda tensors: None, tie_word_embeddings=False))


def test_biases_that_the_configuration_asks_for(changed):
    with pytest.raises(InputError, match=r"q_proj\.bias"):
        open_model(changed(lambda tensors: None, attention_bias=True))


def test_what_the_class_does_not_have_is_ignored_and_named(changed, notes):
    def more(tensors):
        extra = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if ".layers.1." in k}
        return (
            tensors
            | extra
            | {
                "v_head.summary.weight": torch.zeros(1, 64),
                "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
                "model.position_ids": torch.zeros(3, dtype=torch.int64),
            }
        )

    source = open_model(changed(more))
    assert len(source.files) == 2 + 2 * 9
    (note,) = notes()
    assert note.endswith("and 8 more are not part of LlamaForCausalLM, ignored")  # 9 of a layer, a bias, a value head
    assert "rotary_emb" not in note
    open_model(source.folder)
    assert len(notes()) == 1


def test_a_tied_model_with_another_head(changed, notes):
    folder = changed(untied)
    source = open_model(folder)
    assert source.config.tie_word_embeddings is False
    assert source.stored_config["tie_word_embeddings"] is False
    assert torch.equal(source.tensor(HEAD), load_file(folder / "model.safetensors")[HEAD])
    assert "that head is used" in notes()[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_model_with_the_same_head(changed, notes, dtype):
    source = open_model(changed(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].to(dtype, copy=True)})))
    assert source.config.tie_word_embeddings is True
    assert HEAD not in source.files
    assert notes() == []


def test_a_tied_model_with_nothing_but_the_head(changed):
    folder = changed(lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    source = open_model(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert HEAD not in source.files
    assert torch.equal(source.tensor(EMBEDDING), state[EMBEDDING])


@pytest.mark.parametrize("whole", [True, False])
def test_names_with_and_without_the_prefix_of_the_base(changed, whole):
    """`layers.0...` as a base model saves itself; `model.model.layers.0...` as some wrappers do."""

    def renamed(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        return {(f"model.{k}" if whole else k.removeprefix("model.")): v for k, v in tensors.items()}

    folder = changed(renamed)
    source = open_model(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert "model.layers.0.mlp.up_proj.weight" in source.files
    assert all(torch.equal(source.tensor(name), state[name]) for name in source.files)


def test_norms_in_fp32_and_the_rest_in_bf16(changed):
    source = open_model(changed(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)})))
    assert source.dtype == torch.bfloat16
    assert source.tensor("model.norm.weight").dtype == torch.float32


def test_one_tensor_under_two_names(changed):
    """transformers takes one of the two without a word: which is the model's, nobody can know."""
    plain, name = "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    folder = changed(lambda tensors: tensors.update({plain: tensors[name].clone()}))
    assert torch.equal(open_model(folder).tensor(name), load_file(folder / "model.safetensors")[name])
    shutil.rmtree(folder)
    folder = changed(lambda tensors: tensors.update({plain: tensors[name] + 1}))
    with pytest.raises(InputError, match=r"hold model\.layers\.0\.mlp\.up_proj\.weight and layers\.0\..*different"):
        open_model(folder)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_none(changed, value):
    assert open_model(changed(lambda tensors: None, quantization_config=value)).num_layers == 2


def test_how_outputs_are_returned_is_not_left_to_the_file(changed):
    assert open_model(changed(lambda tensors: None, return_dict=False)).config.return_dict
