"""AWQ: the search against the same one done with whole models, clipping against every candidate tried by hand."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sliderquant
from sliderquant.baselines.awq import candidates, clipped
from sliderquant.cli import app
from sliderquant.errors import InputError
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme


def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def output_of(model, name, ids):
    """What a module of the model puts out, fp32 `[tokens, ...]`."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, a, out: found.append(out))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@torch.no_grad()
def logits_error(result, folder, ids):
    want, got = (
        model(input_ids=ids, use_cache=False).logits
        for model in (original(folder), result.load(device="cpu", dtype="float32"))
    )
    return ((got - want).norm() / want.norm()).item()


def test_the_ratios_are_those_of_whole_models(run, blocks, inputs_of, random_model, tmp_path):
    """Grouped-query attention: two query heads read each value."""
    folder = random_model(tmp_path / "model", model_type="qwen2")
    ids, scheme, ratios = blocks(folder), Scheme.parse("W2A16-g32"), 8
    report = run(folder, str(scheme), "awq", settings={"ratios": ratios, "clipping": False}).report["layer_errors"][0]
    model = original(folder)
    layer = "model.layers.0."
    sites = {
        "self_attn": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"),
        "mlp": (["mlp.gate_proj", "mlp.up_proj"], "mlp"),
        "self_attn.o_proj": (["self_attn.o_proj"], "self_attn.o_proj"),
        "mlp.down_proj": (["mlp.down_proj"], "mlp.down_proj"),
    }
    assert report["scales"].keys() == sites.keys()
    for site, (names, block) in sites.items():
        mean = inputs_of(model, [layer + names[0]], ids)[layer + names[0]].abs().mean(0)
        if site == "self_attn.o_proj":
            mean = mean.view(2, 2, 16).mean(1, keepdim=True).expand(-1, 2, -1).flatten()
        want = output_of(model, layer + block, ids)
        errors = []
        for i in range(ratios):
            scale = mean ** (i / ratios)
            scale = scale / (scale.max() * scale.min()).sqrt()
            changed = copy.deepcopy(model)
            for name in names:
                weight = changed.get_submodule(layer + name).weight
                weight.copy_(dequantize(round_to_nearest(weight * scale, scheme, torch.bfloat16), scheme) / scale)
            # The block alone on its own inputs: what is around it in the layer is the original's.
            errors.append((output_of(changed, layer + block, ids) - want).square().sum().item())
        best = min(range(ratios), key=errors.__getitem__)
        assert report["scales"][site]["ratio"] == best / ratios, site
        assert report["scales"][site]["error"] == pytest.approx(errors[best] / errors[0], rel=1e-3)


def on_the_grid(weight, bound, scheme):
    """Rounded to the grid of the range of each row within +- bound, fp32."""
    levels = 2**scheme.bits - 1
    low = weight.amin(1, keepdim=True).clamp(max=0).clamp(min=-bound)
    high = weight.amax(1, keepdim=True).clamp(min=0).clamp(max=bound)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = (span / levels).bfloat16().float()
    zero = torch.full_like(scale, (levels + 1) / 2) if scheme.symmetric else torch.round(-low / scale).clamp(0, levels)
    return ((torch.round(weight / scale) + zero).clamp(0, levels) - zero) * scale


