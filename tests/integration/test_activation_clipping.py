"""Learned clipping of activations, queries, keys and values: from learning through the checkpoint to what runs."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import sliderquant
from sliderquant import pipeline
from sliderquant.checkpoint import describe, verify
from sliderquant.errors import CheckpointError
from sliderquant.modules import PackedLinear, merge_linears, split_linears

IDS = torch.randint(2, 2000, (2, 13), generator=torch.Generator().manual_seed(5))
CASES = {
    "W4A4KV4": ("W4A4KV4", ("R1", "R2", "R3", "R4"), "auto"),
    "W4A16KV4": ("W4A16KV4", (), "always"),
    "W4A8-g32-sym": ("W4A8-g32-sym", (), "always"),
}
INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
INPUTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def original(random_model, tmp_path_factory):
    """In 16 bits: factors must not be."""
    return random_model(tmp_path_factory.mktemp("clipping") / "model", dtype="bfloat16", model_type="qwen2")


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, original, tmp_path_factory, calibration_file):
    """The folder, its scheme, and what the layers had learned when they were handed over."""
    scheme, rotate, choice = CASES[request.param]
    learned, stored = {}, pipeline.stored_clips

    def kept(layer):
        found = stored(layer)
        learned.update({f"model.layers.{len(learned) // max(len(found), 1)}.{name}": x for name, x in found.items()})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stored_clips", kept)
        out = tmp_path_factory.mktemp("clipping") / "out"
        settings = {"epochs": 2, "activation_clipping": choice, "learning_rates": {"activation_clipping": 0.1}}
        result = sliderquant.quantize(
            original, out, scheme, "sliderquant", settings=settings, rotate=rotate, device="cpu",
            calibration=str(calibration_file), samples=4, seqlen=32,
        )  # fmt: skip
    return result.path, scheme, learned


def clips_of(folder):
    return {name: x for name, x in load_file(folder / "model.safetensors").items() if name.endswith("_clip")}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def remove_clips(model):
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.input_clip = None
        if hasattr(module, "clips"):
            module.clips.clear()


def test_what_was_learned_is_stored(checkpoint):
    folder, scheme, learned = checkpoint
    stored = clips_of(folder)
    kinds = [f"{name}.input_clip" for name in INPUTS] if "A16" not in scheme else []
    kinds += [f"self_attn.{site}_clip" for site in ("query", "key", "value")] if "KV" in scheme else []
    assert stored.keys() == {f"model.layers.{index}.{kind}" for index in range(2) for kind in kinds}
    assert stored.keys() == learned.keys()
    start = torch.tensor(4.0).sigmoid()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, learned[name])
        assert ((tensor > 0.5) & (tensor < 1) & (tensor != start)).all(), name
    for group in (INPUTS[:3], INPUTS[4:6]) if "A16" not in scheme else ():
        assert len({tuple(stored[f"model.layers.1.{name}.input_clip"].tolist()) for name in group}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["sliderquant"]["activation_clipping"] is True
    assert config["quantization_config"]["quant_method"] == "sliderquant"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_stored_runs(checkpoint, dtype):
    folder, _, _ = checkpoint
    stored, model = clips_of(folder), sliderquant.load(folder, device="cpu", dtype=dtype)
    state = model.state_dict()
    assert {name for name in state if name.endswith("_clip")} == stored.keys()
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name], stored[name]) for name in stored)
    want = logits(model)
    assert torch.equal(logits(sliderquant.load(folder, device="cpu", dtype=dtype, merge=False)), want)
    remove_clips(model)
    assert (logits(model) - want).norm() > 1e-3 * want.norm()


def test_copies_casts_and_merging_keep_it(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    model = sliderquant.load(folder, device="cpu", dtype="float32")
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)
    split_linears(model)
    assert torch.equal(logits(model), want)
    merge_linears(model)
    assert torch.equal(logits(model), want)
    stored = clips_of(folder)
    state = model.half().state_dict()
    assert {name for name in state if name.endswith("_clip")} == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    model.to("meta")


def test_save_pretrained_and_load_state_dict(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    model = sliderquant.load(folder, device="cpu", dtype="float32")
    want = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(sliderquant.load(tmp_path / "again", device="cpu", dtype="float32")), want)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: torch.full_like(x, 0.5) if name.endswith("_clip") else x for name, x in state.items()}
    model.load_state_dict(changed)
    assert not torch.equal(logits(model), want)
    model.load_state_dict(state)
    assert torch.equal(logits(model), want)
    name = next(name for name in state if name.endswith("_clip"))
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        model.load_state_dict({key: x for key, x in state.items() if key != name})
    with pytest.raises(RuntimeError, match=rf"{name} is \[2\.0, 2\.0\], expected two factors above 0 and at most 1"):
        model.load_state_dict(state | {name: torch.full((2,), 2.0)})


def test_siblings_that_are_clipped_differently(checkpoint):
    """They do not share what is rounded: loaded from a file they are not merged, loaded into a merged one they are
    refused."""
    folder, scheme, _ = checkpoint
    if "A16" in scheme:
        pytest.skip("has no clipping of inputs")
    model = sliderquant.load(folder, device="cpu", dtype="float32")
    name = "model.layers.0.self_attn.k_proj.input_clip"
    changed = model.state_dict() | {name: torch.tensor([0.5, 0.25])}
    with pytest.raises(RuntimeError, match=r"input_clip \(0\.5, 0\.25\) of a linear that shares its rounded input"):
        model.load_state_dict(changed)


def test_compiled_and_generated(checkpoint):
    folder, _, _ = checkpoint
    model = sliderquant.load(folder, device="cpu", dtype="float32")
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS, use_cache=False).logits, logits(model))
    keywords = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    tokens = model.generate(IDS, **keywords)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **keywords), tokens)


def test_description_and_verification(checkpoint):
    folder, _, _ = checkpoint
    assert verify(folder).ok
    described = describe(folder)
    assert described.clipped
    stored = clips_of(folder)
    assert described.bytes_by_part["clipping"] == 8 * len(stored)
    card = (folder / "README.md").read_text()
    assert "ranges of activations are clipped" in card
    assert "compressed-tensors\n" not in card


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """`damaged(change)`: a copy of the checkpoint with other tensors or another configuration."""

    def make(change=lambda tensors: None, change_config=lambda config: None):
        folder = tmp_path / "damaged"
        folder.mkdir()
        tensors = load_file(checkpoint[0] / "model.safetensors")
        config = json.loads((checkpoint[0] / "config.json").read_text())
        change(tensors)
        change_config(config)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"tensor {name} is missing"),
        (lambda tensors, name: tensors.update({name: torch.ones(3)}), r"tensor {name} has shape \[3\]"),
        (lambda tensors, name: tensors.update({name: torch.ones(2).half()}), r"tensor {name} .*16"),
        (
            lambda tensors, name: tensors.update({name: torch.tensor([0.5, -1])}),
            r"{name} is \[0\.5, -1\.0\], expected two",
        ),
    ],
    ids=["missing", "shape", "dtype", "value"],
)
def test_damaged_checkpoints(checkpoint, damaged, change, message):
    name = min(checkpoint[2])
    with pytest.raises(CheckpointError, match=message.replace("{name}", name)):
        sliderquant.load(damaged(lambda tensors: change(tensors, name)), device="cpu")


def test_a_configuration_that_does_not_say_so(checkpoint, damaged):
    folder = damaged(change_config=lambda config: config["sliderquant"].pop("activation_clipping"))
    with pytest.raises(CheckpointError, match=r"_clip|quant_method is 'sliderquant'"):
        sliderquant.load(folder, device="cpu")


def test_a_model_without_it_stores_nothing(original, tmp_path, calibration_file):
    for scheme, choice in (("W4A8", "auto"), ("W4A4", "never"), ("W4A16", "always")):
        result = sliderquant.quantize(
            original, tmp_path / scheme, scheme, "sliderquant", rotate=(), device="cpu",
            settings={"epochs": 1, "activation_clipping": choice}, calibration=str(calibration_file),
            samples=2, seqlen=32,
        )  # fmt: skip
        assert not clips_of(result.path)
        config = json.loads((result.path / "config.json").read_text())
        assert "activation_clipping" not in config["sliderquant"]
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert not describe(result.path).clipped
