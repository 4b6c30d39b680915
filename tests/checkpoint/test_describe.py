import json
import re
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import yaml

from sliderquant.checkpoint import CardInfo, describe
from sliderquant.checkpoint.card import render_card
from sliderquant.checkpoint.config import Entry
from sliderquant.schemes import Scheme

Tiny = Callable[..., SimpleNamespace]


def test_describe(tiny: Tiny) -> None:
    folder = tiny("W4A16-g64", down_proj="W2A16").path
    found = describe(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert found.schemes == {"W4A16-g64": 12, "W2A16": 2}
    assert found.layers["down_proj"] == found.layers["q_proj"] == 2
    down, gate_up, qo, kv = 128 * 256, 2 * 256 * 128, 2 * 128 * 128, 2 * 64 * 128
    assert found.quantized_weights == 2 * (down + gate_up + qo + kv)
    dense = 2 * 64 * 128 + 5 * 128
    assert found.weights == found.quantized_weights + dense
    expected = 2 * (down / 4 + (gate_up + qo + kv) / 2)
    assert found.bytes_by_part["packed weights"] == expected
    assert found.bytes_by_part["scales"] == 2 * 4 * (128 + (gate_up + qo + kv) // 64)
    assert found.bytes_by_part["zero-points"] == 2 * (128 // 4 + (gate_up + qo + kv) // 64 // 2)
    assert found.bytes_by_part["embeddings"] == found.bytes_by_part["output head"] == 64 * 128 * 4
    assert found.bytes_by_part["norms"] == 5 * 128 * 4
    assert found.total_bytes == sum(found.bytes_by_part.values())
    packed = sum(found.bytes_by_part[part] for part in ("packed weights", "scales", "zero-points", "shapes"))
    assert found.quantized_bits_per_weight == pytest.approx(8 * packed / found.quantized_weights)
    assert found.bits_per_weight == pytest.approx(8 * found.total_bytes / found.weights)
    assert found.disk_bytes > found.total_bytes
    assert (found.method, found.perplexity, found.has_report, found.has_checksums) == ("rtn", {"text": 8.5}, True, True)
    json.dumps(asdict(found))


def test_describe_activations(tiny: Tiny) -> None:
    found = describe(tiny("W4A4-g64", down_proj="W4A8-act-sym").path)
    assert found.schemes == {"W4A4-g64": 12, "W4A8-act-sym": 2}
    assert found.activations == {"4 bits per token, asymmetric": 12, "8 bits per token, symmetric": 2}
    assert describe(tiny("W4A16-g64", folder="plain").path).activations == {"not quantized": 14}


def test_describe_without_report(tiny: Tiny) -> None:
    folder = tiny().path
    (folder / "sliderquant-report.json").unlink()
    (folder / "sliderquant-checksums.json").unlink()
    found = describe(folder)
    assert (found.method, found.perplexity, found.has_report, found.has_checksums) == (None, {}, False, False)


SYMMETRIC, ASYMMETRIC = Scheme(4, 128, symmetric=True), Scheme(2, 128)


def test_card() -> None:
    info = CardInfo(
        base_model="meta-llama/Llama-3.2-1B",
        license="llama3.2",
        method="SliderQuant",
        command="sliderquant quantize meta-llama/Llama-3.2-1B",
        perplexity={"WikiText2": (9.75, 11.5), "C4": (None, 14.25)},
    )
    text = render_card(info, {"a": SYMMETRIC, "b": SYMMETRIC}, 10**9)
    front, body = text.split("---\n")[1:]
    data = yaml.safe_load(front)
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    assert data["license"] == "llama3.2"
    assert data["base_model_relation"] == "quantized"
    for part in (
        "# Llama-3.2-1B W4A16-g128-sym\n",
        "| W4A16-g128-sym | 2 linear layers |",
        "| weights on disk | 1.0 GB |",
        "| WikiText2 | 9.750 | 11.500 |\n| C4 | - | 14.250 |",
        "sliderquant quantize meta-llama/Llama-3.2-1B",
        "sliderquant.load(",
        "vllm serve",
        'AutoModelForCausalLM.from_pretrained("MODEL")',
    ):
        assert part in body
    assert "dequantize=True" not in body
    assert "Humming" not in body


def test_card_of_a_chat_model() -> None:
    info = CardInfo(method="sliderquant, light effort", calibration="chats.jsonl, 64 samples of 256 tokens")
    text = render_card(info, {"a": ASYMMETRIC}, 1, chat=True)
    assert "tokenizer.apply_chat_template(" in text
    assert "Once upon a time" not in text
    assert "| calibrated on | chats.jsonl, 64 samples of 256 tokens |" in text
    assert "(method: sliderquant, light effort)" in text
    assert "apply_chat_template" not in render_card(info, {"a": ASYMMETRIC}, 1)


def test_card_of_a_model_in_fp32() -> None:
    text = render_card(CardInfo(), {"a": ASYMMETRIC}, 1, dtype=torch.float32)
    assert re.search(r'\| sliderquant \| CPU \| reads it, dense: .*dtype="bfloat16"', text)
    for other in (torch.float16, torch.bfloat16):  # fp16 runs in bf16 on a CPU
        assert "| sliderquant | CPU | runs it: packed" in render_card(CardInfo(), {"a": ASYMMETRIC}, 1, dtype=other)


def test_card_of_an_asymmetric_model() -> None:
    text = render_card(CardInfo(), {"a": ASYMMETRIC}, 1)
    assert "CompressedTensorsConfig(dequantize=True)" in text
    assert "| vLLM 0.32 | NVIDIA GPU | runs it: Humming" in text
    assert "| vLLM 0.32 | CPU | refuses it" in text


def test_card_of_a_model_that_transformers_cannot_read() -> None:
    text = render_card(CardInfo(), {"a": ASYMMETRIC, "b": Scheme(2)}, 1)
    assert re.search(r"\| transformers .* refuses it: it takes one scheme for all linears", text)
    assert "import AutoModelForCausalLM" not in text
    assert "dequantize=True" not in text


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16-sym"])
def test_card_without_quantized_activations_says_nothing_of_them(scheme: str) -> None:
    text = render_card(CardInfo(), {"a": Scheme.parse(scheme)}, 1)
    assert "inputs of these" not in text
    assert "activations" not in text


def test_card_warns_of_readers_that_leave_activations_in_16_bits() -> None:
    text = render_card(CardInfo(), {"a": Scheme.parse("W4A4")}, 1)
    assert "| inputs of these layers | 4 bits per token, asymmetric, while the model runs |" in text
    assert "| NVIDIA GPU | refuses it: it has no scheme for activations with zero-points" in text
    assert "vllm serve" not in text
    assert re.search(r"\| transformers .* leaves activations in 16 bits", text)
    text = render_card(CardInfo(), {"a": Scheme.parse("W4A8-sym-act-sym")}, 1)
    assert re.search(r"\| vLLM .* NVIDIA GPU \| leaves activations in 16 bits", text)
    assert re.search(r"\| transformers .* reads it, dense: it rounds activations", text)
    assert "vllm serve" not in text
    text = render_card(CardInfo(), {"a": Scheme.parse("W4A4"), "b": Scheme.parse("W4A8")}, 1)
    assert "4 bits per token, asymmetric; 8 bits per token, asymmetric" in text
    assert "import AutoModelForCausalLM" not in text  # it cannot read this one


def test_card_of_a_model_that_vllm_runs_as_integers() -> None:
    text = render_card(CardInfo(), {"a": Scheme.parse("W8A8-sym-act-sym")}, 1)
    assert "compressed-tensors `int-quantized`" in text
    assert "| vLLM 0.32 | CPU | runs it" in text
    assert "vllm serve MODEL" in text
    two = {"a": Scheme.parse("W8A8-sym-act-sym"), "b": Scheme.parse("W4A8-sym")}
    assert "`int-quantized` and `pack-quantized`" in render_card(CardInfo(), two, 1)


def test_card_of_a_model_that_others_misread() -> None:
    text = render_card(CardInfo(), {"a": Scheme.parse("W8A16-sym")}, 1, Entry(kv_bits=8))
    assert "**No other tool than sliderquant runs this model**: queries, keys and values are rounded to 8 bits" in text
    assert re.search(r"\| vLLM .* refuses it", text)
    assert re.search(r"\| transformers .* misreads it: it warns", text)
    assert not re.search("vllm serve|import AutoModelForCausalLM", text)


def test_card_names_no_path_of_this_machine() -> None:
    text = render_card(CardInfo(base_model="/home/someone/models/x"), {"a": SYMMETRIC}, 1)
    assert "someone" not in text
    assert "base_model" not in text
