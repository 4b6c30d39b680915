"""The seed of rotations that loses least: on a model made for one seed, against checkpoints, and in what is written."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sliderquant
from sliderquant.calibration.blocks import random_blocks
from sliderquant.calibration.text import read_text
from sliderquant.choosing.rotation_seeds import choose_rotation_seed
from sliderquant.cli import app
from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.planning import memory
from sliderquant.planning import plan as planning
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.progress import Progress
from sliderquant.rotations.folded import RotatedSource, rotated
from sliderquant.rotations.transforms import ROTATIONS, Rotations
from sliderquant.schemes import ModelScheme

CPU = torch.device("cpu")
ALL = list(ROTATIONS)
SMALL = {"samples": 4, "seqlen": 32}


class Told(Progress):
    def __init__(self):
        self.passes, self.messages = [], []

    def layer_passed(self, done, total):
        self.passes.append((done, total))

    def message(self, text):
        self.messages.append(text)


def plan_for(model, scheme="W4A16", rotate=("R1",), seed=0, rotation_seeds=4, samples=4, seqlen=32):
    parsed = ModelScheme.parse(scheme)
    source = rotated(open_model(model), rotate, seed, parsed)
    request = Request(model, parsed, METHODS["rtn"], samples=samples, seqlen=seqlen, rotation_seeds=rotation_seeds)
    return make_plan(source, request)


@pytest.fixture(scope="module")
def model(random_model, tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "model", dtype="float32")


@pytest.fixture(scope="module")
def blocks(model, calibration_file):
    return random_blocks(read_text(str(calibration_file), "calibration"), open_model(model).tokenizer(), 4, 32, 2)


def on_grid(weight):
    """Values that rounding to nearest with 4 bits leaves as they are: every row has its first and last code."""
    codes = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    codes[:, 0], codes[:, 1] = -8, 7
    return codes * 0.01


@pytest.fixture(scope="module")
def made_for_seed_6(random_model, tmp_path_factory):
    """A model that R1 with the signs of seed 6 brings to weights of 4 bits."""
    folder = random_model(tmp_path_factory.mktemp("made") / "model", dtype="float32", tie_word_embeddings=False)
    source = open_model(folder)
    rotation = Rotations.of_model(source, ["R1"], seed=6).hidden()
    inverse = rotation(torch.eye(64)).T
    weights = load_file(folder / "model.safetensors")
    for name in (name for name in weights if name.endswith("norm.weight")):
        weights[name].fill_(1)  # what is folded in would take the weights off their grid
    for name in source.linear_names:
        weight = on_grid(weights[f"{name}.weight"])
        writes = name.endswith(("o_proj", "down_proj"))
        weights[f"{name}.weight"] = (inverse.T @ weight if writes else weight @ inverse).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("first", [3, 4, 6])
def test_a_model_made_for_one_seed(made_for_seed_6, blocks, first):
    choice = choose_rotation_seed(plan_for(made_for_seed_6, seed=first), blocks, CPU)
    assert choice.seed == 6
    errors = {trial.seed: trial.output_error for trial in choice.trials}
    assert list(errors) == list(range(first, first + 4))
    assert errors.pop(6) < 1e-9
    assert min(errors.values()) > 1e-3


def losses(folder, original, blocks):
    """Output error, KL(original || checkpoint) and perplexity, of transformers' model and the loaded one. With R1 the
    norms have no weights any more, and what the head reads is turned."""
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    loaded = sliderquant.load(folder, "cpu", "float32")
    rotation = loaded_rotations(folder).hidden()
    with torch.no_grad():
        hidden = rotation(reference.model(blocks).last_hidden_state / reference.model.norm.weight)
        error = (loaded.model(blocks).last_hidden_state - hidden).square().sum() / hidden.square().sum()
        expected, found = (model(blocks).logits.log_softmax(-1) for model in (reference, loaded))
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()
    loss = F.nll_loss(found[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    return error.item(), divergence.item(), loss.exp().item()


def loaded_rotations(folder):
    return Rotations.from_dict(json.loads((folder / "config.json").read_text())["sliderquant"]["rotations"])


# Where a CPU adds in another order, the rounding of an activation may fall the other way.
@pytest.mark.parametrize(("scheme", "tolerance"), [("W3A16", 1e-3), ("W4A4KV4", 0.05)])
def test_what_a_seed_costs_is_what_its_checkpoint_does(model, blocks, tmp_path, scheme, tolerance):
    rotate = ALL if "KV" in scheme else ["R1", "R2", "R4"]
    choice = choose_rotation_seed(plan_for(model, scheme, rotate, seed=5, rotation_seeds=3), blocks, CPU)
    for trial in choice.trials:
        out = tmp_path / str(trial.seed)
        sliderquant.quantize(model, out, scheme, "rtn", rotate=rotate, seed=trial.seed, device="cpu")
        figures = (trial.output_error, trial.kl_divergence, trial.perplexity)
        assert figures == pytest.approx(losses(out, model, blocks), rel=tolerance)
    assert len({trial.kl_divergence for trial in choice.trials}) == 3


@pytest.fixture(scope="module")
def chosen(model, calibration_file, tmp_path_factory):
    return sliderquant.quantize(
        model,
        tmp_path_factory.mktemp("chosen") / "out",
        "W4A4KV4",
        "rtn",
        rotate=ALL,
        rotation_seeds=3,
        calibration=str(calibration_file),
        device="cpu",
        **SMALL,
    )


def test_the_checkpoint_is_that_of_the_chosen_seed(chosen, model, blocks, tmp_path):
    choice = chosen.plan.rotation_choice
    assert choice == choose_rotation_seed(plan_for(model, "W4A4KV4", ALL, seed=2, rotation_seeds=3), blocks, CPU)
    assert choice.seed == min(choice.trials, key=lambda trial: trial.output_error).seed
    single = sliderquant.quantize(
        model, tmp_path / "out", "W4A4KV4", "rtn", rotate=ALL, seed=choice.seed, device="cpu"
    ).path
    for name in ("model.safetensors", "config.json"):
        assert (single / name).read_bytes() == (chosen.path / name).read_bytes()


def test_what_people_read(chosen):
    choice = chosen.plan.rotation_choice
    config = json.loads((chosen.path / "config.json").read_text())
    assert config["sliderquant"]["rotations"]["seed"] == choice.seed
    report = json.loads((chosen.path / "sliderquant-report.json").read_text())
    assert report["rotations"]["seed"] == report["rotation_choice"]["seed"] == choice.seed
    assert report["seed"] == 2
    assert report["seconds"]["choose_rotation"] > 0
    assert [trial["seed"] for trial in report["rotation_choice"]["trials"]] == [2, 3, 4]
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (chosen.path / "sliderquant-report.html").read_text()))
    assert f"Rotations R1, R2, R3, R4; seed {choice.seed}, of 3 tried" in page
    for trial in choice.trials:
        used = " used" if trial.seed == choice.seed else ""
        figures = (trial.output_error, trial.kl_divergence, trial.perplexity)
        assert f" {trial.seed} {' '.join(f'{figure:.5g}' for figure in figures)}{used} " in page


def test_the_plan_chooses_the_same(chosen, model, calibration_file):
    arguments = [
        "quantize",
        model,
        "--scheme",
        "W4A4KV4",
        "--method",
        "rtn",
        "--rotate",
        "R1,R2,R3,R4",
        "--device",
        "cpu",
    ]
    arguments += ["--rotation-seeds", 3, "--samples", 4, "--seqlen", 32, "--calibration", calibration_file, "--dry-run"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    choice = chosen.plan.rotation_choice
    lines = done.stdout.splitlines()
    at = lines.index(f"rotations   R1, R2, R3, R4; seed {choice.seed}, of 3 tried on 4 calibration samples")
    assert lines[at + 1 : at + 4] == [f"  {trial}" for trial in choice.trials]
    told = done.stderr.splitlines()
    assert [line for line in told if line.startswith("rotation seed ")] == [
        *map(str, choice.trials),
        f"rotation seed {choice.seed} is used",
    ]


def test_progress_and_samples(model, blocks, monkeypatch):
    monkeypatch.setattr(planning, "MEASURED_SAMPLES", 3)
    plan, told = plan_for(model, rotation_seeds=2), Told()
    choice = choose_rotation_seed(plan, blocks, CPU, told)
    # 3 samples through the layers and the head, of the original and the rounded model, for 2 seeds.
    assert told.passes[-1] == (36, 36)
    assert [done for done, _ in told.passes] == sorted(done for done, _ in told.passes)
    assert {total for _, total in told.passes} == {36}
    assert told.messages == [str(trial) for trial in choice.trials]
    assert choice.samples == 3
    assert choice == choose_rotation_seed(plan, blocks[:3], CPU)


@pytest.mark.parametrize(
    ("method", "scheme", "arguments"),
    [
        ("gptq", "W4A4", {}),
        ("sliderquant-published", "W2A16", {"settings": {"epochs": 2, "matmul": "float32"}, "average_bits": 3}),
        ("sliderquant", "W4A4KV4", {"settings": {"epochs": 2, "matmul": "float32"}, "rotate": None}),
    ],
)
def test_methods_go_on_from_the_chosen_seed(model, calibration_file, tmp_path, method, scheme, arguments):
    arguments = {
        "rotate": ["R1", "R2", "R4"],
        "calibration": str(calibration_file),
        "device": "cpu",
        **arguments,
        **SMALL,
    }
    result = sliderquant.quantize(model, tmp_path / "out", scheme, method, seed=3, rotation_seeds=3, **arguments)
    choice = result.plan.rotation_choice
    assert [trial.seed for trial in choice.trials] == [3, 4, 5]
    assert result.plan.rotations.seed == choice.seed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sliderquant"]["rotations"]["seed"] == choice.seed
    # Of another seed the weights would be of no use: the loaded model is close to the original.
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        found = result.load("cpu", "float32")(ids).logits
    assert (found - expected).norm() < 0.6 * expected.norm()


def test_one_seed_measures_nothing(model, tmp_path):
    result = sliderquant.quantize(
        model, tmp_path / "out", "W4A16", "rtn", rotate=["R1"], calibration="nowhere.txt", device="cpu"
    )
    assert (result.report["rotation_choice"], result.plan.rotations.seed) == (None, 2)
    assert "Seeds of the rotations" not in (tmp_path / "out" / "sliderquant-report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotate": None}, "rotation_seeds 4: there are no rotations to choose a seed for"),
        ({"rotation_seeds": 0}, "rotation_seeds 0: expected a whole number of seeds to try, at least 1"),
        ({"rotate": ["R3"]}, "rotate R3: of use only where"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_errors_come_before_any_work(arguments, message, model, calibration_file, tmp_path, monkeypatch):
    monkeypatch.setattr("sliderquant.choosing.plans.choose_rotation_seed", lambda *_: pytest.fail("work was begun"))
    arguments = {"rotate": ["R1"], "rotation_seeds": 4, "calibration": str(calibration_file), **SMALL, **arguments}
    for call in (
        lambda: sliderquant.quantize(model, tmp_path / "out", "W4A16", "rtn", **arguments),
        lambda: sliderquant.plan(model, "W4A16", "rtn", **arguments),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_the_memory_of_trying(model, monkeypatch):
    single, several = (plan_for(model, rotation_seeds=seeds) for seeds in (1, 4))
    assert (single.chooses_rotation, several.chooses_rotation) == (False, True)
    # The head of the tiny model, and its logits, are more than a layer.
    assert several.memory_bytes == 4 * 2048 * (64 + 5 * memory.CHOOSING_TOKENS_AT_ONCE) > single.memory_bytes
    assert several.host_memory_bytes - several.memory_bytes == 2048 * 64 * 4 + 3 * 4 * 32 * 64 * 4
    monkeypatch.setattr(memory, "CHOOSING_STREAM_GB", 1e-6)
    assert plan_for(model).host_memory_bytes - several.memory_bytes == 2048 * 64 * 4 + 1000


def test_another_seed_of_the_same_rotations(model):
    source = open_model(model)
    first = RotatedSource.of(source, Rotations.of_model(source, ["R1", "R2"], seed=1))
    again, expected = first.with_seed(7), RotatedSource.of(source, Rotations.of_model(source, ["R1", "R2"], seed=7))
    assert again.rotations == expected.rotations
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(again.weight(name, CPU), expected.weight(name, CPU))
    assert not torch.equal(again.weight(name, CPU), first.weight(name, CPU))
