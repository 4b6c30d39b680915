"""SmoothQuant: the scales are the formula's, on statistics taken from the original model."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sliderquant
from sliderquant.cli import app
from sliderquant.errors import InputError
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme


def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def logits_error(result, folder, ids):
    want, got = (
        model(input_ids=ids, use_cache=False).logits
        for model in (original(folder), result.load(device="cpu", dtype="float32"))
    )
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_norms_and_weights_of_the_first_layer_are_those_of_the_formula(
    run, blocks, inputs_of, random_model, tmp_path, ratio
):
    folder = random_model(tmp_path / "model", model_type="qwen2")
    result = run(folder, "W8A8", "smoothquant", settings={"ratio": ratio})
    model, after = original(folder), load_file(result.path / "model.safetensors")
    loaded = sliderquant.load(result.path, "cpu", dtype="float32", merge=False)
    for norm, names in (
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        names = [f"model.layers.0.{name}" for name in names]
        x = inputs_of(model, names[:1], blocks(folder))[names[0]]
        largest = x.abs().amax(0)
        weights = [model.get_submodule(name).weight for name in names]
        scale = largest**ratio / torch.cat(weights).abs().amax(0) ** (1 - ratio)
        stored = after[f"model.layers.0.{norm}.weight"]
        old = model.get_submodule(f"model.layers.0.{norm}").weight
        assert stored.dtype == torch.bfloat16
        assert torch.allclose(stored.float(), old / scale, rtol=2**-8)
        # The columns are multiplied by what the stored norm really divides by.
        implied = old / stored.float()
        for name, weight in zip(names, weights, strict=True):
            want = dequantize(round_to_nearest(weight * implied, Scheme(8), torch.bfloat16), Scheme(8))
            assert torch.equal(loaded.get_submodule(name).dequantize(), want)
            error = ((x / implied) @ want.T - x @ weight.T).square().sum() / (x @ weight.T).square().sum()
            reported = result.report["layer_errors"][0]["linears"][name.removeprefix("model.layers.0.")]["error"]
            assert reported == pytest.approx(error.item(), rel=1e-2)
        found = result.report["layer_errors"][0]["scales"][norm]
        assert found["largest"] == pytest.approx(implied.max().item(), rel=1e-6)
        assert found["smallest"] == pytest.approx(implied.min().item(), rel=1e-6)


@pytest.mark.parametrize("rotate", [[], ["R1", "R2", "R4"]], ids=["plain", "rotated"])
def test_what_is_written_computes_what_the_original_does(run, blocks, random_model, tmp_path, rotate):
    folder = random_model(tmp_path / "model", model_type="qwen3")
    result = run(folder, "W8A8", "smoothquant", rotate=rotate)
    assert logits_error(result, folder, blocks(folder)) < 0.03
    assert all(0 < found["error"] < 1e-3 for found in result.report["layer_errors"][1]["linears"].values())


def test_it_is_better_than_rounding_to_nearest_where_there_are_outliers(run, blocks, outliers):
    ids = blocks(outliers)
    smooth, nearest = run(outliers, "W4A4", "smoothquant", "smooth"), run(outliers, "W4A4", "rtn", "rtn")
    assert logits_error(smooth, outliers, ids) < 0.8 * logits_error(nearest, outliers, ids)


def test_the_report_has_the_error_with_rounded_activations(run, tiny_llama):
    four, eight = (run(tiny_llama, scheme, "smoothquant", scheme).report["layer_errors"] for scheme in ("W8A4", "W8A8"))
    assert all(rough["error"] > 10 * fine["error"] for rough, fine in zip(four, eight, strict=True))


def test_the_same_seed_writes_the_same_bytes(run, tiny_llama):
    files = [
        (run(tiny_llama, "W4A8", "smoothquant", name).path / "model.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_activations_of_16_bits_are_refused_before_any_work(run, tiny_llama, tmp_path):
    with pytest.raises(InputError, match="method smoothquant with scheme W4A16: it makes activations easier to round"):
        run(tiny_llama, "W4A16", "smoothquant")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"setting 'ratio': expected .*, at least 0 and at most 1, got 1.5"):
        sliderquant.plan(tiny_llama, "W4A4", "smoothquant", {"ratio": 1.5}, seqlen=32)


def test_the_command_line(tiny_llama, calibration_file, tmp_path):
    out = tmp_path / "out"
    text = ["--calibration", str(calibration_file), "--samples", "4", "--seqlen", "32"]
    arguments = ["quantize", str(tiny_llama), "--method", "smoothquant", "--scheme", "W4A4KV4", "--set", "ratio=0.6"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(out), "-q", *text])
    assert done.exit_code == 0, done.output
    assert sliderquant.load(out, "cpu") is not None
    refused = CliRunner().invoke(app, [*arguments, "--scheme", "W4A16", "--dry-run"])
    assert refused.exit_code == 2
    assert "method smoothquant with scheme W4A16" in " ".join(refused.stderr.split())
