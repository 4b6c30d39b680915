import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sliderquant.checkpoint import read_checkpoint, verify
from sliderquant.errors import CheckpointError, InputError

Tiny = Callable[..., SimpleNamespace]
Edit = Callable[..., None]
NAME = "model.layers.0.mlp.down_proj"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, *parts: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        read_checkpoint(folder)
    for part in parts:
        assert part in str(caught.value)


def test_what_it_finds(tiny: Tiny) -> None:
    checkpoint = read_checkpoint(tiny("W3A16-g32").path)
    assert len(checkpoint.schemes) == 14
    assert {str(scheme) for scheme in checkpoint.schemes.values()} == {"W3A16-g32"}
    assert checkpoint.linear_shapes[NAME] == (128, 256)
    assert checkpoint.format_version == 1
    assert checkpoint.report == {"method": "rtn", "perplexity": {"text": 8.5}}
    packed = checkpoint.tensors[f"{NAME}.weight_packed"]
    assert (packed.dtype, packed.shape, packed.bytes) == ("I32", (128, 24), 128 * 24 * 4)
    assert checkpoint.files == [checkpoint.path / "model.safetensors"]


def test_a_checkpoint_of_another_tool(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny("W4A16-g64-sym").path
    for name in ("sliderquant-report.json", "sliderquant-checksums.json", "README.md"):
        (folder / name).unlink()

    def change(config: dict[str, Any]) -> None:
        del config["sliderquant"]
        config["quantization_config"] |= {"version": "0.9.4", "sparsity_config": {}, "global_compression_ratio": 1.5}
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"observer": "minmax"}

    edit_config(folder, change)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.format_version, checkpoint.version, checkpoint.report) == (None, None, None)
    assert len(checkpoint.schemes) == 14
    found = verify(folder)
    assert (found.ok, found.has_checksums, found.files) == (True, False, 0)


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: does not exist, expected the folder", error=InputError)


def test_a_hub_id() -> None:
    refused(
        Path("someone/some-model"), "does not exist", "hf download someone/some-model --local-dir", error=InputError
    )


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    refused(tmp_path / "model.gguf", "is a file", error=InputError)


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "this model is not quantized", "sliderquant quantize", "from_pretrained", error=InputError)


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, "config.json: ", "JSON")


def test_a_newer_format(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config["sliderquant"].update(format_version=2))
    refused(folder, "written by a newer sliderquant (format 2; this is 1): upgrade")


def test_another_method(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config["quantization_config"].update(quant_method="awq"))
    refused(folder, "config.json", "quant_method is 'awq', expected 'compressed-tensors'")


def test_bits_that_disagree(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny("W4A16-g64").path

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3

    edit_config(folder, change)
    refused(folder, "model.safetensors", f"{NAME}.weight_packed has shape [128, 32]", "expected [128, 24]", "W3A16-g64")


def test_group_size_that_disagrees(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny("W4A16-g64").path

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32

    edit_config(folder, change)
    refused(folder, "model.safetensors", f"{NAME}.weight_scale has shape [128, 4], expected [128, 8]", "W4A16-g32")


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetry_that_disagrees(symmetric: bool, tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny("W4A16-g64-asym" if symmetric else "W4A16-g64-sym").path

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric

    edit_config(folder, change)
    refused(folder, f"{NAME}.weight_zero_point {'should not be there' if symmetric else 'is missing'}")


def test_a_packed_layer_that_config_ignores(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config["quantization_config"]["ignore"].append(NAME))
    refused(folder, f"tensor {NAME}.weight_packed holds the codes", "quantization_config", "does not quantize")


def test_a_layer_that_config_names_is_missing(tiny: Tiny) -> None:
    folder = tiny("W4A16-g64", down_proj="W4A16").path
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(NAME)])
    refused(folder, f"tensor {NAME}.weight_packed is missing: config.json names {NAME}")


def test_nothing_is_packed(tiny: Tiny) -> None:
    folder = tiny().path
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("weight_packed")])
    refused(folder, "no tensor ends in .weight_packed")


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point", "weight_shape"])
def test_a_missing_part(part: str, tiny: Tiny) -> None:
    folder = tiny().path
    rewrite(folder, lambda tensors: tensors.pop(f"{NAME}.{part}"))
    refused(folder, f"tensor {NAME}.{part} is missing: config.json says that {NAME} is W4A16-g64")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_packed", torch.zeros(128, 32, dtype=torch.int64), "has dtype I64, expected I32"),
        ("weight_packed", torch.zeros(128, 31, dtype=torch.int32), "has shape [128, 31], expected [128, 32]"),
        ("weight_scale", torch.zeros(128, 4, dtype=torch.int32), "has dtype I32, expected BF16 or F16 or F32"),
        ("weight_scale", torch.ones(128, 3), "has shape [128, 3], expected [128, 4]"),
        ("weight_zero_point", torch.zeros(128, 4, dtype=torch.int8), "has dtype I8, expected I32"),
        ("weight_zero_point", torch.zeros(4, 16, dtype=torch.int32), "has shape [4, 16], expected [16, 4]"),
        ("weight_shape", torch.tensor([128, 250]), "says [128, 250], which W4A16-g64 of config.json does not divide"),
        ("weight_shape", torch.tensor([128, 320]), "weight_shape is [128, 320] and config.json says W4A16-g64"),
        ("weight_shape", torch.tensor([128, 256, 1]), "has shape [3], expected [2]"),
        ("weight_shape", torch.tensor([-1, 256]), "says [-1, 256]"),
        ("weight", torch.ones(128, 256), "should not be there"),
        ("weight_g_idx", torch.zeros(256, dtype=torch.int32), "should not be there"),
    ],
)
def test_parts_that_disagree(part: str, value: torch.Tensor, message: str, tiny: Tiny) -> None:
    folder = tiny("W4A16-g64").path
    rewrite(folder, lambda tensors: tensors.update({f"{NAME}.{part}": value}))
    refused(folder, "model.safetensors", NAME, message)


