"""Parts quantized by hand in a transformers model must give the same figures."""

import math
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sliderquant
from sliderquant.calibration import layerwise
from sliderquant.errors import InputError
from sliderquant.evaluation import sensitivity as module
from sliderquant.evaluation.sensitivity import sensitivity
from sliderquant.models.source import open_model
from sliderquant.modules import insert_rotations, round_attention
from sliderquant.progress import Progress
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations

SEQLEN, BLOCKS = 48, 5
ALL = ["R1", "R2", "R3", "R4"]


@pytest.fixture(scope="module")
def text(calibration_file):
    return f"{calibration_file}[:4000]"


@pytest.fixture(scope="module")
def four_layers(random_model, tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("four") / "model", num_hidden_layers=4, tie_word_embeddings=False)


def study(model, scheme, text, **arguments):
    return sensitivity(model, scheme, text, **{"seqlen": SEQLEN, "max_blocks": BLOCKS, "device": "cpu", **arguments})


def rounded(weight, bits, group, symmetric):
    """Round to nearest, written down once more; scales in bf16."""
    groups = weight.float().reshape(len(weight), -1, group or weight.shape[1])
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / top).bfloat16().float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    return (((groups / scale).round() + zero).clamp(0, top) - zero).mul(scale).reshape(weight.shape)


class ByHand:
    """A transformers model, quantized in some places, and what comes out of it."""

    def __init__(self, folder, text, bits, group, symmetric, activation_bits, round_tokens, kv_bits=16, rotations=None):
        self.folder, self.how, self.round_tokens = folder, (bits, group, symmetric), round_tokens
        self.activation_bits, self.kv_bits, self.rotations = activation_bits, kv_bits, rotations
        path, _, part = text.partition("[:")
        characters = Path(path).read_text(encoding="utf-8")[: int(part.rstrip("]"))]
        tokens = AutoTokenizer.from_pretrained(folder)(characters, return_tensors="pt").input_ids[0]
        self.blocks = tokens[: BLOCKS * SEQLEN].view(BLOCKS, SEQLEN)
        self.original = self.run(lambda layer, name: False)

    @torch.no_grad()
    def run(self, chosen):
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if self.rotations is not None:
            self.rotate(model)
        for index, layer in enumerate(model.model.layers):
            if self.kv_bits < 16:
                layer.self_attn.rounding.enabled = chosen(index, "self_attn")
            for name, linear in list(layer.named_modules()):
                if not name.endswith("_proj") or not chosen(index, name.rpartition(".")[2]):
                    continue
                linear = getattr(linear, "linear", linear)  # behind a rotation
                linear.weight.copy_(rounded(linear.weight, *self.how))
                if self.activation_bits < 16:
                    linear.register_forward_pre_hook(
                        lambda _, inputs: (self.round_tokens(inputs[0], self.activation_bits, False).float(),)
                    )
        out = model(self.blocks, output_hidden_states=True)
        return out.logits.double(), out.hidden_states[-1].double()

    def rotate(self, model):
        source = open_model(self.folder)
        source = RotatedSource.of(source, self.rotations)
        weights = {name: source.weight(name, torch.device("cpu")) for name in model.state_dict()}
        model.load_state_dict(weights)
        insert_rotations(model, source.family, self.rotations)
        round_attention(model, source.family, self.kv_bits, self.rotations)

    def effect(self, chosen):
        """Perplexity, output error and KL divergence."""
        (logits, hidden), (expected_logits, expected) = self.run(chosen), self.original
        logs, expected_logs = logits.log_softmax(-1), expected_logits.log_softmax(-1)
        loss = F.nll_loss(logs[:, :-1].flatten(0, 1), self.blocks[:, 1:].flatten())
        divergence = (expected_logs.exp() * (expected_logs - logs)).sum(-1).mean()
        return math.exp(loss), ((hidden - expected).norm() / expected.norm()) ** 2, divergence


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        ("W2A16-g32", (2, 32, False, 16)),
        ("W4A4", (4, None, False, 4)),
        ("W3A16-sym", (3, None, True, 16)),
    ],
)
def test_every_figure_is_that_of_a_model_quantized_by_hand(four_layers, text, round_tokens, scheme, how):
    hand = ByHand(four_layers, text, *how, round_tokens)
    result = study(four_layers, scheme, text)
    layers, kinds = result.layers, {part.name: part for part in result.kinds}
    everything = hand.effect(lambda layer, name: True)
    expected_original = hand.effect(lambda layer, name: False)[0]
    for effect, reference, chosen in (
        (result.everything, expected_original, lambda layer, name: True),
        (layers[0].alone, expected_original, lambda layer, name: layer == 0),
        (layers[2].alone, expected_original, lambda layer, name: layer == 2),
        (layers[0].all_but, everything[0], lambda layer, name: layer != 0),
        (layers[3].all_but, everything[0], lambda layer, name: layer != 3),
        (kinds["down_proj"].alone, expected_original, lambda layer, name: name == "down_proj"),
        (kinds["q_proj"].all_but, everything[0], lambda layer, name: name != "q_proj"),
    ):
        value, error, divergence = hand.effect(chosen)
        # With rounded activations a difference in the last bit may move a value to the next level.
        tolerance = 1e-2 if how[-1] < 16 else 1e-4
        assert effect.perplexity == pytest.approx(value, rel=tolerance / 10)
        assert effect.perplexity_change == pytest.approx(value - reference, rel=tolerance, abs=value * tolerance / 10)
        assert effect.output_error == pytest.approx(error.item(), rel=tolerance)
        assert effect.kl_divergence == pytest.approx(divergence.item(), rel=tolerance)
    assert result.original == pytest.approx(expected_original, rel=1e-5)
    assert [part.name for part in result.layers] == ["0", "1", "2", "3"]
    assert list(kinds) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sum(part.weights for part in layers) == sum(part.weights for part in kinds.values())
    assert kinds["down_proj"].weights == 4 * 64 * 96


