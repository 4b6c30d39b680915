"""Bits chosen for every linear under a budget: the losses against a model in one piece, and what is stored."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sliderquant
from sliderquant.calibration.tokens import tokenize
from sliderquant.checkpoint import describe, read_checkpoint
from sliderquant.choosing.bits import choose_bits, linear_losses, linears_together
from sliderquant.cli import app
from sliderquant.errors import InputError
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import open_model
from sliderquant.modules.rotated import insert_rotations
from sliderquant.planning import memory
from sliderquant.planning import plan as planning
from sliderquant.planning.allocation import Allocation
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.progress import Progress
from sliderquant.quantizer.grids import clipped_grid, dequantize, quantize, round_to_nearest
from sliderquant.quantizer.search import search_clipping
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme, Scheme

CPU = torch.device("cpu")
SMALL = {"samples": 4, "seqlen": 32}


def plan_for(source, scheme="W2A16-g32", average_bits=2.5, method="rtn", samples=3, seqlen=24):
    chosen, parsed = METHODS[method], ModelScheme.parse(scheme)
    settings = chosen.settings_for(parsed)
    return make_plan(
        source,
        Request("", parsed, chosen, settings, samples=samples, seqlen=seqlen, average_bits=average_bits),
    )


@pytest.fixture(scope="module")
def blocks(tiny_llama, calibration_file):
    tokens = tokenize(calibration_file.read_text(encoding="utf-8"), open_model(tiny_llama).tokenizer())
    return tokens[: 3 * 24].view(3, 24)


@pytest.fixture(scope="module")
def mixed(tiny_llama, calibration_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "out"
    arguments = {"average_bits": 2.75, "calibration": str(calibration_file), **SMALL}
    return sliderquant.quantize(tiny_llama, out, scheme="W2A16-g32", method="rtn", **arguments)


def losses_in_one_piece(model, source, plan, blocks):
    """The same from the gradients of the whole model at once."""
    linears = {name: model.get_submodule(name) for name in plan.schemes}
    if plan.rotations is not None:
        insert_rotations(model, source.family, plan.rotations)
    squares = dict.fromkeys(linears, 0)

    def hook(name):
        def add(_, arguments):
            squares[name] = squares[name] + arguments[0].detach().flatten(0, -2).square().sum(0)

        return add

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    logits = model(blocks, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).backward()
    for handle in hooks:
        handle.remove()
    found = {}
    for name, linear in linears.items():
        weight, importance = linear.weight.detach(), squares[name] / blocks.numel()
        found[name] = {}
        for bits in (2, 3, 4, 8):
            scheme = replace(plan.schemes[name], bits=bits)
            clipping = search_clipping(weight, importance, scheme, source.dtype)
            grid = clipped_grid(weight, clipping, clipping, scheme, source.dtype)
            error = dequantize(quantize(weight, grid, scheme, source.dtype), scheme) - weight
            found[name][bits] = (linear.weight.grad * error).abs().sum().item()
    return found


def test_losses_are_those_of_the_whole_model(tiny_llama, blocks, monkeypatch):
    monkeypatch.setattr("sliderquant.choosing.bits.CHOOSING_TOKENS_AT_ONCE", 10)  # the head takes pieces of a sample
    source = open_model(tiny_llama)
    plan = plan_for(source)
    found = linear_losses(plan, Decoder(source, CPU), blocks, CPU, Progress())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = losses_in_one_piece(model, source, plan, blocks)
    assert list(found) == list(plan.schemes)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
        assert list(found[name].values()) == sorted(found[name].values(), reverse=True)


def test_a_rotated_model_has_gradients_through_its_online_rotation(tiny_llama, blocks):
    original = open_model(tiny_llama)
    source = RotatedSource.of(original, Rotations.of_model(original, ["R1", "R2", "R4"], seed=0))
    plan = plan_for(source)
    found = linear_losses(plan, Decoder(source, CPU), blocks, CPU, Progress())
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    model.load_state_dict({name: source.weight(name, CPU) for name in model.state_dict()})
    expected = losses_in_one_piece(model, source, plan, blocks)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_hidden_states_may_be_kept_in_files(tiny_llama, blocks, monkeypatch):
    source = open_model(tiny_llama)
    plan = plan_for(source)
    in_memory = linear_losses(plan, Decoder(source, CPU), blocks, CPU, Progress())
    monkeypatch.setattr("sliderquant.choosing.bits.CHOOSING_STREAM_GB", 0)
    assert linear_losses(plan, Decoder(source, CPU), blocks, CPU, Progress()) == in_memory


def test_progress_counts_to_the_end(tiny_llama, blocks):
    class Counting(Progress):
        def __init__(self):
            self.seen = []

        def layer_passed(self, done, total):
            self.seen.append((done, total))

    progress, source = Counting(), open_model(tiny_llama)
    linear_losses(plan_for(source), Decoder(source, CPU), blocks, CPU, progress)
    assert progress.seen == [(done + 1, 15) for done in range(15)]  # 3 samples: 2 layers twice, the head once


def test_the_allocation_spends_the_budget_where_the_losses_are(tiny_llama, blocks, monkeypatch):
    source = open_model(tiny_llama)
    plan = plan_for(source)
    # One group of linears is all that counts.
    heavy = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    losses = {name: {bits: float(name in heavy) / bits for bits in (2, 3, 4, 8)} for name in plan.schemes}
    monkeypatch.setattr("sliderquant.choosing.bits.linear_losses", lambda *_: losses)
    found = choose_bits(plan, Decoder(source, CPU), blocks, CPU)
    share = 2 * 64 * 96 / sum(math.prod(source.shapes[f"{name}.weight"][0]) for name in plan.schemes)
    most = max(bits for bits in (2, 3, 4, 8) if (bits - 2) * share <= 0.5)
    assert most > 2
    assert found.bits == {name: most if name in heavy else 2 for name in plan.schemes}
    assert (found.budget, found.samples, found.losses) == (2.5, 3, losses)


def test_linears_that_read_the_same_input_get_the_same_bits(tiny_llama, mixed):
    source = open_model(tiny_llama)
    groups = linears_together(source)
    assert sorted(name for names in groups for name in names) == sorted(mixed.plan.schemes)
    assert Counter(map(len, groups)) == {3: 2, 2: 2, 1: 4}
    for names in groups:
        assert len({mixed.plan.schemes[name] for name in names}) == 1


def assert_computes_with(folder, original, schemes):
    """The model in `folder` computes as the original with its linears rounded to nearest, each to its scheme."""
    dense = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        for name, scheme in schemes.items():
            weight = dense.get_submodule(name).weight
            weight.copy_(dequantize(round_to_nearest(weight, scheme, torch.bfloat16), scheme))
        expected = dense(ids).logits
        for merge in (True, False):
            found = sliderquant.load(folder, device="cpu", dtype="float32", merge=merge)(ids).logits
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_linears_that_read_the_same_input_may_have_different_bits(tiny_llama, tmp_path):
    names = list(plan_for(open_model(tiny_llama)).schemes)
    bits = {name: (2, 3, 4, 8)[place % 4] for place, name in enumerate(names)}
    arguments = {"scheme": "W2A16-g32", "method": "rtn", **SMALL}
    result = sliderquant.quantize(tiny_llama, tmp_path / "out", allocation=Allocation(8, 0, bits, {}), **arguments)
    assert {name: scheme.bits for name, scheme in result.plan.schemes.items()} == bits
    assert_computes_with(result.path, tiny_llama, result.plan.schemes)


def test_the_checkpoint_holds_the_chosen_bits_and_computes_with_them(tiny_llama, mixed):
    checkpoint = read_checkpoint(mixed.path)
    assert checkpoint.schemes == mixed.plan.schemes
    assert len(set(checkpoint.schemes.values())) > 1
    assert set(checkpoint.schemes.values()) <= {Scheme(bits, 32) for bits in (2, 3, 4, 8)}
    assert_computes_with(mixed.path, tiny_llama, checkpoint.schemes)
    config = json.loads((mixed.path / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {
        scheme.bits for scheme in checkpoint.schemes.values()
    }


def test_sizes_averages_and_what_people_read(mixed, tiny_llama):
    found, plan = describe(mixed.path), mixed.plan
    assert plan.disk_bytes == found.total_bytes
    assert 2 < plan.code_bits_per_weight <= 2.75
    assert found.code_bits_per_weight == pytest.approx(plan.code_bits_per_weight, rel=1e-12)
    assert found.quantized_bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)
    assert found.quantized_bits_per_weight > found.code_bits_per_weight
    report = json.loads((mixed.path / "sliderquant-report.json").read_text())
    assert report["average_bits"] == report["allocation"]["budget"] == 2.75
    assert report["allocation"]["bits"] == {name: scheme.bits for name, scheme in plan.schemes.items()}
    assert report["seconds"]["choose_bits"] > 0
    card = (mixed.path / "README.md").read_text()
    assert f"| bits of a weight's code, on average | {plan.code_bits_per_weight:.3f} |" in card
    page = (mixed.path / "sliderquant-report.html").read_text()
    assert "W2A16-g32 and more, 2.75 bits on average" in page
    inspected = CliRunner().invoke(app, ["inspect", str(mixed.path)]).stdout
    assert f"bits        {plan.code_bits_per_weight:.3f} per quantized weight" in inspected
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        digits = "".join(str(plan.schemes[f"model.layers.{layer}.{kind}"].bits) for layer in range(2))
        assert f"<td>{digits}</td>" in page
        assert re.search(rf"^  {kind} +{digits}$", inspected, re.MULTILINE)


@pytest.mark.parametrize(
    ("method", "settings", "rotate"),
    [
        ("gptq", {}, None),
        ("awq", {}, None),
        ("sliderquant-published", {"epochs": 2, "matmul": "float32"}, None),
        ("sliderquant-published", {"epochs": 2, "matmul": "float32"}, ["R1", "R2", "R4"]),
        ("sliderquant", {"epochs": 2, "matmul": "float32"}, None),
    ],
)
def test_every_kind_of_method(method, settings, rotate, tiny_llama, calibration_file, tmp_path):
    arguments = {"calibration": str(calibration_file), "rotate": rotate, **SMALL}
    result = sliderquant.quantize(tiny_llama, tmp_path / "out", "W2A16", method, settings, average_bits=3, **arguments)
    assert {scheme.bits for scheme in result.plan.schemes.values()} > {2}
    assert result.plan.code_bits_per_weight <= 3
    assert read_checkpoint(tmp_path / "out").schemes == result.plan.schemes
    assert result.load("cpu", "float32")(torch.arange(20)[None]).logits.isfinite().all()


def test_the_same_seed_gives_the_same_bits(mixed, tiny_llama, calibration_file):
    arguments = {"average_bits": 2.75, "calibration": str(calibration_file), **SMALL}
    plan = sliderquant.plan(tiny_llama, "W2A16-g32", "rtn", **arguments)
    assert plan.allocation == mixed.plan.allocation
    assert plan.disk_bytes == mixed.plan.disk_bytes


def test_dry_run_says_the_bits_of_every_layer(mixed, tiny_llama, calibration_file):
    arguments = ["quantize", tiny_llama, "--scheme", "W2A16-g32", "--method", "rtn", "--average-bits", 2.75]
    arguments += ["--samples", 4, "--seqlen", 32, "--calibration", calibration_file, "--dry-run", "-q"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "scheme      W2A16-g32 and more, 2.75 bits on average" in lines
    for name, scheme in mixed.plan.schemes.items():
        _, _, layer, kind = name.split(".", 3)
        line = next(line for line in lines if line.startswith(f"  {kind} "))
        assert line.split()[-1][int(layer)] == str(scheme.bits)
    assert any(re.fullmatch(r"bits +\d\.\d{3} per .* chosen on 4 calibration samples", line) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average_bits": 1.5}, "average_bits 1.5 with scheme W2A16-g32: expected 2"),
        ({"average_bits": 9}, "average_bits 9 with scheme W2A16-g32: expected 2, .* to 8"),
        ({"average_bits": 4.5, "scheme": "W4A8-g32"}, "scheme W4A8-g32: .* weight-only schemes"),
        ({"average_bits": 2.5, "calibration": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_errors_come_before_any_work(arguments, message, tiny_llama, tmp_path, monkeypatch):
    def unreachable(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr("sliderquant.choosing.plans.choose_bits", unreachable)
    arguments = {"scheme": "W2A16-g32", "method": "rtn", **SMALL, **arguments}
    for call in (
        lambda: sliderquant.quantize(tiny_llama, tmp_path / "out", **arguments),
        lambda: sliderquant.plan(tiny_llama, **arguments),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_memory_and_disk_before_the_bits_are_known(tiny_llama, monkeypatch):
    source = open_model(tiny_llama)
    plain, chosen = plan_for(source, average_bits=None), plan_for(source, average_bits=3.5)
    assert (plain.largest_disk_bytes, plain.chooses_bits) == (plain.disk_bytes, False)
    assert chosen.chooses_bits
    # Whatever is chosen within the budget: here everything at 3 bits.
    bits = dict.fromkeys(chosen.schemes, 3)
    settled = chosen.with_allocation(Allocation(3.5, 3, bits, {}))
    assert chosen.disk_bytes < settled.disk_bytes < chosen.largest_disk_bytes
    assert settled.disk_bytes == plan_for(source, "W3A16-g32", None).disk_bytes
    # The head of the tiny model, and logits of a sample, are more than a layer.
    assert chosen.memory_bytes == 4 * 2048 * (64 + 3 * 24) > plain.memory_bytes
    streams = 3 * 3 * 24 * 64 * 4  # before two layers, and after them
    assert chosen.host_memory_bytes - chosen.memory_bytes == 2048 * 64 * 4 + streams
    assert chosen.measured_samples == 3
    assert replace(chosen, request=replace(chosen.request, samples=1000)).measured_samples == planning.MEASURED_SAMPLES
    assert chosen.file_bytes == 0
    monkeypatch.setattr(memory, "CHOOSING_STREAM_GB", 1e-6)
    assert (chosen.file_bytes, settled.file_bytes) == (streams, 0)
    in_files = plan_for(source, average_bits=3.5)
    assert in_files.host_memory_bytes == chosen.host_memory_bytes - streams


def test_bits_chosen_before(mixed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("sliderquant.choosing.plans.choose_bits", lambda *_: pytest.fail("bits were chosen again"))
    result = sliderquant.quantize(
        tiny_llama, tmp_path / "out", "W2A16-g32", "rtn", allocation=mixed.plan.allocation, **SMALL
    )
    assert result.plan.schemes == mixed.plan.schemes
    assert (result.plan.average_bits, result.report["calibration"]) == (2.75, None)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"model.layers.0.mlp.up_proj": None}, {}, "allocation: model.layers.0.mlp.up_proj: the model has it, without"),
        ({"lm_head": 4}, {}, "allocation: lm_head: the model has no such linear"),
        (
            {"model.layers.0.mlp.up_proj": 5},
            {},
            r"up_proj has 5 bits; expected one of 2, 3, 4, 8 with scheme W2A16",
        ),
        ({"model.layers.0.mlp.up_proj": 8}, {}, r"allocation: 2\.\d+ bits on average; expected at most 2"),
        ({}, {"scheme": "W3A16-g32"}, "average_bits 2 with scheme W3A16-g32"),
        ({}, {"average_bits": 3}, "average_bits 3 with an allocation of at most 2 bits: give one of the two"),
    ],
)
def test_allocations_that_do_not_fit(change, arguments, message, tiny_llama, tmp_path):
    plan = plan_for(open_model(tiny_llama))
    bits = {**dict.fromkeys(plan.schemes, 2), **change}
    allocation = Allocation(2, 3, {name: number for name, number in bits.items() if number is not None}, {})
    arguments = {"scheme": "W2A16-g32", "method": "rtn", **SMALL, **arguments}
    with pytest.raises(InputError, match=message):
        sliderquant.quantize(tiny_llama, tmp_path / "out", allocation=allocation, **arguments)
