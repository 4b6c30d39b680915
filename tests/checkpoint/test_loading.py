import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import sliderquant
from sliderquant import loading
from sliderquant.checkpoint import CheckpointWriter, read_checkpoint
from sliderquant.checkpoint.packing import pack
from sliderquant.errors import CheckpointError, InputError
from sliderquant.loading import load
from sliderquant.modules import LinearSlice, MergedLinear, PackedLinear, QuantizedLinear
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, round_to_nearest
from sliderquant.schemes import Scheme

Tiny = Callable[..., SimpleNamespace]
DEMO = Path(sliderquant.__file__).parent / "assets" / "demo-llama-5m"
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 64


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert actual.dtype == expected.dtype
    assert (actual - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("scheme", ["W2A16-g32", "W3A16", "W4A16-g64", "W4A16-g128-sym", "W8A16-sym"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_stored_weights(scheme: str, tied: bool, tiny: Tiny) -> None:
    made = tiny(scheme, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model = load(made.path, "cpu")
    close(model(IDS).logits, made.model(IDS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sum(name.endswith("_proj") for name in linears) == 14
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert model.name_or_path == str(made.path)
    assert model.generation_config.temperature == 0.7


@torch.no_grad()
def test_shards_and_two_schemes(tiny: Tiny) -> None:
    made = tiny("W4A16-g64", down_proj="W3A16", max_shard_bytes=20_000)
    close(load(made.path, "cpu")(IDS).logits, made.model(IDS).logits)


@torch.no_grad()
def test_merging_across_shards(tiny: Tiny) -> None:
    """Linears that become one packed weight may lie in different files."""
    made = tiny("W3A16-g32", max_shard_bytes=8_000, attention_bias=True)
    files = read_checkpoint(made.path).files
    owner = {key: path for path in files for key in load_file(path)}
    prefix = "model.layers.0.self_attn"
    assert owner[f"{prefix}.q_proj.weight_packed"] != owner[f"{prefix}.k_proj.weight_packed"]
    merged, single = load(made.path, "cpu"), load(made.path, "cpu", merge=False)
    assert sum(isinstance(module, MergedLinear) for module in merged.modules()) == 4
    assert not any(isinstance(module, (MergedLinear, LinearSlice)) for module in single.modules())
    assert torch.equal(merged(IDS).logits, single(IDS).logits)
    state = merged.state_dict()
    for path in files:
        assert all(torch.equal(state[key], tensor) for key, tensor in load_file(path).items())


@torch.no_grad()
def test_rotary_frequencies_are_computed(tiny: Tiny) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    made = tiny(rope_parameters=rope)
    model = load(made.path, "cpu")
    assert torch.equal(model.model.rotary_emb.inv_freq, made.model.model.rotary_emb.inv_freq)
    close(model(IDS).logits, made.model(IDS).logits)


@pytest.mark.parametrize("text", ["{broken", '{"cache_implementation": "nosuch"}', "[]"])
def test_a_generation_config_that_cannot_be_read_is_ignored(
    text: str, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny()
    (made.path / "generation_config.json").write_text(text)
    assert load(made.path, "cpu").generate(IDS, max_new_tokens=2, pad_token_id=0).shape[1] == IDS.shape[1] + 2
    assert any("generation_config.json cannot be read and is ignored" in message for message in caplog.messages)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["auto", "float32", torch.bfloat16, "float16"])
@torch.no_grad()
def test_dtypes(stored: str, wanted: str | torch.dtype, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    made = tiny("W4A16-g64", dtype=stored)
    model = load(made.path, "cpu", wanted)
    expected = getattr(torch, stored) if wanted == "auto" else getattr(torch, str(wanted).removeprefix("torch."))
    if (stored, wanted) == ("float16", "auto"):  # slow on a CPU, which the user hears of
        expected = torch.bfloat16
    said = [message for message in caplog.messages if "is stored in float16" in message]
    assert len(said) == ((stored, wanted) == ("float16", "auto"))
    assert model.dtype == expected
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = model(IDS).logits
    assert logits.dtype == expected
    reference = made.model.float()(IDS).logits
    close(logits.float(), reference, 1e-5 if wanted == stored == "float32" else 3e-2)
    codes = model.model.layers[0].mlp.up_proj.quantized().codes
    assert torch.equal(codes, load(made.path, "cpu").model.layers[0].mlp.up_proj.quantized().codes)


@pytest.mark.parametrize("stored", ["float64", "auto", 5, ["bfloat16"]])
def test_a_dtype_that_config_json_names_and_nobody_has(
    stored: Any, tiny: Tiny, edit_config: Callable[..., None]
) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(dtype=stored))
    with pytest.raises(CheckpointError, match=r"config\.json: dtype is .*, expected float32, bfloat16 or float16"):
        load(folder, "cpu")
    assert load(folder, "cpu", "float32").config.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite(key: str, value: float, tiny: Tiny) -> None:
    folder = tiny().path
    tensors = load_file(folder / "model.safetensors")
    tensors[key].flatten()[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {key} holds values that are not finite"):
        load(folder, "cpu")


def test_a_configuration_that_wants_tuples(tiny: Tiny, edit_config: Callable[..., None]) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(return_dict=False))
    assert load(folder, "cpu").generate(IDS, max_new_tokens=2, pad_token_id=0).shape[1] == IDS.shape[1] + 2


def test_bad_arguments(tiny: Tiny) -> None:
    folder = tiny().path
    for attention in ("nosuch", "flash_attention_2"):  # the second needs a package and a GPU
        with pytest.raises(InputError, match=f"attn_implementation '{attention}'"):
            load(folder, "cpu", attn_implementation=attention)
    with pytest.raises(InputError, match="path None: expected the folder"):
        load(None)
    with pytest.raises(InputError, match="dtype 'float64' is not supported: expected auto, float32"):
        load(folder, dtype="float64")
    with pytest.raises(InputError, match="device 'gpu' is not understood: expected auto"):
        load(folder, device="gpu")
    with pytest.raises(InputError, match="device 'mps' is not supported: expected auto"):
        load(folder, device="mps")


def test_cuda_without_cuda(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tiny().path
    with pytest.raises(InputError, match=r"device 'cuda': this torch .* sees no CUDA GPU; use device='cpu'"):
        load(folder, device="cuda")
    assert load(folder, device="auto").device.type == "cpu"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="device 'cuda:2': there are 2 CUDA GPUs"):
        load("anything", device="cuda:2")


def test_a_plain_model_and_a_hub_id() -> None:
    with pytest.raises(InputError, match=r"this model is not quantized. Quantize it first"):
        load(DEMO)
    with pytest.raises(InputError, match="hf download someone/model"):
        load("someone/model")


def test_missing_and_unexpected_tensors(tiny: Tiny) -> None:
    folder = tiny().path
    rewrite(folder, lambda tensors: tensors.update(stray=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor stray is not part of the model"):
        load(folder)
    norms = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("input_layernorm", "self_attn.q_norm")]
    rewrite(folder, lambda tensors: [tensors.pop(key, None) for key in ["stray", *norms, "model.norm.weight"]])
    with pytest.raises(CheckpointError, match=r"tensors model.layers.0.input_layernorm.weight, .* are missing: the"):
        load(folder)


def test_a_whole_linear_is_missing(tiny: Tiny) -> None:
    folder = tiny().path
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "0.mlp.down_proj" in key])
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mlp.down_proj.weight is missing"):
        load(folder)


def test_a_dense_linear_that_should_be_packed(tiny: Tiny) -> None:
    made = tiny()
    name = "model.layers.0.mlp.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors[f"{name}.weight"] = made.model.get_parameter(f"{name}.weight").clone()

    rewrite(made.path, change)
    with pytest.raises(
        CheckpointError, match=rf"tensor {name}.weight is not packed, but config.json says .* W4A16-g64"
    ):
        load(made.path, "cpu")


def test_config_of_another_size(tiny: Tiny, edit_config: Callable[..., None]) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(intermediate_size=512))
    message = r"weight of .*down_proj is \[128, 256\], but by config.json the layer is \[128, 512\]"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    edit_config(folder, lambda config: config.update(intermediate_size=256, vocab_size=65))
    message = r"lm_head.weight has shape \[64, 128\], but by config.json it is \[65, 128\]"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_config_of_another_kind(tiny: Tiny, edit_config: Callable[..., None]) -> None:
    folder = tiny().path
    edit_config(folder, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"the model of config.json has no such layer"):
        load(folder)
    edit_config(folder, lambda config: config.update(model_type="from-the-future"))
    with pytest.raises(CheckpointError, match=r"the installed transformers cannot read this config.json"):
        load(folder)
    edit_config(folder, lambda config: config.pop("model_type"))
    with pytest.raises(CheckpointError, match=r"config.json has no model_type"):
        load(folder)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_values_that_cannot_be_packed(value: float, tiny: Tiny) -> None:
    folder = tiny().path
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight_scale"].fill_(value))
    with pytest.raises(CheckpointError, match=r"layer model.layers.1.mlp.up_proj cannot be packed .*scale"):
        load(folder)


@torch.no_grad()
def test_tied_weights_stored_under_the_other_name(tiny: Tiny) -> None:
    made = tiny(tie_word_embeddings=True)
    rewrite(made.path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    close(load(made.path, "cpu")(IDS).logits, made.model(IDS).logits)


@torch.no_grad()
def test_a_packed_output_head(tiny: Tiny, edit_config: Callable[..., None]) -> None:
    """Another tool may pack the head of a model that ties it."""
    made = tiny("W8A16-g64", tie_word_embeddings=True)
    scheme = Scheme.parse("W8A16-g64")
    head = round_to_nearest(made.model.lm_head.weight * 2, scheme, torch.float32)
    rewrite(made.path, lambda tensors: tensors.update({f"lm_head.{k}": v for k, v in pack(head, scheme).items()}))
    edit_config(made.path, lambda config: config["quantization_config"].update(ignore=[]))
    model = load(made.path, "cpu")
    assert isinstance(model.lm_head, PackedLinear)
    hidden = made.model.model(IDS).last_hidden_state
    close(model(IDS).logits, hidden @ dequantize(head, scheme).T)


def test_loaded_weights_do_not_depend_on_the_file(tiny: Tiny) -> None:
    made = tiny()
    model = load(made.path, "cpu")
    size = (made.path / "model.safetensors").stat().st_size
    with (made.path / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(model.model.embed_tokens.weight, made.model.model.embed_tokens.weight)


@torch.no_grad()
def test_save_pretrained_writes_a_correct_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny("W3A16-g32", dtype="bfloat16", tie_word_embeddings=True)
    model = load(made.path, "cpu")
    model.save_pretrained(tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").schemes == read_checkpoint(made.path).schemes
    before, after = (load_file(folder / "model.safetensors") for folder in (made.path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


# The memory of a model that is loaded


class LargestFloat(TorchDispatchMode):
    """Records the largest floating-point tensor that any operation returns, but for those on the meta device."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_filling_makes_no_dense_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny("W4A16-g64", dtype="bfloat16")
    largest = []

    def recording(inner: Callable[..., None]) -> Callable[..., None]:
        def outer(*arguments: Any) -> None:
            with LargestFloat() as recorded:
                inner(*arguments)
            largest.append(recorded.largest)

        return outer

    monkeypatch.setattr(loading, "_fill_dense", recording(loading._fill_dense))
    monkeypatch.setattr(loading, "_fill_packed", recording(loading._fill_packed))
    load(made.path, "cpu")
    embedding, smallest_of_interest = 64 * 128, 128 * 128
    assert largest[0] == embedding
    assert 0 < largest[1] < smallest_of_interest


# `modules` comes first here and last in the rest of this file: the two packages may be imported in either order.
PEAK = r"""
import re, sys
from pathlib import Path
import sliderquant.modules
from sliderquant.loading import load

def peak():  # getrusage would count the parent of this process
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

load(sys.argv[1])
before = peak()
model = load(sys.argv[2], "cpu")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_of_loading(tmp_path: Path, source: Path, tiny: Tiny) -> None:
    """In a process that has loaded a small model already, a larger one adds little more than its packed size."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
    small = tiny("W4A16-g128-sym", dtype="bfloat16")
    config = small.model.config.__class__(**(small.model.config.to_dict() | sizes | {"head_dim": 128}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    scheme = Scheme.parse("W4A16-g128-sym")
    dense_bytes = 0
    with CheckpointWriter(tmp_path / "large") as writer:
        for key, weight in model.state_dict().items():
            if key.endswith("proj.weight"):
                name, (out, inputs) = key.removesuffix(".weight"), weight.shape
                codes = torch.randint(0, 16, (out, inputs), dtype=torch.uint8)
                quantized = QuantizedWeight(codes, torch.ones(out, inputs // 128, dtype=torch.bfloat16), None)
                writer.add_quantized(name, quantized, scheme, codes.float() - 8)
                dense_bytes += 2 * weight.numel()
            else:
                writer.add_tensor(key, torch.ones(weight.shape, dtype=torch.bfloat16))
        writer.finish(config, source)
    arguments = [sys.executable, "-c", PEAK, str(small.path), str(tmp_path / "large")]
    added = 1024 * int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])
    # Packed: 0.26 of it. The rest is what packing one layer takes.
    assert added < 0.6 * dense_bytes, f"{added / dense_bytes:.2f} of the dense size"
