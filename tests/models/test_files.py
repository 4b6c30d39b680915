"""Which files of a folder are the model: by the rules of transformers."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sliderquant.errors import InputError
from sliderquant.models.files import carried_over, read_headers, read_json
from sliderquant.models.source import open_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), factor=1):
    """The tensors times `factor` in two files, beside what is there."""
    tensors = {name: tensor * factor for name, tensor in load_file(folder / "model.safetensors").items()}
    by_file = {name: sorted(tensors)[i::2] for i, name in enumerate(names)}
    for name, keys in by_file.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in by_file.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def as_transformers(folder):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    source = open_model(folder)
    return all(torch.equal(source.tensor(name), state[name]) for name in source.files)


def test_one_file_goes_before_an_index(copy):
    shard(copy, factor=3)
    assert as_transformers(copy)
    for path in copy.glob("model-*"):
        path.unlink()
    assert as_transformers(copy)


def test_other_files_do_not_count(copy):
    weights = {"layers.0.attention.wq.weight": torch.zeros(2), "model.norm.weight": torch.zeros(64)}
    names = ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "a.safetensors")
    for name in names:
        save_file(weights, copy / name)
    (copy / "adapter_config.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"a pickle")
    assert as_transformers(copy)
    shard(copy)
    (copy / "model.safetensors").unlink()
    assert as_transformers(copy)


def test_shards_in_a_folder_of_their_own(copy):
    shard(copy, ("parts/one.safetensors", "parts/two.safetensors"))
    (copy / "model.safetensors").unlink()
    assert as_transformers(copy)


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ([], "it has no weights"),
        (["pytorch_model.bin"], "pickled weights"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickled weights"),
        (["model.ckpt", "optimizer.pt"], "pickled weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter"),
        (["model-q4.gguf"], "GGUF"),
        (["consolidated.00.pth", "params.json"], "their maker's own layout"),
        (["consolidated.safetensors"], "their maker's own layout"),
        (["model-00001-of-00002.safetensors"], "shards without the file model.safetensors.index.json"),
        (["foo.safetensors"], "foo.safetensors: .*rename the right one to model.safetensors"),
        (["model.fp16.safetensors"], "rename"),
        (["tf_model.h5"], "another framework"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_weights_that_are_not_read(copy, found, advice, config):
    (copy / "model.safetensors").unlink()
    for name in found:
        (copy / name).write_bytes(b"?")
    if not config:
        (copy / "config.json").unlink()
        advice = advice if found else "expected a folder made by save_pretrained"
    with pytest.raises(InputError, match=advice) as caught:
        open_model(copy)
    assert all(name in str(caught.value) for name in found[:1])


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd.safetensors", "a/../../b.safetensors", "weights.bin", 7, None]
)
def test_an_index_that_leaves_the_folder(copy, file):
    weight_map = shard(copy)
    (copy / "model.safetensors").unlink()
    weight_map["model.norm.weight"] = file
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"index\.json: tensor model\.norm\.weight"):
        open_model(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' is there twice"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"names b\.safetensors, which are not in"),
    ],
)
def test_a_damaged_index(copy, text, message):
    (copy / "model.safetensors").unlink()
    (copy / INDEX).write_text(text)
    with pytest.raises(InputError, match=message):
        open_model(copy)


def test_an_index_that_promises_too_much(copy):
    weight_map = shard(copy)
    (copy / "model.safetensors").unlink()
    weight_map["model.extra"] = "model-00001-of-00002.safetensors"
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"names tensor model\.extra in model-00001-of-00002\.safetensors"):
        open_model(copy)


def test_a_file_that_the_configuration_names(copy):
    (copy / "model.safetensors").rename(copy / "mine.safetensors")
    config = {**json.loads((copy / "config.json").read_text()), "transformers_weights": "mine.safetensors"}
    (copy / "config.json").write_text(json.dumps(config))
    source = open_model(copy)
    assert "transformers_weights" not in source.stored_config
    with pytest.raises(InputError, match="outside of the model's folder"):
        read_headers("m", copy, "../mine.safetensors")
    with pytest.raises(InputError, match="transformers_weights is 'mine"):
        read_headers("m", copy, "mine.bin")


def test_equal_values_twice_are_no_contradiction(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


CARRIED = [
    "LICENSE",
    "License.txt",
    "MODEL_LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenization_my.py",
    "tokenizer.json",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
]
LEFT = ["README.md", "config.json", "modeling_my.py", "params.json", "tokenizer.pkl", "training_args.bin", "notes.txt"]


def test_what_is_carried_over(tmp_path):
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer").mkdir()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in carried_over(tmp_path)) == CARRIED


def test_a_link_to_a_file_that_is_gone(copy):
    (copy / "vocab.txt").symlink_to("../blobs/gone")
    with pytest.raises(InputError, match=r"vocab\.txt is a link to \.\./blobs/gone, which is missing"):
        open_model(copy)
    (copy / "vocab.txt").unlink()
    open_model(copy)
    for name in ("model.safetensors", "config.json"):
        (copy / name).rename(copy / "kept")
        (copy / name).symlink_to("gone")
        with pytest.raises(InputError, match=rf"{name} is a link to gone, which is missing"):
            open_model(copy)
        (copy / name).unlink()
        (copy / name).mkdir()
        with pytest.raises(InputError, match=rf"{name} is a folder, expected a file"):
            open_model(copy)
        (copy / name).rmdir()
        (copy / "kept").rename(copy / name)


def test_a_folder_that_holds_the_model_further_in(copy, tmp_path):
    for inner in ("models--a--b/snapshots/0123abc", "outer/model"):
        folder = tmp_path / inner
        shutil.copytree(copy, folder)
        outer = tmp_path / inner.split("/")[0]
        with pytest.raises(InputError, match=f"it holds a model in .*: give {folder}$"):
            open_model(outer)
    (copy / "config.json").rename(copy / "Config.json")
    with pytest.raises(InputError, match=r"it holds Config\.json: rename it to config\.json"):
        open_model(copy)


def test_an_adapter_beside_the_model(copy, caplog):
    (copy / "adapter_config.json").write_text("{}")
    open_model(copy)
    assert "adapter_config.json) is ignored" in caplog.text


def test_what_cannot_be_read_is_said_before_any_work(copy, monkeypatch):
    (copy / "LICENSE").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "LICENSE")  # root may read everything
    with pytest.raises(InputError, match="LICENSE cannot be read"):
        open_model(copy)


def test_a_note_of_git_in_place_of_the_weights(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable .*git lfs pull"):
        open_model(copy)
