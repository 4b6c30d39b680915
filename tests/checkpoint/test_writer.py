import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sliderquant.checkpoint import CheckpointWriter, read_checkpoint, shards, staging, verify, writer
from sliderquant.errors import CheckpointError, InputError
from sliderquant.loading import load
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, round_to_nearest
from sliderquant.schemes import Scheme

SCHEME = Scheme(3, 32)
Tiny = Callable[..., SimpleNamespace]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_one(target: CheckpointWriter, name: str = "model.layers.0.mlp.up_proj") -> None:
    quantized = round_to_nearest(torch.randn(8, 64), SCHEME, torch.float32)
    target.add_quantized(name, quantized, SCHEME, dequantize(quantized, SCHEME))


def test_what_is_in_the_folder(tiny: Tiny, source: Path) -> None:
    folder = tiny().path
    assert set(contents(folder)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tools.jinja",
        "LICENSE",
        "README.md",
        "sliderquant-report.json",
        "sliderquant-checksums.json",
    }
    assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert json.loads((folder / "sliderquant-report.json").read_text())["method"] == "rtn"
    config = json.loads((folder / "config.json").read_text())
    assert config["sliderquant"]["format_version"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert verify(folder).ok
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_dense_tensors_are_verbatim(tiny: Tiny) -> None:
    made = tiny(dtype="bfloat16")
    stored = load_file(made.path / "model.safetensors")
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert stored[key].dtype == torch.bfloat16
        assert torch.equal(stored[key], made.model.state_dict()[key])


def test_same_inputs_same_bytes(tiny: Tiny) -> None:
    assert contents(tiny(folder="one").path) == contents(tiny(folder="two").path)


def test_shards(tiny: Tiny) -> None:
    whole = load_file(tiny(folder="whole").path / "model.safetensors")
    folder = tiny(folder="sharded", max_shard_bytes=60_000).path
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 60_000 for file in files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    merged = {}
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"][key] == file.name for key in tensors)
        merged |= tensors
    assert merged.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[key], whole[key]) for key in whole)
    assert verify(folder).ok


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tiny: Tiny) -> None:
    assert verify(tiny(max_shard_bytes=1).path).ok


def test_two_schemes(tiny: Tiny) -> None:
    folder = tiny("W4A16-g64", down_proj="W4A16").path
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 2
    assert groups["group_1"]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    schemes = read_checkpoint(folder).schemes
    assert {str(scheme) for name, scheme in schemes.items() if name.endswith("down_proj")} == {"W4A16"}
    assert {str(scheme) for name, scheme in schemes.items() if not name.endswith("down_proj")} == {"W4A16-g64"}


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(InputError, match="out exists already"):
        CheckpointWriter(tmp_path / "out")
    assert contents(tmp_path) == {"notes": b"mine"}


def test_an_empty_folder_is_filled(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    folder = tiny().path
    assert verify(folder).ok
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_of_the_umask(umask: int, tiny: Tiny, source: Path) -> None:
    (source / "LICENSE").chmod(0o400)
    before = os.umask(umask)
    try:
        folder = tiny(max_shard_bytes=60_000).path
    finally:
        os.umask(before)
        (source / "LICENSE").chmod(0o644)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
    wrong = {name: oct(mode) for name, mode in modes.items() if mode not in (0o666 & ~umask, 0o777 & ~umask)}
    assert not wrong


def test_links_are_followed(tiny: Tiny, source: Path, tmp_path: Path) -> None:
    """As in the cache of the hub."""
    (tmp_path / "blob").write_text("of a tokenizer")
    (source / "tekken.json").symlink_to(tmp_path / "blob")
    try:
        folder = tiny().path
    finally:
        (source / "tekken.json").unlink()
    assert not (folder / "tekken.json").is_symlink()
    assert (folder / "tekken.json").read_text() == "of a tokenizer"


def test_a_weight_that_its_dtype_does_not_hold(tmp_path: Path) -> None:
    quantized = QuantizedWeight(
        torch.full((8, 64), 7, dtype=torch.uint8),
        torch.full((8, 2), 6e4, dtype=torch.float16),
        torch.zeros(8, 2, dtype=torch.uint8),
    )
    with (
        CheckpointWriter(tmp_path / "out") as target,
        pytest.raises(CheckpointError, match=r"more than torch\.float16"),
    ):
        target.add_quantized("model.x", quantized, SCHEME, dequantize(quantized, SCHEME))


def test_overwriting_replaces_a_checkpoint(tiny: Tiny) -> None:
    folder = tiny("W4A16-g64").path
    (folder / "extra").write_text("of the old one")
    assert tiny("W2A16-g32", overwrite=True).path == folder
    assert {str(scheme) for scheme in read_checkpoint(folder).schemes.values()} == {"W2A16-g32"}
    assert not (folder / "extra").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "original model", "other folder"])
