import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sliderquant.errors import InputError
from sliderquant.models.source import open_model


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(config))


def test_tensors_and_shapes_without_loading(tiny_llama):
    source = open_model(tiny_llama)
    whole = load_file(tiny_llama / "model.safetensors")
    assert source.dtype == torch.bfloat16
    assert (source.num_layers, source.max_positions) == (2, 128)
    assert set(source.files) == set(whole)
    for name, (shape, size) in source.shapes.items():
        assert shape == tuple(whole[name].shape)
        assert size == whole[name].numel() * 2
    assert torch.equal(source.tensor("model.norm.weight"), whole["model.norm.weight"])


def test_sharded_models_are_read_through_their_index(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_model(copy)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00002.safetensors, which are not in"):
        _ = open_model(copy).files


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no-such-folder", "no such folder; expected a local folder with a model, or a hub id"),
        ("/no/such/folder", "no such folder"),
        ("org/no-such-model", "could not be had from the Hugging Face hub"),
        ("not a model!", "neither a local folder nor a valid hub id"),
    ],
)
def test_no_such_model(model, message):
    with pytest.raises(InputError, match=message) as caught:
        open_model(model)
    assert model in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json in"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        open_model(tmp_path)


def test_not_a_causal_language_model(copy):
    edit_config(copy, model_type="bert", architectures=["BertForMaskedLM"])
    with pytest.raises(InputError, match="BertForMaskedLM is not a causal language model; expected one of Llama"):
        open_model(copy)


def test_an_unsupported_architecture(copy):
    edit_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(InputError, match="GPT2LMHeadModel is not a"):
        open_model(copy)
    edit_config(copy, model_type="opt", architectures=["OPTForCausalLM"])
    with pytest.raises(
        InputError, match="OPTForCausalLM is not a supported architecture; expected one of LlamaForCausalLM"
    ):
        open_model(copy)


def test_a_model_that_is_quantized_already(copy):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="is quantized already"):
        open_model(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors in .*pickled weights"):
        open_model(copy)


def test_a_truncated_file_is_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        open_model(copy)


def test_a_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_model(copy).tensor("model.layers.1.mlp.up_proj.weight")


def test_integer_weights_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"weights are torch\.int8; expected float16, bfloat16 or float32"):
        open_model(copy)
