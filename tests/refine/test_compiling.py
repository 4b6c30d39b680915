import pytest
import torch

from sliderquant.quantizer import fake_quantize
from sliderquant.refine import fused as fused_weights
from sliderquant.refine.compiling import can_compile


def broken(function):
    raise RuntimeError("no compiler found")


def other(function):
    def call(*arguments):
        value, *rest = function(*arguments)
        return value + 1, *rest

    return call


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    for functions in (fake_quantize.grid_functions, fused_weights.fused_functions):
        functions.cache_clear()
    yield
    for functions in (fake_quantize.grid_functions, fused_weights.fused_functions):
        functions.cache_clear()


@pytest.mark.parametrize("part", [fake_quantize, fused_weights])
def test_what_does_not_compute_the_same_is_not_used(part, monkeypatch, caplog):
    for module in (fake_quantize, fused_weights):
        monkeypatch.setattr(module, "compiled_function", other if module is part else lambda function: function)
    assert not can_compile.__wrapped__("cpu", torch.bfloat16)
    assert "does not compute the same bits" in caplog.text


def test_no_compiler(monkeypatch, caplog):
    monkeypatch.setattr(fake_quantize, "compiled_function", broken)
    assert not can_compile.__wrapped__("cpu", torch.bfloat16)
    assert "runs uncompiled: RuntimeError: no compiler found" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(caplog):
    assert not can_compile.__wrapped__("cuda", torch.bfloat16)
    assert "runs uncompiled: " in caplog.text