@settings(deadline=None, max_examples=20)
@given(
    scheme=st.sampled_from(["W2A16", "W3A16-sym", "W4A16-g32", "W2A16-g64-sym"]).map(Scheme.parse),
    seed=st.integers(0, 10_000),
    steps=st.integers(2, 12),
)
def test_clipping_is_the_best_of_all_that_are_tried(scheme, seed, steps):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=g) ** 3 * 0.1
    x = torch.randn(90, 64, generator=g) * torch.rand(64, generator=g) * 4
    stored, share = clipped(weight, x.T @ x, scheme, torch.bfloat16, steps, 0.5)
    got = dequantize(stored, scheme)
    size = scheme.group_size or 64
    for start in range(0, 64, size):
        part = slice(start, start + size)
        errors = []
        for i in range(steps // 2 + 1):
            bound = weight[:, part].abs().amax(1, keepdim=True) * (1 - i / steps)
            value = on_the_grid(weight[:, part], bound, scheme)
            errors.append(((value - weight[:, part]).double() @ x[:, part].double().T).square().sum(1))
        mine = ((got - weight)[:, part].double() @ x[:, part].double().T).square().sum(1)
        assert torch.allclose(mine, torch.stack(errors).amin(0), rtol=1e-3)
    assert (share == 0) == torch.equal(got, dequantize(round_to_nearest(weight, scheme, torch.bfloat16), scheme))


def test_the_scales_that_are_tried():
    mean = torch.tensor([0.5, 2.0, 8.0])
    tried = candidates(mean, 4)
    assert len(tried) == 4
    assert torch.equal(tried[0], torch.ones(3))
    assert torch.allclose(tried[2], torch.tensor([0.5, 1.0, 2.0]))  # square roots, around 1
    assert all(torch.equal(scale, torch.ones(3)) for scale in candidates(torch.tensor([1.0, torch.inf, 2.0]), 4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rotate", [[], ["R1", "R2", "R4"]], ids=["plain", "rotated"])
def test_what_is_written_computes_what_the_original_does(run, blocks, random_model, tmp_path, family, rotate):
    """At 8 bits little is lost, but for scales that were merged on one side only."""
    folder = random_model(tmp_path / "model", model_type=family)
    result = run(folder, "W8A16", "awq", rotate=rotate, settings={"ratios": 4})
    sites = result.report["layer_errors"][1]["scales"]
    assert ("mlp.down_proj" in sites) == (not rotate)
    assert any(found["ratio"] > 0 for layer in result.report["layer_errors"] for found in layer["scales"].values())
    assert logits_error(result, folder, blocks(folder)) < 0.02


def test_norms_and_biases_of_the_checkpoint_are_the_merged_ones(run, random_model, tmp_path):
    folder = random_model(tmp_path / "model", model_type="llama", attention_bias=True, mlp_bias=True)
    result = run(folder, "W3A16-g32", "awq", settings={"ratios": 5})
    before, after = (load_file(path / "model.safetensors") for path in (folder, result.path))
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    parts = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias", "mlp.up_proj.bias")
    assert moved <= {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}
    for index, layer in enumerate(result.report["layer_errors"]):
        sites = dict(zip(parts, ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"), strict=True))
        for part, site in sites.items():
            assert (f"model.layers.{index}.{part}" in moved) == (layer["scales"][site]["ratio"] > 0)
    assert moved


def test_errors_are_those_of_what_the_layer_multiplies_once_scales_are_merged(
    run, blocks, inputs_of, random_model, tmp_path
):
    folder = random_model(tmp_path / "model", model_type="qwen2")
    result = run(folder, "W2A16-g32", "awq", settings={"ratios": 8})
    model, after = original(folder), load_file(result.path / "model.safetensors")
    loaded = sliderquant.load(result.path, "cpu", dtype="float32", merge=False)
    layer, report = "model.layers.0.", result.report["layer_errors"][0]
    for changed, name in (
        ("input_layernorm.weight", "self_attn.k_proj"),
        ("self_attn.v_proj.bias", "self_attn.o_proj"),
        ("post_attention_layernorm.weight", "mlp.gate_proj"),
    ):
        scale = model.get_parameter(layer + changed) / after[layer + changed].float()
        assert scale.max() > 1.01
        if name == "self_attn.o_proj":
            scale = scale.view(2, 1, 16).expand(-1, 2, -1).flatten()
        x = inputs_of(model, [layer + name], blocks(folder))[layer + name]
        wanted = x @ model.get_submodule(layer + name).weight.T
        got = (x / scale) @ loaded.get_submodule(layer + name).dequantize().T
        error = ((got - wanted).square().sum() / wanted.square().sum()).item()
        assert report["linears"][name]["error"] == pytest.approx(error, rel=1e-3)


def test_it_is_better_than_rounding_to_nearest_where_there_are_outliers(run, blocks, outliers):
    ids = blocks(outliers)
    awq, nearest = run(outliers, "W3A16", "awq", "awq"), run(outliers, "W3A16", "rtn", "rtn")
    assert logits_error(awq, outliers, ids) < 0.8 * logits_error(nearest, outliers, ids)
    report = json.loads((awq.path / "sliderquant-report.json").read_text())
    for layer in report["layer_errors"]:
        assert all(found["error"] <= 1 for found in layer["scales"].values())
        assert "clipped" not in layer["linears"]["self_attn.q_proj"]
        assert 0 <= layer["linears"]["mlp.down_proj"]["clipped"] <= 1


def test_the_same_seed_writes_the_same_bytes(run, tiny_llama):
    files = [
        (run(tiny_llama, "W4A16-g32", "awq", name, settings={"ratios": 3}).path / "model.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_quantized_activations_are_refused_before_any_work(run, tiny_llama, tmp_path):
    with pytest.raises(InputError, match="method awq with scheme W4A4: it is for schemes that leave activations"):
        run(tiny_llama, "W4A4", "awq")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tiny_llama, calibration_file, tmp_path):
    out = tmp_path / "out"
    text = ["--calibration", str(calibration_file), "--samples", "4", "--seqlen", "32"]
    arguments = ["quantize", str(tiny_llama), "--method", "awq", "--scheme", "W4A16", "--set", "ratios=2"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(out), "-q", *text])
    assert done.exit_code == 0, done.output
    assert sliderquant.load(out, "cpu") is not None
    assert json.loads((out / "sliderquant-report.json").read_text())["settings"]["ratios"] == 2
    refused = CliRunner().invoke(app, ["quantize", str(tiny_llama), "--method", "awq", "--scheme", "W8A8", "--dry-run"])
    assert refused.exit_code == 2
