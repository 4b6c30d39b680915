import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sliderquant.checkpoint import verify
from sliderquant.errors import InputError

Tiny = Callable[..., SimpleNamespace]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_an_intact_checkpoint(tiny: Tiny) -> None:
    found = verify(tiny(max_shard_bytes=60_000).path)
    assert found.ok
    assert found.problems == ()
    assert found.files > 12
    assert found.tensors == 14 * 4 + 7


def test_any_flipped_bit_in_any_file(tiny: Tiny) -> None:
    folder = tiny(max_shard_bytes=150_000).path
    chance = random.Random(0)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert "sliderquant-checksums.json" in {path.name for path in paths}
    for path in paths:
        size = path.stat().st_size * 8
        # The ends, and bits anywhere: of a safetensors file, in its header too.
        for bit in {0, size - 1, chance.randrange(size), chance.randrange(size), chance.randrange(min(size, 8000))}:
            flip(path, bit)
            problems = verify(folder).problems
            assert any(path.name in problem for problem in problems), (path.name, bit, problems)
            flip(path, bit)
    assert verify(folder).ok


def test_the_damaged_tensor_is_named(tiny: Tiny) -> None:
    folder = tiny().path
    path = folder / "model.safetensors"
    key = "model.layers.1.mlp.up_proj.weight_scale"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    flip(path, (8 + header_bytes + header[key]["data_offsets"][0]) * 8 + 3)
    assert verify(folder).problems == (
        f"model.safetensors: tensor {key} is damaged: its SHA-256 is not the recorded one",
    )


def test_a_header_that_means_the_same(tiny: Tiny) -> None:
    path = tiny().path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "np"})
    (problem,) = verify(path.parent).problems
    assert problem.startswith("model.safetensors: damaged header: its tensors are intact")


def test_a_truncated_file(tiny: Tiny) -> None:
    path = tiny().path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(path.parent).problems[0].startswith("model.safetensors: damaged header, or truncated")


def test_a_missing_file(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / "tokenizer.json").unlink()
    assert verify(folder).problems == ("tokenizer.json: missing",)


def test_missing_checksums(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / "sliderquant-checksums.json").unlink()
    found = verify(folder)
    assert not found.has_checksums
    assert found.problems[0].startswith("sliderquant-checksums.json: missing")


def test_an_added_weights_file(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert verify(folder).problems == (
        "model-00002-of-00002.safetensors: not in sliderquant-checksums.json: it was added later",
    )


def test_files_that_a_hub_adds_are_not_a_problem(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert verify(folder).ok


def test_structure_is_checked_too(tiny: Tiny, edit_config: Callable[..., None]) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(hidden_size=256))
    problems = verify(folder).problems
    assert problems[0].startswith("config.json: changed or damaged")
    assert "by config.json the layer is" in problems[1]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the folder of a quantized checkpoint"):
        verify(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="this model is not quantized"):
        verify(tmp_path)


def test_tensors_are_listed_by_file(tiny: Tiny) -> None:
    folder = tiny(max_shard_bytes=60_000).path
    listed = json.loads((folder / "sliderquant-checksums.json").read_text())["tensors"]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert set(listed[path.name]) == set(file.keys())
