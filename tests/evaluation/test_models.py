"""In which dtype a checkpoint is measured."""

import pytest
import torch

import sliderquant
from sliderquant.evaluation import models


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    return sliderquant.quantize(
        tiny_llama, tmp_path_factory.mktemp("out") / "out", scheme="W4A16-g32", method="rtn"
    ).path


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