def test_a_truncated_file(tiny: Tiny) -> None:
    file = tiny().path / "model.safetensors"
    data = file.read_bytes()
    for kept in (0, 4, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:kept])
        refused(file.parent, "model.safetensors: truncated, or its header is damaged")


def test_a_damaged_header(tiny: Tiny) -> None:
    file = tiny().path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)
    refused(file.parent, "model.safetensors: truncated, or its header is damaged")


def test_no_weights(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: missing")


def test_a_missing_shard(tiny: Tiny) -> None:
    folder = tiny(max_shard_bytes=60_000).path
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"{shard.name}: missing, which model.safetensors.index.json lists")


@pytest.mark.parametrize("there", [True, False])
def test_one_file_goes_before_an_index(there: bool, tiny: Tiny) -> None:
    """As save_pretrained leaves a folder: first in shards, then in one file."""
    sharded = tiny("W4A16-g64", max_shard_bytes=30_000).path
    folder = tiny("W4A16-g64", folder="whole").path
    for path in sharded.glob("model*"):
        if there or path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    assert read_checkpoint(folder).files == [folder / "model.safetensors"]


@pytest.mark.parametrize("file", [5, "../elsewhere.safetensors", "/elsewhere.safetensors", "model.bin"])
def test_an_index_that_names_what_is_no_file_of_the_folder(file: Any, tiny: Tiny) -> None:
    folder = tiny("W4A16-g64", max_shard_bytes=30_000).path
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    refused(folder, "index.json: tensor model.norm.weight", "expected")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("x", "sliderquant is 'x', expected a JSON object"),
        ({"format_version": "1"}, "sliderquant.format_version is '1', expected a whole number"),
        ({"format_version": True}, "sliderquant.format_version is True, expected a whole number"),
    ],
)
def test_a_damaged_entry(entry: Any, message: str, tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(sliderquant=entry))
    refused(folder, message, "config.json")


@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_a_pattern_that_is_no_regular_expression(where: str, tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny().path

    def change(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        holder = quantization if where == "ignore" else quantization["config_groups"]["group_0"]
        holder[where] = [*holder[where], "re:("]

    edit_config(folder, change)
    refused(folder, f"{where}: 're:(' is not a regular expression", "config.json")


def test_an_index_that_disagrees(tiny: Tiny) -> None:
    folder = tiny(max_shard_bytes=60_000).path
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = (sorted(folder.glob("*.safetensors"))[i].name for i in (0, -1))
    assert index["weight_map"]["lm_head.weight"] == last
    index["weight_map"]["lm_head.weight"] = first
    path.write_text(json.dumps(index))
    refused(folder, f"{first}: tensor lm_head.weight is missing, which model.safetensors.index.json lists")
    path.write_text("{}")
    refused(folder, "model.safetensors.index.json: has no weight_map")


def test_a_damaged_report(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in it is needed to run the model."""
    folder = tiny().path
    (folder / "sliderquant-report.json").write_text("{")
    assert read_checkpoint(folder).report is None
    assert "sliderquant-report.json: not readable as JSON" in caplog.text
    assert any("sliderquant-report.json" in problem for problem in verify(folder).problems)
