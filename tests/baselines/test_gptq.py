"""GPTQ against a textbook version in fp64: one column at a time, the inverse Hessian downdated as in the paper."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sliderquant
from sliderquant.baselines.gptq import gptq, inverse_factor
from sliderquant.cli import app
from sliderquant.cli.progress import _layer_line
from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.progress import LayerReport
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme, Scheme

SCHEMES = ["W2A16", "W3A16-sym", "W4A16-g32", "W2A16-g64-sym", "W3A16-g128", "W8A16", "W4A4"]


def grid(values, scheme, dtype):
    """Scale and zero-point of each row, fp64 `[out, 1]`."""
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = (span / (2**scheme.bits - 1)).to(dtype).double()
    scale[scale == 0] = 1
    if scheme.symmetric:
        return scale, torch.full_like(scale, 2 ** (scheme.bits - 1))
    return scale, torch.round(-low / scale).clamp(0, 2**scheme.bits - 1)


def textbook(weight, x, scheme, dtype=torch.bfloat16, damping=0.01, act_order=False):
    """The quantized weight, fp64 `[out, in]`; x `[tokens, in]`."""
    w, x = weight.double(), x.double()
    hessian = x.T @ x
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(hessian)
    order = (x**2).sum(0).argsort(descending=True, stable=True).tolist() if act_order else range(w.shape[1])
    size = scheme.group_size or w.shape[1]
    original, result = w.clone(), torch.zeros_like(w)
    w = w.clone()
    done = []
    for i in order:
        group = slice(i // size * size, i // size * size + size)
        if act_order:
            scale, zero = grid(original[:, group], scheme, dtype)
        elif i % size == 0:
            scale, zero = grid(w[:, group], scheme, dtype)
        code = (torch.round(w[:, [i]] / scale) + zero).clamp(0, 2**scheme.bits - 1)
        result[:, i] = ((code - zero) * scale)[:, 0]
        error = (w[:, i] - result[:, i]) / inverse[i, i]
        done.append(i)
        w -= error[:, None] * inverse[i]
        w[:, done] = result[:, done]
        inverse = inverse - inverse[:, [i]] @ inverse[[i]] / inverse[i, i]
    return result


def example(out_features, in_features, seed, tokens=400):
    """A weight and correlated inputs with a few large channels."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=g) * 0.05
    x = torch.randn(tokens, in_features, generator=g) @ torch.randn(in_features, in_features, generator=g)
    x[:, :: max(in_features // 5, 1)] *= 6
    return weight, x / in_features**0.5


def error(value, weight, x):
    return ((value.double() - weight.double()) @ x.double().T).square().sum().item()


@settings(deadline=None, max_examples=25)
@given(
    scheme=st.sampled_from(SCHEMES).map(Scheme.parse),
    groups=st.integers(1, 3),
    odd=st.integers(0, 40),
    out_features=st.integers(1, 9),
    act_order=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_it_is_the_textbook(scheme, groups, odd, out_features, act_order, seed):
    in_features = groups * 100 + odd if scheme.group_size is None else groups * scheme.group_size
    weight, x = example(out_features, in_features, seed)
    result = gptq(weight, x.T @ x, scheme, torch.bfloat16, act_order=act_order)
    assert result.damping == 0.01
    got = dequantize(result.stored, scheme)
    want = textbook(weight, x, scheme, act_order=act_order)
    # One weight that fp32 rounds another way changes what comes after it in its row, and no other row.
    assert (got != want.float()).any(1).sum() <= 1
    assert error(got, weight, x) == pytest.approx(error(want, weight, x), rel=0.1)


@settings(deadline=None, max_examples=20)
@given(scheme=st.sampled_from(SCHEMES).map(Scheme.parse), act_order=st.booleans(), seed=st.integers(0, 10_000))
def test_its_error_is_smaller_than_that_of_rounding_to_nearest(scheme, act_order, seed):
    weight, x = example(24, 256, seed)
    got = dequantize(gptq(weight, x.T @ x, scheme, torch.float16, act_order=act_order).stored, scheme)
    nearest = dequantize(round_to_nearest(weight, scheme, torch.float16), scheme)
    assert error(got, weight, x) < error(nearest, weight, x)


def test_blocks_do_not_change_the_result():
    weight, x = example(8, 192, 1)
    scheme = Scheme(2, 32)
    one, many = (dequantize(gptq(weight, x.T @ x, scheme, torch.float16, block=b).stored, scheme) for b in (192, 32))
    assert (one != many).any(1).sum() <= 1
    with pytest.raises(ValueError, match="block 48: expected a multiple of the group size, 32"):
        gptq(weight, x.T @ x, scheme, torch.float16, block=48)


def test_inputs_that_are_always_zero_take_no_part():
    weight, x = example(8, 64, 2)
    x[:, [5, 63]] = 0
    scheme = Scheme(3)
    stored = gptq(weight, x.T @ x, scheme, torch.float16).stored
    nearest = round_to_nearest(weight, scheme, torch.float16)
    assert torch.equal(stored.codes[:, [5, 63]], nearest.codes[:, [5, 63]])
    other = weight.clone()
    other[:, 5] *= 0.5
    again = gptq(other, x.T @ x, scheme, torch.float16).stored
    live = [i for i in range(64) if i != 5]
    assert torch.equal(again.codes[:, live], stored.codes[:, live])


def test_damping_is_a_share_of_the_mean_of_what_takes_part():
    _, x = example(1, 32, 4)
    alone, _ = inverse_factor(x.T @ x, 0.01)
    x = torch.cat((x, torch.zeros(len(x), 32)), 1)
    among_dead, _ = inverse_factor(x.T @ x, 0.01)
    assert torch.allclose(among_dead[:32, :32], alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())
    assert among_dead[:32, 32:].abs().max() == 0


def test_a_hessian_that_is_not_positive_definite_raises_the_damping():
    hessian = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    factor, damping = inverse_factor(hessian, 0.01)
    assert damping == pytest.approx(10.0)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(hessian + 10 * torch.eye(2)))
    assert torch.equal(factor, factor.triu())
    weight = torch.tensor([[0.3, -0.2]])
    assert gptq(weight, hessian, Scheme(2), torch.float16).damping == pytest.approx(10.0)


def test_what_fp32_cannot_factor_fp64_does():
    # Three tokens for 64 inputs, in whole numbers so that X^T X is exact, and nearly no damping.
    x = torch.randint(-5, 6, (3, 64), generator=torch.Generator().manual_seed(0)).float()
    hessian = x.T @ x
    damped = hessian + 1e-7 * hessian.diagonal().mean() * torch.eye(64)
    assert torch.linalg.cholesky_ex(damped.flip(0, 1))[1] > 0
    factor, damping = inverse_factor(hessian, 1e-7)
    assert damping == 1e-7
    assert factor.isfinite().all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_hessian_of_no_use_means_rounding_to_nearest(broken):
    weight, x = example(8, 64, 3)
    hessian = x.T @ x
    if broken == 0:
        hessian.zero_()
    else:
        hessian[3, 4] = broken
    result = gptq(weight, hessian, Scheme(4, 32), torch.float16)
    assert result.damping is None
    nearest = round_to_nearest(weight, Scheme(4, 32), torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(result.stored, nearest, strict=True))


@pytest.mark.parametrize(
    ("scheme", "family", "rotate"),
    [
        ("W2A16", "llama", []),
        ("W3A16-g32-sym", "qwen3", []),
        ("W4A4", "qwen2", []),
        ("W4A8-act-sym", "llama", ["R1", "R2", "R4"]),
        ("W4A4KV4", "llama", []),
        ("W4A4KV4", "qwen2", ["R1", "R2", "R3", "R4"]),
    ],
)
def test_every_linear_of_a_run_is_the_textbook_on_what_the_loaded_model_gives_it(
    run, blocks, inputs_of, random_model, round_tokens, tmp_path, scheme, family, rotate
):
    """Layers, and linears in a layer, see what those before make of the text once they are quantized: what they see in
    the finished model."""
    folder = random_model(tmp_path / "model", model_type=family)
    # By the Hessian's diagonal, columns would change places that differ in their last digits.
    result = run(folder, scheme, "gptq", rotate=rotate, settings={"act_order": False})
    source = open_model(folder)
    if rotate:
        source = RotatedSource.of(source, Rotations.of_model(source, rotate, seed=2))
    model = sliderquant.load(result.path, "cpu", dtype="float32", merge=False)
    names = source.linear_names
    inner = {name: f"{name}.linear" if rotate and name.endswith("down_proj") else name for name in names}
    parsed = ModelScheme.parse(scheme).linear
    if rotate and parsed.quantizes_activations:
        # Rotation and rounding are one kernel in the loaded model, which calls nothing in between.
        inner = {name: name for name in names}
    seen = inputs_of(model, list(inner.values()), blocks(folder))
    for name in names:
        x = seen[inner[name]]
        module = model.get_submodule(name)
        if rotate and name.endswith("down_proj"):
            x, module = module.rotation(x), module.linear
        if parsed.quantizes_activations:
            x = round_tokens(x, parsed.activation_bits, parsed.activation_symmetric)
        want = textbook(source.weight(f"{name}.weight", torch.device("cpu")), x, parsed, source.dtype)
        # Inputs differ in their last digits, which now and then rounds a weight, and the rest of its row, another way.
        assert (module.dequantize() == want.float()).float().mean() > 0.97, name


def test_a_run_is_better_than_rounding_to_nearest_and_says_by_how_much(run, blocks, tiny_llama):
    ids = blocks(tiny_llama)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    want = original.model(ids, use_cache=False).last_hidden_state

    def relative(result):
        got = result.load(device="cpu", dtype="float32").model(ids, use_cache=False).last_hidden_state
        return ((got - want).norm() / want.norm()).item()

    compensated, nearest = run(tiny_llama, "W3A16", "gptq", "gptq"), run(tiny_llama, "W3A16", "rtn", "rtn")
    assert relative(compensated) < 0.9 * relative(nearest)
    report = json.loads((compensated.path / "sliderquant-report.json").read_text())
    assert [entry["layer"] for entry in report["layer_errors"]] == [0, 1]
    for entry in report["layer_errors"]:
        assert 0 < entry["error"] < 1
        assert len(entry["linears"]) == 7
        assert all(0 < found["error"] < 1 and found["damping"] == 0.01 for found in entry["linears"].values())
    assert report["settings"]["damping"] == 0.01


def test_the_same_seed_writes_the_same_bytes_from_memory_and_from_a_file(run, tiny_llama):
    one, two, other = (
        run(tiny_llama, "W2A16-g32", "gptq", name, **changes)
        for name, changes in (
            ("one", {}),
            ("two", {"settings": {"stream_memory_gb": 1e-9}}),
            ("other", {"seed": 3}),
        )
    )
    files = [(result.path / "model.safetensors").read_bytes() for result in (one, two, other)]
    assert files[0] == files[1] != files[2]


def test_act_order_is_a_setting(run, tiny_llama):
    plain, ordered = (
        run(tiny_llama, "W2A16-g32", "gptq", str(value), settings={"act_order": value}) for value in (False, True)
    )
    assert [result.report["settings"]["act_order"] for result in (plain, ordered)] == [False, True]
    first = "model.layers.0.self_attn.q_proj"
    weights = [result.load(device="cpu", dtype="float32").get_submodule(first) for result in (plain, ordered)]
    assert not torch.equal(*(weight.dequantize() for weight in weights))


def test_activations_that_are_not_finite_are_survived(run, random_model, tmp_path):
    """Weights so large that the Hessian overflows: rounded to nearest, and the report says so."""
    folder = random_model(tmp_path / "model", dtype="float32")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e22
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run(folder, "W4A16", "gptq")
    first, second = json.loads((result.path / "sliderquant-report.json").read_text(), parse_constant=pytest.fail)[
        "layer_errors"
    ]
    assert first["linears"]["mlp.down_proj"].keys() == {"error", "damping"}
    trouble = second["linears"]["mlp.down_proj"]
    assert trouble == {"error": None, "damping": None, "trouble": "X^T X is not finite or 0, rounded to nearest"}
    assert _layer_line(LayerReport(**second)).startswith("layer 1: relative error of its output ")
    assert _layer_line(LayerReport(**second)).endswith("; mlp.down_proj: X^T X is not finite or 0, rounded to nearest")


def test_raised_damping_is_reported(run, tiny_llama, monkeypatch):
    monkeypatch.setattr("sliderquant.baselines.gptq.inverse_factor", lambda h, damping: (torch.eye(len(h)), 0.1))
    found = run(tiny_llama, "W4A16", "gptq").report["layer_errors"][0]["linears"]["mlp.up_proj"]
    assert found["trouble"] == "damping raised to 0.1 to make X^T X positive definite"


def test_the_command_line(tiny_llama, calibration_file, tmp_path):
    def go(*arguments):
        return CliRunner().invoke(
            app, ["quantize", str(tiny_llama), "--method", "gptq", "--scheme", "W4A16", *arguments]
        )

    planned = go("--dry-run", "--set", "damping=0.02", "--samples", "4", "--seqlen", "32")
    assert planned.exit_code == 0, planned.output
    assert "calibration wikitext2: 4 samples of 32 tokens, batches of 4" in planned.stdout
    assert "damping=0.02, act_order=True" in planned.stdout
    text = ["--calibration", str(calibration_file), "--samples", "4", "--seqlen", "32"]
    done = go("-o", str(tmp_path / "out"), "--verbose", *text)
    assert done.exit_code == 0, done.output
    assert "layer 1: relative error of its output" in done.stderr
    assert sliderquant.load(tmp_path / "out", "cpu") is not None
    refused = go("--dry-run", "--set", "epochs=3")
    assert refused.exit_code == 2
    assert "unknown setting 'epochs': epochs is of omniquant" in " ".join(refused.stderr.split())
    assert "act_order" in refused.stderr


def test_settings_out_of_range(tiny_llama):
    with pytest.raises(InputError, match=r"setting 'damping': expected a finite number, more than 0, got 0"):
        sliderquant.plan(tiny_llama, "W4A16", "gptq", {"damping": 0}, seqlen=32)
