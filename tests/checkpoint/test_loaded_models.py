"""Running a model that is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import sliderquant
from sliderquant.checkpoint import CheckpointWriter
from sliderquant.loading import load
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme

Tiny = Callable[..., SimpleNamespace]
DEMO = Path(sliderquant.__file__).parent / "assets" / "demo-llama-5m"
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 64


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert actual.dtype == expected.dtype
    assert (actual - expected).norm() <= relative * expected.norm()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, rounded to 4 bits."""
    out = tmp_path_factory.mktemp("demo") / "out"
    scheme = Scheme.parse("W4A16-g64")
    with CheckpointWriter(out) as writer:
        for key, tensor in load_file(DEMO / "model.safetensors").items():
            if key.endswith("proj.weight"):
                quantized = round_to_nearest(tensor.float(), scheme, tensor.dtype)
                writer.add_quantized(key.removesuffix(".weight"), quantized, scheme, dequantize(quantized, scheme))
            else:
                writer.add_tensor(key, tensor)
        writer.finish(json.loads((DEMO / "config.json").read_text()), DEMO)
    return out


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def demo_model(request: pytest.FixtureRequest, demo: Path) -> Any:
    return load(demo, dtype=request.param)


def generate(model: Any, inputs: Any, **keywords: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1, **keywords)


def test_generate(demo_model: Any, demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    tokens = generate(demo_model, inputs)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("Once upon a time")


def test_left_padded_batches(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = load(demo, dtype="float32")
    texts = ["Once upon a time", "The dog and the little girl went to the park to"]
    batch = generate(model, tokenizer(texts, return_tensors="pt", padding=True))
    for row, text in zip(batch, texts, strict=True):
        alone = generate(model, tokenizer(text, return_tensors="pt"))[0]
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(alone, skip_special_tokens=True)


def test_static_cache(demo_model: Any, demo: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(demo)("Once upon a time", return_tensors="pt")
    expected = generate(demo_model, inputs)
    assert torch.equal(generate(demo_model, inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize(("dtype", "backend"), [("bfloat16", "inductor"), ("float32", "aot_eager")])
@torch.no_grad()
def test_compile_without_graph_breaks(dtype: str, backend: str, tiny: Tiny) -> None:
    torch._dynamo.reset()
    model = load(tiny("W4A16-g64", num_hidden_layers=1).path, dtype=dtype)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    ids = IDS.to(model.device)
    close(compiled(ids).logits, model(ids).logits, 1e-4 if dtype == "float32" else 3e-2)


@torch.no_grad()
def test_compile_the_demo_model(demo: Path) -> None:
    torch._dynamo.reset()
    model = load(demo)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    ids = IDS.to(model.device)
    close(compiled(ids).logits, model(ids).logits, 3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_load_on_a_gpu(dtype: str, demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    expected = load(demo, device="cpu", dtype="float32")(**inputs).logits
    model = load(demo, device="auto", dtype=dtype)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    on_gpu = {key: value.cuda() for key, value in inputs.items()}
    close(model(**on_gpu).logits.float().cpu(), expected, 1e-2 if dtype == "float32" else 5e-2)
    tokens = generate(model, on_gpu)
    assert torch.equal(generate(model, on_gpu, cache_implementation="static"), tokens)
