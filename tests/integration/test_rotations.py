"""Rotated checkpoints: what is loaded computes what was folded, rounded and written."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

import sliderquant
from sliderquant.checkpoint import describe, verify
from sliderquant.cli import app
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.source import open_model
from sliderquant.modules.rotated import RotatedLinear, insert_rotations
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme
from sliderquant_kernels import quantize_activations

CPU = torch.device("cpu")
ALL = ["R1", "R2", "R4"]


def simulated(folder, scheme, names, seed, checkpoint=None):
    """The rotated model, weights rounded to nearest and inputs of the linears to the grid of their token, and queries,
    keys and values to that of their head, in fp32.

    Args:
        checkpoint: whose weights it has instead.
    """
    source = open_model(folder)
    rotations = Rotations.of_model(source, names, seed)
    rotated = RotatedSource.of(source, rotations)
    model = AutoModelForCausalLM.from_config(rotated.config, dtype=torch.float32).eval().requires_grad_(False)
    weights = {name: rotated.weight(name, CPU) for name in rotated.files}

    def rounded_input(_, arguments):
        bits, symmetric = scheme.linear.activation_bits, scheme.linear.activation_symmetric
        return (quantize_activations(arguments[0], bits, symmetric).dequantize(),)

    for name in source.linear_names:
        rounded = round_to_nearest(weights[f"{name}.weight"], scheme.linear, source.dtype)
        weights[f"{name}.weight"] = dequantize(rounded, scheme.linear)
        if scheme.quantizes_activations:
            model.get_submodule(name).register_forward_pre_hook(rounded_input)
    if checkpoint is not None:
        loaded = sliderquant.load(checkpoint, "cpu", dtype="float32", merge=False)
        weights |= {name: x.float() for name, x in loaded.state_dict().items() if name in weights}
        for name in source.linear_names:
            linear = loaded.get_submodule(name)
            weights[f"{name}.weight"] = getattr(linear, "linear", linear).dequantize()
    model.load_state_dict(weights, strict=False)
    insert_rotations(model, source.family, rotations)
    if scheme.quantizes_attention:
        AttentionInterface.register("by_hand", partial(attention_by_hand, rotations, scheme.kv_bits))
        model.set_attn_implementation("by_hand")
    return model


def attention_by_hand(rotations, bits, module, query, key, value, attention_mask, **keywords):
    """Of [batch, heads, tokens, head_dim], with as few heads of keys and values as there are."""
    if "R3" in rotations.transforms:
        query, key = (rotations.query_key(module.layer_idx)(x) for x in (query, key))
    query, key, value = (quantize_activations(x, bits, symmetric=False).dequantize() for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


@torch.no_grad()
def logits(model):
    ids = torch.randint(2, 2048, (2, 24), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, use_cache=False).logits


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def tiny(random_model, tmp_path_factory):
    """Two layers, biases on q, k and v, grouped-query attention, tied embeddings."""
    return random_model(tmp_path_factory.mktemp("tiny") / "model", dtype="float32", model_type="qwen2")


@pytest.fixture(scope="module")
def rotated(tiny, tmp_path_factory):
    return sliderquant.quantize(
        tiny, tmp_path_factory.mktemp("out") / "rotated", scheme="W4A16-g32", method="rtn", rotate=ALL, device="cpu"
    ).path


# Where a CPU adds in another order, the rounding of an input may fall the other way: some 3e-7 are what is seen.
@pytest.mark.parametrize(
    ("scheme", "tolerance"), [("W4A16", 1e-5), ("W3A16-g32-sym", 1e-5), ("W8A8", 5e-3), ("W4A4", 3e-2)]
)
@pytest.mark.parametrize("names", [["R1", "R2"], ALL], ids="+".join)
def test_the_loaded_model_is_the_simulation(tiny, tmp_path, scheme, tolerance, names):
    result = sliderquant.quantize(
        tiny, tmp_path / "out", scheme=scheme, method="rtn", rotate=names, seed=6, device="cpu"
    )
    got = logits(result.load(device="cpu", dtype="float32"))
    assert relative_error(got, logits(simulated(tiny, ModelScheme.parse(scheme), names, 6))) < tolerance


# As above: a code more or less, of many.
@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant"])
def test_with_all_four_rotations(tiny, tmp_path, calibration_file, method):
    def quantize(scheme):
        text = [] if method == "rtn" else ["--calibration", str(calibration_file), "--samples", "4", "--seqlen", "32"]
        out = tmp_path / f"{method}-{scheme}"
        arguments = ["--scheme", scheme, "--method", method, "--rotate", "R1,R2,R3,R4", "--seed", "6", "-q", *text]
        done = CliRunner().invoke(app, ["quantize", str(tiny), "-o", str(out), *arguments])
        assert done.exit_code == 0, done.output
        return out

    every, out = [*ALL, "R3"], quantize("W4A4KV4")
    got = logits(sliderquant.load(out, "cpu", dtype="float32"))
    scheme, stored = ModelScheme.parse("W4A4KV4"), None if method == "rtn" else out
    assert relative_error(got, logits(simulated(tiny, scheme, every, 6, stored))) < 3e-2
    # That is less than what one of the rotations does.
    assert relative_error(got, logits(simulated(tiny, scheme, ALL, 6, stored))) > 5e-2
    original = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval())
    assert relative_error(logits(sliderquant.load(quantize("W8A8KV8"), "cpu", dtype="float32")), original) < 0.05


def test_it_is_close_to_the_original(tiny, tmp_path):
    original = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval())
    result = sliderquant.quantize(tiny, tmp_path / "out", scheme="W8A16", method="rtn", rotate=ALL, device="cpu")
    model = result.load(device="cpu")
    assert relative_error(logits(model), original) < 0.03
    for layer in model.model.layers:
        layer.mlp.down_proj = layer.mlp.down_proj.linear
    assert relative_error(logits(model), original) > 0.3


def test_only_folded_rotations_leave_a_checkpoint_that_others_read(tiny, tmp_path):
    path = sliderquant.quantize(
        tiny, tmp_path / "out", scheme="W4A16-sym", method="rtn", rotate=["R1", "R2"], device="cpu"
    ).path
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["sliderquant"]["rotations"].keys() == {"seed", "R1", "R2"}
    other = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert relative_error(logits(other), logits(sliderquant.load(path, "cpu"))) < 1e-4


def test_what_the_folder_says(rotated):
    config = json.loads((rotated / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sliderquant"
    assert config["sliderquant"]["rotations"]["R4"]["n"] == 96
    assert not config.get("tie_word_embeddings")
    assert verify(rotated).ok
    assert describe(rotated).rotations == ALL
    card = (rotated / "README.md").read_text()
    assert "| rotations | R1, R2, R4; R4 while the model runs |" in card
    assert "No other tool than sliderquant runs this model" in card
    assert "vllm serve" not in card
    assert 'from_pretrained("MODEL",' not in card


def test_it_is_saved_and_loaded_again(rotated, tmp_path):
    model = sliderquant.load(rotated, "cpu")
    assert sum(isinstance(module, RotatedLinear) for module in model.modules()) == 2
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (rotated, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(sliderquant.load(tmp_path / "again", "cpu")), logits(model))


def test_it_generates(rotated):
    model = sliderquant.load(rotated, "cpu")
    start = torch.tensor([[5, 6, 7]])
    with_cache, without = (
        model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_the_same_seed_writes_the_same_bytes(tiny, rotated, tmp_path):
    again = sliderquant.quantize(
        tiny, tmp_path / "out", scheme="W4A16-g32", method="rtn", rotate=ALL, device="cpu"
    ).path
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (rotated / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["sliderquant"].pop("rotations"), "quant_method is 'sliderquant', but .* describes none that are"),
        (
            lambda c: c["quantization_config"].update(quant_method="compressed-tensors"),
            "quant_method is 'compressed-tensors', but sliderquant describes rotations, roundings or clippings",
        ),
        (lambda c: c["sliderquant"]["rotations"].update(R4={"n": 3}), r"sliderquant\.rotations: R4 is not a Hadamard"),
        (lambda c: c["sliderquant"].update(rotations=4), "sliderquant.rotations is 4, expected a JSON object"),
        (
            lambda c: c["sliderquant"]["rotations"].update(R4=c["sliderquant"]["rotations"]["R1"]),
            "R4 is of size 64, but the input of down_proj has 96 channels",
        ),
    ],
)
def test_damaged_descriptions_are_refused(rotated, tmp_path, change, message):
    copy = shutil.copytree(rotated, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        sliderquant.load(copy, "cpu")


@pytest.mark.parametrize(
    ("rotate", "message"),
    [
        (["R3"], "rotate R3: of use only where queries and keys are quantized, which W4A16-g128 does not"),
        (["R1", "X"], "rotations X: expected some of R1, R2, R3, R4"),
    ],
)
def test_what_makes_no_sense_is_refused_first(tiny, tmp_path, rotate, message):
    with pytest.raises(InputError, match=message):
        sliderquant.quantize(tiny, tmp_path / "out", method="rtn", rotate=rotate, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("scheme", "rotate"), [("W4A16", ["R1", "R2"]), ("W8A8KV8", [*ALL, "R3"])])
def test_sliderquant_learns_on_a_rotated_model(tiny, tmp_path, calibration_file, scheme, rotate):
    result = sliderquant.quantize(
        tiny,
        tmp_path / "out",
        scheme=scheme,
        rotate=rotate,
        settings={"epochs": 2},
        calibration=str(calibration_file),
        samples=4,
        seqlen=32,
        device="cpu",
    )
    original = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval())
    assert relative_error(logits(result.load(device="cpu")), original) < 0.5
    assert result.report["rotations"]["seed"] == 2


def test_the_command_line(tiny, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["quantize", str(tiny), "--scheme", "W4A4", "--method", "rtn", *arguments])

    planned = run("--dry-run", "--rotate", "r1, R2,R4")
    assert planned.exit_code == 0, planned.output
    assert "rotations   R1, R2, R4" in planned.stdout
    done = run("-o", str(tmp_path / "out"), "--rotate", "R1,R2,R4", "-q")
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--verify"])
    assert "rotations   R1, R2, R4" in shown.stdout
    refused = run("--dry-run", "--rotate", "R7")
    assert refused.exit_code == 2
    assert "rotations R7: expected some of R1, R2, R3, R4" in refused.stderr