@pytest.mark.parametrize(("rotate", "seed"), [(["R1", "R2"], 3), (["R4"], 2), (ALL, 5)])
def test_every_figure_is_that_of_a_rotated_model_quantized_by_hand(four_layers, text, round_tokens, rotate, seed):
    rotations = Rotations.of_model(open_model(four_layers), rotate, seed)
    kv_bits = 4 if "R3" in rotate else 16
    scheme = f"W4A4{'KV4' if kv_bits == 4 else ''}-g32"
    hand = ByHand(four_layers, text, 4, 32, False, 4, round_tokens, kv_bits, rotations)
    result = study(four_layers, scheme, text, rotate=rotate, seed=seed)
    kinds = {part.name: part for part in result.kinds}
    expected_original = hand.effect(lambda layer, name: False)[0]
    compared = [
        (result.everything, lambda layer, name: True),
        (result.layers[1].alone, lambda layer, name: layer == 1),
        (result.layers[2].all_but, lambda layer, name: layer != 2),
        (kinds["down_proj"].alone, lambda layer, name: name == "down_proj"),
        (kinds["v_proj"].all_but, lambda layer, name: name != "v_proj"),
    ]
    if kv_bits == 4:
        compared += [
            (kinds["self_attn"].alone, lambda layer, name: name == "self_attn"),
            (kinds["self_attn"].all_but, lambda layer, name: name != "self_attn"),
        ]
    for effect, chosen in compared:
        value, error, divergence = hand.effect(chosen)
        assert effect.perplexity == pytest.approx(value, rel=1e-3)
        assert effect.output_error == pytest.approx(error.item(), rel=1e-2)
        assert effect.kl_divergence == pytest.approx(divergence.item(), rel=1e-2)
    assert result.original == pytest.approx(expected_original, rel=1e-5)
    # The rotated embedding is rounded to bf16 again.
    unrotated = study(four_layers, scheme, text)
    assert result.original == pytest.approx(unrotated.original, rel=5e-3)
    assert result.everything.perplexity != pytest.approx(unrotated.everything.perplexity, rel=1e-3)
    assert (result.rotations, unrotated.rotations) == (rotations.to_dict(), None)


@pytest.mark.parametrize(
    ("scheme", "fallback", "rotate"),
    [
        ("W2A16-g32", False, []),
        ("W4A16-g64", True, []),
        ("W4A8-act-sym", False, []),
        ("W4A4KV4", False, []),
        ("W3A16-g32", False, ["R1", "R2", "R4"]),
        ("W4A4KV4", False, ALL),
    ],
)
def test_with_everything_quantized_it_is_the_checkpoint_by_rtn(tiny_llama, text, tmp_path, scheme, fallback, rotate):
    result = study(tiny_llama, scheme, text, max_blocks=10**6, per_channel_fallback=fallback, rotate=rotate)
    done = sliderquant.quantize(
        tiny_llama, tmp_path / "out", scheme, "rtn", per_channel_fallback=fallback, rotate=rotate, device="cpu"
    )
    measured = sliderquant.evaluate(done.path, text, seqlen=SEQLEN, device="cpu")
    assert result.everything.perplexity == pytest.approx(measured.value, rel=1e-5 if "A16" in scheme else 1e-3)
    original = sliderquant.evaluate(tiny_llama, text, SEQLEN, "cpu").value
    assert result.original == pytest.approx(original, rel=5e-3 if rotate else 1e-6)
    assert (result.blocks, result.tokens) == (measured.blocks, measured.tokens)
    assert len(result.linears) == 7
    assert ("mlp.down_proj: W4A16" in result.linears) == fallback


