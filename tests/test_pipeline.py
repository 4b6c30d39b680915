"""Whole runs on a tiny model: what is trained is what is stored, and nothing is left behind when one goes wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sliderquant
from sliderquant import pipeline
from sliderquant.baselines.rtn import rtn_layer
from sliderquant.checkpoint import verify
from sliderquant.errors import InputError
from sliderquant.models.source import open_model
from sliderquant.progress import Progress

# Two stages, and ramps.
SETTINGS = {"epochs": 2, "gamma": 0.5, "windows": {"shallow": 4, "deep": 4}, "matmul": "float32"}


def run(model, out, text, scheme="W2A16-g32", **kwargs):
    arguments = {"settings": SETTINGS, "calibration": str(text), "samples": 4, "seqlen": 32, **kwargs}
    return sliderquant.quantize(model, out, scheme=scheme, **arguments)


@pytest.fixture(scope="module")
def finished(tiny_llama, calibration_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return run(tiny_llama, out, calibration_file, perplexity_on=f"{calibration_file}[:6000]")


def test_the_report_says_what_was_done(finished, tiny_llama, calibration_file):
    report = json.loads((finished.path / "sliderquant-report.json").read_text())
    assert report == json.loads(json.dumps(finished.report))
    assert (report["scheme"], report["method"], report["seed"]) == ("W2A16-g32", "sliderquant", 2)
    assert report["settings"]["epochs"] == 2
    assert [entry["layers"] for entry in report["training"]] == [[0], [0, 1], [1]] * 2
    assert [entry["fraction"] for entry in report["training"]] == [0.5] * 3 + [1.0] * 3
    assert all(len(entry["losses"]) == 1 for entry in report["training"])
    assert all(entry["seconds"] > 0 for entry in report["training"])
    assert all(0 < entry["tokens_per_second"] < 1e6 for entry in report["training"])
    for name in ("before", "after"):
        measured = report["perplexity"][name]
        assert {"value", "dataset", "seqlen", "tokens", "tokenizer", "dtype"} <= set(measured)
    assert set(report["seconds"]) == {"evaluate_before", "refine", "write", "evaluate_after", "total"}
    assert report["peak_memory_bytes"]["host"] > 0
    assert {"torch", "transformers", "sliderquant"} <= set(report["versions"])


def test_the_measured_perplexity_is_that_of_the_written_model(finished, calibration_file):
    source = f"{calibration_file}[:6000]"
    again = sliderquant.evaluate(finished.path, source, seqlen=32)
    assert again.value == pytest.approx(finished.perplexity["after"], rel=1e-6)
    assert sliderquant.evaluate(finished.plan.source.folder, source, seqlen=32).value == finished.perplexity["before"]


def test_everything_else_is_carried_over(finished, tiny_llama):
    original = load_file(tiny_llama / "model.safetensors")
    written = load_file(finished.path / "model.safetensors")
    quantized = {f"{name}.weight" for name in finished.plan.schemes}
    assert set(original) - quantized == {name for name in written if ".weight_" not in name}
    for name in set(original) - quantized:
        assert torch.equal(original[name], written[name])
    tokenizer = AutoTokenizer.from_pretrained(finished.path)
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(tiny_llama)("a b").input_ids


def test_the_loaded_model_generates(finished):
    model = finished.load()
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 7)


def test_same_seed_same_bits_and_another_seed_others(finished, tiny_llama, calibration_file, tmp_path):
    again = run(tiny_llama, tmp_path / "again", calibration_file)
    other = run(tiny_llama, tmp_path / "other", calibration_file, seed=3)
    files = [(result.path / "model.safetensors").read_bytes() for result in (finished, again, other)]
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("order", ["sweep", "window"])
def test_refining_lowers_the_error_of_the_output(tiny_llama, calibration_file, tmp_path, order):
    settings = {**SETTINGS, "epochs": 16, "stage_order": order}
    refined = run(tiny_llama, tmp_path / "refined", calibration_file, settings=settings, samples=16)
    rounded = run(tiny_llama, tmp_path / "rounded", calibration_file, method="rtn", settings=None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(calibration_file.read_text()[-1500:], return_tensors="pt").input_ids[:, :100]
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def error(model):
        want = original.model(ids).last_hidden_state
        return ((model.model(ids).last_hidden_state - want).norm() / want.norm()).item()

    assert error(refined.load(dtype="float32")) < 0.9 * error(rounded.load(dtype="float32"))
    orders = [(entry["layers"], entry["fraction"]) for entry in refined.report["training"]]
    if order == "sweep":
        assert [fraction for _, fraction in orders] == [0.5] * 3 + [1.0] * 3
    else:
        assert [fraction for _, fraction in orders] == [0.5, 1.0] * 3


def test_rtn_is_round_to_nearest(tiny_llama, tmp_path):
    result = sliderquant.quantize(tiny_llama, tmp_path / "rtn", scheme="W4A16-g32", method="rtn")
    source = open_model(tiny_llama)
    model = result.load(dtype="float32")
    for layer in range(2):
        for name, (_, value) in rtn_layer(source, layer, result.plan.schemes, torch.device("cpu")).items():
            assert torch.equal(model.get_submodule(name).dequantize(), value)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"num_hidden_layers": 1}, "float16"),
        ({"tie_word_embeddings": False, "num_key_value_heads": 4}, "bfloat16"),
        ({"num_hidden_layers": 5, "num_key_value_heads": 1}, "bfloat16"),
        ({"attention_bias": True, "mlp_bias": True}, "float16"),
    ],
)
def test_other_members_of_the_family(random_model, calibration_file, tmp_path, changes, dtype):
    folder = random_model(tmp_path / "model", dtype=dtype, **changes)
    result = run(folder, tmp_path / "out", calibration_file, scheme="W4A16-g32")
    assert result.report["training"][-1]["layers"] == [changes.get("num_hidden_layers", 2) - 1]
    ids = torch.arange(10, 50)[None]
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    packed = result.load(dtype="float32")(ids).logits
    assert (packed - original).norm() < 0.35 * original.norm()


def test_an_uneven_model_with_the_fallback(tiny_llama, calibration_file, tmp_path):
    result = run(tiny_llama, tmp_path / "out", calibration_file, scheme="W4A16-g64", per_channel_fallback=True)
    model = result.load()
    assert model.model.layers[0].mlp.down_proj.scheme.group_size is None
    assert model.model.layers[0].mlp.up_proj.scheme.group_size == 64


def test_dry_plan_reads_no_calibration_and_writes_nothing(tiny_llama, tmp_path):
    plan = sliderquant.plan(tiny_llama, scheme="W4A16-g32", settings={"epochs": 3})
    assert plan.settings.epochs == 3
    assert list(tmp_path.iterdir()) == []


class Stops(Progress):
    """Presses Ctrl-C in the middle of refining."""

    def __init__(self, error):
        self.error = error

    def window_done(self, report):
        if report.fraction == 1.0:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_run_leaves_nothing(tiny_llama, calibration_file, tmp_path, error):
    with pytest.raises(type(error)):
        run(tiny_llama, tmp_path / "deep" / "out", calibration_file, progress=Stops(error))
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupted_run_leaves_the_old_checkpoint(finished, tiny_llama, calibration_file, tmp_path):
    out = tmp_path / "out"
    first = run(tiny_llama, out, calibration_file, method="rtn", settings=None)
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, out, calibration_file, overwrite=True, progress=Stops(KeyboardInterrupt()))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_an_error(random_model, calibration_file, tmp_path):
    folder = random_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("sliderquant", "rtn"):
        with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight holds values that are not finite"):
            run(folder, tmp_path / "out", calibration_file, method=method, settings=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W5A16"}, "weights of 5 bits"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"settings": {"epoch": 1}}, "unknown setting 'epoch'"),
        ({"calibration": "missing.txt"}, "'missing.txt': no such file"),
        ({"perplexity_on": "missing.txt"}, "'missing.txt': no such file"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"samples": 0}, "samples 0"),
        ({"seqlen": 4096}, "seqlen 4096: expected 2 to 128"),
        ({"scheme": "W4A16-g128"}, "groups of 128 do not divide"),
    ],
)
def test_bad_arguments_are_found_before_any_work(
    tiny_llama, calibration_file, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(pipeline, "refine_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match=message):
        run(tiny_llama, tmp_path / "out", calibration_file, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(tiny_llama, calibration_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "refine_model", lambda *_: pytest.fail("work began"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run(tiny_llama, tmp_path / "out", calibration_file)
    with pytest.raises(InputError, match="is not a quantized checkpoint and is not overwritten"):
        run(tiny_llama, tmp_path / "out", calibration_file, overwrite=True)


def test_calibration_shorter_than_one_block(tiny_llama, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(InputError, match="shorter than one block of 32"):
        run(tiny_llama, tmp_path / "out", short)
    assert not (tmp_path / "out").exists()


def test_activations_are_quantized_while_learning(tiny_llama, calibration_file, tmp_path):
    """Weights of 8 bits alone lose almost nothing: what is left is the loss by the inputs."""
    losses = {}
    for scheme in ("W8A16", "W8A8", "W8A4"):
        result = run(tiny_llama, tmp_path / scheme, calibration_file, scheme, rotate=())
        stages = result.report["training"]
        losses[scheme] = [sum(entry["losses"][-1] for entry in stages if entry["fraction"] == f) for f in (0.5, 1.0)]
    for stage in range(2):
        assert losses["W8A4"][stage] > 10 * losses["W8A8"][stage]
    assert losses["W8A8"][1] > losses["W8A16"][1]
    assert losses["W8A4"][1] > losses["W8A4"][0]


def test_learning_beats_rounding_with_low_bit_activations(tiny_llama, calibration_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(calibration_file.read_text(), return_tensors="pt").input_ids[0, : 8 * 32].view(8, 32)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    errors = {}
    for method, settings in (("rtn", None), ("sliderquant", {"epochs": 20})):
        made = run(tiny_llama, tmp_path / method, calibration_file, "W2A4", method=method, settings=settings, rotate=())
        with torch.no_grad():
            errors[method] = (made.load("cpu", "float32")(ids).logits - original(ids).logits).norm()
    assert errors["sliderquant"] < 0.9 * errors["rtn"]


@pytest.fixture
def untied_head(random_model, tmp_path):
    """config.json ties the head to the embedding, and the files hold another."""
    folder = random_model(tmp_path / "model", tie_word_embeddings=False)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {"method": "rtn"},
        {"method": "rtn", "rotate": ["R1"]},
        {"method": "rtn", "rotate": ["R1", "R2", "R4"], "rotation_seeds": 2},
        {"method": "rtn", "scheme": "W4A16-g32", "average_bits": 7},
        {"method": "gptq"},
        {"method": "sliderquant-published", "settings": {"epochs": 1, "matmul": "float32"}},
        {"method": "sliderquant", "effort": "light", "settings": {"epochs": 1, "matmul": "float32"}},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_a_head_that_is_not_the_embedding(untied_head, calibration_file, tmp_path, how):
    """By every way that reads the head: the checkpoint computes what transformers computes of the original."""
    text = f"{calibration_file}[:3000]"
    made = run(
        untied_head,
        tmp_path / "out",
        calibration_file,
        **{"scheme": "W8A16", "settings": None, **how},
        perplexity_on=text,
    )
    ids = torch.randint(2, 2048, (1, 32), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(untied_head, dtype=torch.float32)
    with torch.no_grad():
        want, got = original(ids).logits, made.load(device="cpu", dtype="float32")(ids).logits
    assert (got - want).norm() < 0.1 * want.norm()
    assert made.perplexity["after"] == pytest.approx(made.perplexity["before"], rel=0.1)
    assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("rotate", [None, ["R1"]])
def test_a_model_as_its_base_saves_it(random_model, calibration_file, tmp_path, rotate):
    """No prefix, and the tied tensor stored as the head."""
    folder = random_model(tmp_path / "model")
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = run(folder, tmp_path / "out", calibration_file, "W8A16", method="rtn", settings=None, rotate=rotate)
    ids = torch.randint(2, 2048, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert (made.load(device="cpu", dtype="float32")(ids).logits - want).norm() < 0.03 * want.norm()


def test_rounding_needs_no_tokenizer(random_model, calibration_file, tmp_path):
    folder = random_model(tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    made = run(folder, tmp_path / "out", calibration_file, method="rtn", settings=None)
    assert not list(made.path.glob("*token*"))
    for arguments in ({"method": "gptq"}, {"method": "rtn", "perplexity_on": str(calibration_file)}):
        with pytest.raises(InputError, match="its tokenizer cannot be read"):
            run(folder, tmp_path / "other", calibration_file, settings=None, **arguments)
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        sliderquant.plan(folder, method="gptq", scheme="W4A16-g32", seqlen=32)


@pytest.mark.parametrize("where", ["model", "model/", "."])
def test_the_model_is_never_overwritten(random_model, calibration_file, tmp_path, where):
    folder = random_model(tmp_path / "model")
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(
        InputError, match=r"exists already and is the folder of the model itself|holds the folder of the model"
    ):
        run(folder, tmp_path / where, calibration_file, method="rtn", settings=None, overwrite=True)
    assert (folder / "model.safetensors").exists()


def test_a_checkpoint_inside_the_folder_of_the_model(random_model, calibration_file, tmp_path):
    folder = random_model(tmp_path / "model")
    made = run(folder, folder / "quantized", calibration_file, method="rtn", settings=None)
    assert verify(made.path).ok


def test_an_attention_of_the_hub_is_never_fetched(random_model, calibration_file, tmp_path):
    folder = random_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "someone/kernel"}))
    made = run(folder, tmp_path / "out", calibration_file, method="rtn", settings=None)
    assert made.load(device="cpu").config._attn_implementation == "sdpa"


CONFIGS = [
    {"torch_dtype": "bfloat16", "dtype": None},
    {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None, "rope_theta": 1e4},
    {"my_own_field": {"a": [1, 2]}, "architectures": None, "use_cache": False, "eos_token_id": [1, 2]},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: next(iter(changes)))
def test_the_configuration_is_the_originals(random_model, calibration_file, tmp_path, changes):
    folder = random_model(tmp_path / "model")
    stored = {**json.loads((folder / "config.json").read_text()), **changes}
    stored = {name: value for name, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stored))
    made = run(folder, tmp_path / "out", calibration_file, method="rtn", settings=None)
    written = json.loads((made.path / "config.json").read_text())
    ours = {"quantization_config", "sliderquant"} | ({"architectures"} - stored.keys())
    assert {name: value for name, value in written.items() if name not in ours} == stored
    (made.path / "config.json").write_text(json.dumps({name: v for name, v in written.items() if name not in ours}))
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, made.path))
    assert {**before, "_name_or_path": None} == {**after, "_name_or_path": None}


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-sym", "W4A16-g32", "W8A16", "W8A16-g32-sym", "W4A8", "W2A16-g32"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 64},
        {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 32},
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 32,
        },
    ],
    ids=lambda sizes: f"{sizes['hidden_size']}x{sizes['num_key_value_heads']}x{sizes['head_dim']}",
)
def test_small_linears(random_model, calibration_file, tmp_path, sizes, scheme):
    """What is loaded computes what the stored weights say, for a zero-point of one word and weights of few rows."""
    folder = random_model(tmp_path / "model", num_hidden_layers=1, vocab_size=2048, **sizes)
    grouped = {"per_channel_fallback": True}
    made = run(folder, tmp_path / "out", calibration_file, scheme, method="rtn", settings=None, **grouped)
    source = open_model(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = rtn_layer(source, 0, made.plan.schemes, torch.device("cpu"))
    dense.load_state_dict({f"{name}.weight": value for name, (_, value) in stored.items()}, strict=False)
    ids = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    if "A16" in scheme:
        with torch.no_grad():
            want, got = dense(ids).logits, made.load(device="cpu", dtype="float32")(ids).logits
        assert (got - want).norm() <= 1e-4 * want.norm()
    assert verify(made.path).ok
