"""In which dtype a checkpoint is measured."""

import math

import pytest
import torch

import sliderquant
from sliderquant.errors import SliderQuantError
from sliderquant.evaluation import models
from sliderquant.evaluation.perplexity import Perplexity


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    return sliderquant.quantize(
        tiny_llama, tmp_path_factory.mktemp("out") / "out", scheme="W4A16-g32", method="rtn"
    ).path


def test_a_perplexity_that_is_not_finite(checkpoint, tiny_llama, calibration_file, monkeypatch):
    def broken(model, *_):
        return Perplexity(math.nan, "text", 8, 1, 8, "tokenizer", "float16", "cpu")

    monkeypatch.setattr(models, "perplexity", broken)
    for folder in (checkpoint, tiny_llama):
        with pytest.raises(SliderQuantError, match=r"perplexity on text is nan, .*try --dtype float32"):
            models.evaluate(folder, str(calibration_file), device="cpu")


@pytest.mark.parametrize(
    ("device", "asked", "loaded"),
    [
        ("cpu", "auto", torch.float32),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "auto", "auto"),  # the model's own, as for the original
        ("cuda", "float32", "float32"),
    ],
)
def test_dtype_of_the_arithmetic(device, asked, loaded, checkpoint, calibration_file, monkeypatch):
    def load(folder, device, dtype):
        raise InterruptedError(f"{device} {dtype}")

    monkeypatch.setattr(models, "resolve_device", torch.device)
    monkeypatch.setattr(models, "load", load)
    with pytest.raises(InterruptedError, match=f"^{device} {loaded}$"):
        models.evaluate(checkpoint, str(calibration_file), device=device, dtype=asked)