def test_attention_is_a_kind_of_its_own_where_it_is_quantized(tiny_llama, text):
    rounding, plain = study(tiny_llama, "W8A16KV4", text), study(tiny_llama, "W8A16", text)
    attention = rounding.kinds[-1]
    assert (attention.name, attention.weights) == ("self_attn", 0)
    assert attention.alone.output_error > 0
    assert attention.all_but == plain.everything.__class__(
        plain.everything.perplexity,
        pytest.approx(plain.everything.perplexity - rounding.everything.perplexity),
        plain.everything.output_error,
        plain.everything.kl_divergence,
    )
    assert [part.name for part in plain.kinds] == [part.name for part in rounding.kinds[:-1]]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_other_families(random_model, text, tmp_path, model_type):
    folder = random_model(tmp_path / "model", model_type=model_type)
    result = study(folder, "W4A16-g32", text)
    whole = study(folder, "W4A16-g32", text, max_blocks=10**6)
    assert whole.original == pytest.approx(sliderquant.evaluate(folder, text, SEQLEN, "cpu").value, rel=1e-6)
    assert result.blocks == BLOCKS < whole.blocks
    assert all(part.alone.kl_divergence > 0 for part in result.layers + result.kinds)


class Counting(Progress):
    def __init__(self):
        self.seen, self.messages = [], []

    def layer_passed(self, done, total):
        self.seen.append((done, total))

    def message(self, text):
        self.messages.append(text)


def test_the_work_is_announced_and_nothing_is_done_twice(four_layers, text, monkeypatch):
    rows = []
    forward = LlamaDecoderLayer.forward

    def counted(self, hidden_states, **arguments):
        rows.append(len(hidden_states))
        return forward(self, hidden_states, **arguments)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    progress = Counting()
    result = study(four_layers, "W4A16", text, progress=progress)
    # Beside original, everything and twice 7 kinds: alone and all but are not different before the third layer.
    assert result.passes == 4 * (2 + 14) + 0 + 2 + 2 * 3 + 2 * 4
    assert sum(rows) == BLOCKS * result.passes
    variants = 2 + 2 * 4 + 2 * 7
    assert progress.seen[-1] == (BLOCKS * (result.passes + variants),) * 2
    assert [done for done, _ in progress.seen] == sorted(done for done, _ in progress.seen)
    assert f"{result.passes} passes through a layer, as many as {result.passes / 4:.1f} forward" in progress.messages[0]


def test_memory_changes_nothing_but_the_way(four_layers, text, monkeypatch):
    """Block by block, with the hidden states of a block in files."""
    in_file = []

    class Watched(layerwise.ActivationStream):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            in_file.append(self.in_file)

    monkeypatch.setattr(layerwise, "ActivationStream", Watched)
    progress = Counting()
    at_once, again = study(four_layers, "W2A16", text), study(four_layers, "W2A16", text)
    assert not any(in_file)
    assert at_once == again
    in_file.clear()
    little = study(four_layers, "W2A16", text, memory_gb=1e-6, progress=progress)
    assert in_file
    assert all(in_file)
    assert progress.messages[0].endswith(f"the model is read: {BLOCKS}")
    for one, other in zip(at_once.layers + at_once.kinds, little.layers + little.kinds, strict=True):
        assert astuple(one.alone) == pytest.approx(astuple(other.alone), rel=1e-4, abs=1e-6)
        assert astuple(one.all_but) == pytest.approx(astuple(other.all_but), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "missing.txt", "model": "hub/download"}, "text 'missing.txt': no such file"),
        ({"scheme": "W4A16-g64"}, "groups of 64 do not divide the inputs of mlp.down_proj"),
        ({"scheme": "W5A16"}, "scheme: weights of 5 bits"),
        ({"seqlen": 129}, "seqlen 129: expected 2 to 128"),
        ({"max_blocks": 0}, "max_blocks 0: expected at least 1"),
        ({"memory_gb": 0}, "memory_gb 0: expected more than 0"),
        ({"rotate": ["R3"]}, "rotate R3: of use only where queries and keys are quantized, which W4A16-g32 does not"),
        ({"rotate": ["R1", "X"]}, "rotations X: expected some of R1, R2, R3, R4"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"model": "./missing"}, "missing: no such folder"),
    ],
)
def test_what_is_not_usable_is_said_before_the_work(tiny_llama, text, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "Decoder", None)
    given = {"model": tiny_llama, "scheme": "W4A16-g32", "text": text, **arguments}
    with pytest.raises(InputError, match=message):
        study(**given)
