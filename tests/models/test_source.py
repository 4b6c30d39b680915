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


def test_scales_take_the_widest_dtype_of_the_linears(copy):
    tensors = load_file(copy / "model.safetensors")
    for dtype, expected in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        assert open_model(copy).dtype == expected  # the other linears are in bfloat16


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float64", "auto", "torch.bfloat16", 5, {"": "float32"}])
def test_a_dtype_that_no_reader_takes(copy, field, value):
    edit_config(copy, **{"dtype": None, "torch_dtype": None, field: value})
    with pytest.raises(InputError, match=rf"config\.json: {field} is .*expected float32, bfloat16, float16"):
        open_model(copy)


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
        open_model(copy)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no-such-folder", "no such folder; expected a local folder with a model, or a hub id"),
        ("/no/such/folder", "no such folder"),
        ("org/no-such-model", "could not be downloaded from the Hugging Face hub"),
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
        open_model(copy)


def test_integer_weights_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.weight is stored as I8 .*; expected float16, bfloat16"):
        open_model(copy)


FOREIGN = """
open({mark!r}, "w").write("ran")
from transformers import LlamaConfig as MyConfig
"""


@pytest.mark.parametrize("model_type", ["my_lm", "llama", None])
@pytest.mark.parametrize("architectures", [["MyForCausalLM"], ["LlamaForCausalLM"], None])
def test_code_in_the_folder_is_never_run(copy, tmp_path, monkeypatch, model_type, architectures):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run code"))
    mark = tmp_path / "ran"
    (copy / "configuration_my.py").write_text(FOREIGN.format(mark=str(mark)))
    own = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "configuration_my.MyConfig"}
    edit_config(copy, model_type=model_type, architectures=architectures, auto_map=own)
    if model_type == "llama" and architectures != ["MyForCausalLM"]:
        assert type(open_model(copy).config).__module__.startswith("transformers.models.llama")
    else:
        with pytest.raises(InputError, match=r"MyForCausalLM|my_lm|None"):
            open_model(copy)
    assert not mark.exists()


def test_code_of_a_tokenizer_is_never_run(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run code"))
    mark = tmp_path / "ran"
    (copy / "tokenization_my.py").write_text(FOREIGN.format(mark=str(mark)))
    path = copy / "tokenizer_config.json"
    own = {"AutoTokenizer": ["tokenization_my.MyConfig", None]}
    path.write_text(json.dumps({"tokenizer_class": "MyTokenizer", "auto_map": own}))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer needs code from the model's folder, which is never run"):
        open_model(copy).tokenizer()
    assert not mark.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_no_attention_of_the_hub(copy, field):
    edit_config(copy, **{field: "someone/kernel"})
    assert open_model(copy).config._attn_implementation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, found a list"),
        ("\xff", "cannot be read"),
        ('{"hidden_size": 64, "hidden_size": 32}', "'hidden_size' is there twice"),
        ("{" * 100_000, "cannot be read"),
    ],
)
def test_a_config_that_is_not_json(copy, text, message):
    (copy / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        open_model(copy)


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 0}, {"hidden_size": "many"}, {"num_hidden_layers": 0}, {"architectures": "Llama"}],
)
def test_a_config_that_makes_no_model(copy, changes):
    edit_config(copy, **changes)
    with pytest.raises(InputError, match=str(copy)):
        open_model(copy)


def test_a_file_is_not_a_model(copy):
    with pytest.raises(InputError, match="is a file; expected the folder of the model"):
        open_model(copy / "model.safetensors")


def test_a_download_brings_the_weights_and_all_that_is_carried_over(tiny_llama, tmp_path, monkeypatch):
    """From a hub with files in both layouts, of which one is asked for."""
    import huggingface_hub

    there = shutil.copytree(tiny_llama, tmp_path / "hub")
    tensors = load_file(there / "model.safetensors")
    (there / "model.safetensors").unlink()
    save_file(tensors, there / "odd name.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "odd name.safetensors")}
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted = ("tekken.json", "qwen.tiktoken", "LICENSE", "license.md", "NOTICE.txt", "USE_POLICY.md", "spiece.model")
    for name in (*wanted, "consolidated.safetensors", "pytorch_model.bin", "README.md", "modeling_my.py"):
        (there / name).write_text("")
    fetched = tmp_path / "cache"

    def snapshot_download(name, revision=None, allow_patterns=None):
        names = [path.name for path in there.iterdir()]
        fetched.mkdir(exist_ok=True)
        for file in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copyfile(there / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_model("org/model")
    assert torch.equal(source.tensor("model.norm.weight"), tensors["model.norm.weight"])
    names = {path.name for path in fetched.iterdir()}
    assert {*wanted, "config.json", "tokenizer.json", "tokenizer_config.json", "odd name.safetensors"} <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "README.md", "modeling_my.py"}