def test_overwriting_replaces_nothing_else(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("text")
    else:
        out.mkdir()
        (out / ("config.json" if kind == "original model" else "thesis.tex")).write_text("{}")
    with pytest.raises(InputError, match=r"out is (a file|not a quantized checkpoint)"):
        CheckpointWriter(out, overwrite=True)
    assert out.exists()


def test_too_little_space_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(InputError, match=r"needs about 2.5 GB, but only 1 GB are free"):
        CheckpointWriter(tmp_path / "new" / "out", estimated_bytes=2_500_000_000)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"), CheckpointWriter(tmp_path / "file" / "out"):
        pass


def test_shard_size_is_positive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_shard_bytes is 0"):
        CheckpointWriter(tmp_path / "out", max_shard_bytes=0)


def write_and(action: Callable[[], None], out: Path) -> None:
    with CheckpointWriter(out, max_shard_bytes=1) as target:
        add_one(target)
        assert any(path.name.startswith(".out.partial-") for path in out.parent.iterdir())
        action()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        write_and(fail, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_without_finish(tmp_path: Path) -> None:
    write_and(lambda: None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_after_sigterm(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        write_and(lambda: os.kill(os.getpid(), signal.SIGTERM), tmp_path / "out")
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sigterm_handler_of_the_program_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with CheckpointWriter(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("where", ["shard", "tokenizer"])
def test_a_full_disk(error: Exception, where: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny().path
    before = contents(old)

    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    if where == "shard":
        monkeypatch.setattr(shards, "save_file", fail)
    else:
        monkeypatch.setattr(writer.shutil, "copyfile", fail)
    with pytest.raises(CheckpointError, match=r"disk full while writing .*: needs about \S+ GB, free \S+ GB"):
        tiny("W2A16", overwrite=True)
    monkeypatch.undo()
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_other_errors_of_the_disk_are_not_called_full(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        tiny()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_the_old_checkpoint_survives_a_failing_rename(
    failing_call: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny().path
    before = contents(old)
    calls = 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        os.replace(source, target)

    monkeypatch.setattr(staging.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        tiny("W2A16", overwrite=True)
    monkeypatch.undo()
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_checkpoint_that_appeared_meanwhile_is_not_replaced(tiny: Tiny, source: Path, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "late") as target:
        made = tiny()
        shutil.copytree(made.path, tmp_path / "late")
        before = contents(tmp_path / "late")
        stored = load_file(made.path / "model.safetensors")
        for key, tensor in stored.items():
            target.add_tensor(key, tensor)
        target._schemes = dict(read_checkpoint(made.path).schemes)
        with pytest.raises(InputError, match="late exists already"):
            target.finish(made.model.config, source)
    assert contents(tmp_path / "late") == before


def test_a_weight_that_is_not_the_trained_one(tmp_path: Path) -> None:
    quantized = round_to_nearest(torch.randn(8, 64), SCHEME, torch.bfloat16)
    trained = dequantize(quantized, SCHEME)
    trained[3, 5] = torch.nextafter(trained[3, 5], torch.tensor(9.0))
    expected = "layer model.x: the packed weight is not the trained one .1 of 512 weights differ"
    with CheckpointWriter(tmp_path / "out") as target, pytest.raises(CheckpointError, match=expected):
        target.add_quantized("model.x", quantized, SCHEME, trained)


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as target:
        target.add_tensor("a", torch.ones(2))
        with pytest.raises(CheckpointError, match="tensor a was written twice"):
            target.add_tensor("a", torch.ones(2))


def test_tensors_that_share_memory_and_change_later(tmp_path: Path) -> None:
    target = shards.ShardWriter(tmp_path, 10**9)
    shared = torch.arange(6.0)
    target.add("a", shared)
    target.add("b", shared.view(2, 3).T)
    shared.zero_()
    target.finish()
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert stored["b"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_forgotten_tensor_is_noticed_before_it_is_visible(tiny: Tiny, source: Path, tmp_path: Path) -> None:
    made = tiny()
    stored = load_file(made.path / "model.safetensors")
    with CheckpointWriter(tmp_path / "next") as target:
        for key, tensor in stored.items():
            if key != "model.norm.weight":
                target.add_tensor(key, tensor)
        target._schemes = dict(read_checkpoint(made.path).schemes)
        with pytest.raises(CheckpointError, match=r"tensor model.norm.weight is missing"):
            target.finish(made.model.config, source)
    assert not (tmp_path / "next").exists()


def test_a_model_without_quantized_linears(tmp_path: Path, source: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as target, pytest.raises(CheckpointError, match="no quantized linear"):
        target.finish({}, source)


def test_use_outside_with(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        CheckpointWriter(tmp_path / "out").add_tensor("a", torch.ones(1))


def test_a_source_that_is_not_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny()
    with CheckpointWriter(tmp_path / "next") as target:
        add_one(target)
        with pytest.raises(InputError, match="source meta-llama/x: expected the local folder"):
            target.finish(made.model.config, "meta-llama/x")


def test_the_model_can_be_loaded_before_it_is_published(tiny: Tiny, source: Path, tmp_path: Path) -> None:
    made = tiny()
    out = tmp_path / "next"
    with CheckpointWriter(out) as target:
        with pytest.raises(RuntimeError, match="publish comes after write_model"):
            target.publish()
        for key, tensor in load_file(made.path / "model.safetensors").items():
            target.add_tensor(key, tensor)
        target._schemes = dict(read_checkpoint(made.path).schemes)
        folder = target.write_model(made.model.config, source)
        assert not out.exists()
        model = load(folder, "cpu")
        assert target.publish({"method": "rtn"}) == out
    assert verify(out).ok
    assert not folder.exists()
    ids = torch.arange(5)[None]
    assert torch.allclose(model(ids).logits, made.model(ids).logits, atol=1e-4)
