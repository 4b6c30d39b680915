"""Checkpoints in the format int-quantized: sliderquant's own, and those of other tools."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sliderquant.checkpoint import read_checkpoint, verify
from sliderquant.checkpoint.packing import unpack
from sliderquant.errors import CheckpointError
from sliderquant.loading import load
from sliderquant.modules import LinearSlice, QuantizedLinear, split_linears
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.schemes import Scheme

Tiny = Callable[..., SimpleNamespace]
Edit = Callable[..., None]
INT8 = "W8A8-sym-act-sym"
NAME = "model.layers.0.mlp.down_proj"
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 64


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def to_int8(folder: Path, edit_config: Edit, named: str = "int-quantized") -> None:
    """What another tool would have written of the same codes: int8, unpacked, without a trace of sliderquant."""
    checkpoint = read_checkpoint(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, scheme in checkpoint.schemes.items():
            parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
            packed = {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
            codes, scale, zero_point = unpack(packed, scheme)
            tensors[f"{name}.weight"] = (codes.short() - scheme.offset).to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale
            if zero_point is not None:
                tensors[f"{name}.weight_zero_point"] = (zero_point.short() - scheme.offset).to(torch.int8)

    rewrite(folder, change)
    for name in ("sliderquant-report.json", "sliderquant-checksums.json", "README.md"):
        (folder / name).unlink()

    def configure(config: dict[str, Any]) -> None:
        del config["sliderquant"]
        config["quantization_config"]["format"] = named
        for group in config["quantization_config"]["config_groups"].values():
            group.pop("format")

    edit_config(folder, configure)


def to_packed(folder: Path, edit_config: Edit) -> None:
    """What sliderquant wrote of this scheme before it wrote int8."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key, tensor in tensors.items() if tensor.dtype == torch.int8]:
            weight, name = tensors.pop(key), key.removesuffix(".weight")
            tensors[f"{name}.weight_packed"] = pack_to_int32(weight, 8)
            tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)

    rewrite(folder, change)

    def configure(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        found["format"] = found["config_groups"]["group_0"]["format"] = "pack-quantized"

    edit_config(folder, configure)
    (folder / "sliderquant-checksums.json").unlink()


def weights(model: Any) -> dict[str, QuantizedWeight]:
    return {name: module.quantized() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def same(one: Any, other: Any) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, parts in first.items():
        for part, expected in zip(parts, second[name], strict=True):
            assert (part is None) == (expected is None)
            assert part is None or torch.equal(part, expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written(dtype: str, tiny: Tiny) -> None:
    made = tiny(INT8, dtype=dtype)
    tensors = load_file(made.path / "model.safetensors")
    assert {key for key in tensors if key.startswith(NAME)} == {f"{NAME}.weight", f"{NAME}.weight_scale"}
    weight, scale = tensors[f"{NAME}.weight"], tensors[f"{NAME}.weight_scale"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (128, 256))
    assert (scale.dtype, tuple(scale.shape)) == (getattr(torch, dtype), (128, 1))
    # Products of an int8 and a bf16 are exact in fp32: bit for bit what was trained.
    dense = made.model.get_parameter(f"{NAME}.weight")
    assert torch.equal((weight.float() * scale.float()).to(dense.dtype), dense)
    found = verify(made.path)
    assert (found.ok, found.problems) == (True, ())
    checkpoint = read_checkpoint(made.path)
    assert {str(scheme) for scheme in checkpoint.schemes.values()} == {INT8}
    assert checkpoint.linear_shapes[NAME] == (128, 256)
    assert checkpoint.codes_of(NAME).dtype == "I8"


def test_estimated_bytes_are_those_of_the_tensors() -> None:
    assert Scheme.parse(INT8).stored_bytes(96, 130) == 96 * 130 + 96 * 2
    assert Scheme.parse("W8A16-sym").stored_bytes(96, 130) == 96 * 132 + 96 * 2 + 16


def test_damage_is_found(tiny: Tiny) -> None:
    folder = tiny(INT8).path
    rewrite(folder, lambda tensors: tensors[f"{NAME}.weight"][3, 5].add_(1))
    assert any(f"tensor {NAME}.weight is damaged" in problem for problem in verify(folder).problems)


@torch.no_grad()
def test_a_loaded_model_is_the_stored_one(tiny: Tiny) -> None:
    made = tiny(INT8)
    merged, single = load(made.path, "cpu"), load(made.path, "cpu", merge=False)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, LinearSlice)
    for name, module in single.named_modules():
        if isinstance(module, QuantizedLinear):
            dense = made.model.get_submodule(name).weight
            assert torch.equal(module.dequantize(), dense)
            assert torch.equal(merged.get_submodule(name).dequantize(), dense)
    assert torch.equal(merged(IDS).logits, single(IDS).logits)
    split_linears(merged)
    same(merged, single)


@torch.no_grad()
def test_save_pretrained(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny(INT8, dtype="bfloat16", tie_word_embeddings=True)
    model = load(made.path, "cpu")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (made.path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(load(tmp_path / "again", "cpu")(IDS).logits, model(IDS).logits)
    assert (
        verify(tmp_path / "again").problems
        == ("sliderquant-checksums.json: missing: the folder is incomplete, or was saved again by another tool",)
        or verify(tmp_path / "again").ok
    )


def test_load_state_dict(tiny: Tiny) -> None:
    made = tiny(INT8)
    model = load(made.path, "cpu")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    key = "model.layers.1.self_attn.k_proj.weight"
    assert state[key].dtype == torch.int8
    state[key] = -(state[key].clamp(-127))
    model.load_state_dict(state)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.quantized().codes, (state[key].short() + 128).byte())
    with pytest.raises(RuntimeError, match=r"k_proj.weight is \[64, 127\], expected \[64, 128\]"):
        model.load_state_dict({**state, key: state[key][:, :-1]})
    with pytest.raises(RuntimeError, match=r"Missing key.*k_proj.weight"):
        model.load_state_dict({name: tensor for name, tensor in state.items() if name != key})


@torch.no_grad()
def test_packed_by_an_earlier_version(tiny: Tiny, edit_config: Edit, tmp_path: Path) -> None:
    made = tiny(INT8)
    expected = load(made.path, "cpu")
    to_packed(made.path, edit_config)
    assert read_checkpoint(made.path).codes_of(NAME).dtype == "I32"
    model = load(made.path, "cpu")
    same(model, expected)
    model.save_pretrained(tmp_path / "again")  # as it is written now
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "int-quantized"
    same(load(tmp_path / "again", "cpu"), expected)


@pytest.mark.parametrize("named", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("scheme", ["W8A8-sym", "W8A16", "W4A8-g64-sym-act-sym", "W4A16-g64", "W2A16-sym"])
@torch.no_grad()
def test_other_schemes_of_other_tools(scheme: str, named: str, tiny: Tiny, edit_config: Edit, tmp_path: Path) -> None:
    made = tiny(scheme)
    expected = load(made.path, "cpu")
    to_int8(made.path, edit_config, named)
    assert {str(found) for found in read_checkpoint(made.path).schemes.values()} == {scheme}
    model = load(made.path, "cpu")
    same(model, expected)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").codes_of(NAME).dtype == "I32"
    same(load(tmp_path / "again", "cpu"), expected)


def test_of_llm_compressor(tiny: Tiny, edit_config: Edit) -> None:
    """Its W8A8: no format in the group, fields that sliderquant does not write."""
    made = tiny(INT8)
    expected = load(made.path, "cpu")

    def configure(config: dict[str, Any]) -> None:
        del config["sliderquant"]
        found = config["quantization_config"]
        found |= {"version": "0.12.2", "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}
        group = found["config_groups"]["group_0"]
        del group["format"]
        common = {"actorder": None, "block_structure": None, "observer_kwargs": {}, "group_size": None}
        group["weights"] |= common | {"observer": "minmax"}
        group["input_activations"] |= common | {"observer": None}

    edit_config(made.path, configure)
    for name in ("sliderquant-report.json", "sliderquant-checksums.json", "README.md"):
        (made.path / name).unlink()
    same(load(made.path, "cpu"), expected)
    found = verify(made.path)
    assert (found.ok, found.has_checksums) == (True, False)


def test_two_formats_in_one_model(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny("W8A8-g64-sym-act-sym", down_proj=INT8)
    checkpoint = read_checkpoint(made.path)
    assert checkpoint.codes_of(NAME).dtype == "I8"
    assert checkpoint.codes_of("model.layers.0.mlp.up_proj").dtype == "I32"
    assert verify(made.path).ok
    model = load(made.path, "cpu")
    model.save_pretrained(tmp_path / "again")
    same(load(tmp_path / "again", "cpu"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(128, 256)}, f"tensor {NAME}.weight has dtype F32, expected I8"),
        ({"weight": torch.zeros(128, 255, dtype=torch.int8)}, "is [128, 255], but by config.json the layer is"),
        ({"weight": torch.zeros(128 * 256, dtype=torch.int8)}, "has shape [32768], expected [out, in]"),
        ({"weight_scale": torch.zeros(128)}, "weight_scale has shape [128], expected [128, 1]: weight is [128, 256]"),
        ({"weight_scale": torch.zeros(128, 1, dtype=torch.int8)}, "has dtype I8, expected BF16 or F16 or F32"),
        ({"weight_scale": None}, f"{NAME}.weight_scale is missing: config.json says that {NAME} is W8A8-sym-act-sym"),
        ({"weight": None}, f"tensor {NAME}.weight is missing"),
        ({"weight_zero_point": torch.zeros(128, 1, dtype=torch.int8)}, "weight_zero_point should not be there"),
        ({"weight_packed": torch.zeros(128, 64, dtype=torch.int32)}, "weight_packed should not be there"),
    ],
)
def test_parts_that_disagree(change: dict[str, torch.Tensor | None], message: str, tiny: Tiny) -> None:
    folder = tiny(INT8).path

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for part, value in change.items():
            tensors.pop(f"{NAME}.{part}", None)
            if value is not None:
                tensors[f"{NAME}.{part}"] = value

    rewrite(folder, apply)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert message in " ".join(verify(folder).problems)


def test_a_format_that_disagrees(tiny: Tiny, edit_config: Edit) -> None:
    def configure(config: dict[str, Any], named: str) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["format"] = named

    folder = tiny(INT8).path
    edit_config(folder, lambda config: configure(config, "pack-quantized"))
    with pytest.raises(CheckpointError, match=r"weight_shape is missing: config.json says .* pack-quantized"):
        read_checkpoint(folder)
    folder = tiny("W8A16-sym", "other").path
    edit_config(folder, lambda config: configure(config, "int-quantized"))
    with pytest.raises(CheckpointError, match=r"down_proj.weight is missing: config.json says .* int-quantized"):
        read_checkpoint(folder)


def test_an_int8_that_is_no_code(tiny: Tiny, edit_config: Edit) -> None:
    folder = tiny("W4A16-sym").path
    to_int8(folder, edit_config)
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(8))
    with pytest.raises(
        CheckpointError, match=r"layer model.layers.1.mlp.up_proj cannot be .*weight holds a value outside of -8"
    ):
        load(folder)
