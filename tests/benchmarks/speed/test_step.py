"""The benchmark of a training step: what it compares, and that it writes what it measured."""

import json

import pytest
import torch

from benchmarks.speed import step
from sliderquant.calibration.layerwise import RunningLayer
from sliderquant.models.source import open_model
from sliderquant.schemes import ModelScheme

CPU = torch.device("cpu")


def test_both_sides_have_gradients_and_the_quantized_one_quantizes(random_model, tmp_path, monkeypatch):
    source, windows = open_model(random_model(tmp_path / "model")), []

    def stepper(window, hidden, target, matmul):
        run = made(window, hidden, target, matmul)
        run()
        windows.append(
            (window, [p for layer in window.layers for p in layer.module.parameters() if p.grad is not None])
        )
        return run

    made = step.stepper
    monkeypatch.setattr(step, "stepper", stepper)
    row = step.measure(source, ModelScheme.parse("W4A4KV4"), torch.float32, "never", 2, 16, 3, CPU)
    (plain, weights), (quantized, learned) = windows
    assert len(weights) == 14  # seven linears in each of two layers
    assert not plain.linears()
    assert len(quantized.linears()) == 14
    assert all(linear.quantized for linear in quantized.linears())
    assert len(learned) == 14 * 4 + 2 * 5  # low rank and clipping of each linear, scales of each layer
    assert row["ratio"] > 0
    assert row["tokens"] == 32
    assert len(row["quartiles"]) == 3


@pytest.mark.parametrize("matmul", [torch.float32, torch.bfloat16])
def test_a_step_drops_the_gradients_of_the_one_before(matmul):
    layer = torch.nn.Linear(8, 8)
    run = step.stepper(
        step.WindowLayers([RunningLayer(None, layer, {})]), torch.ones(1, 2, 8), torch.zeros(1, 2, 8), matmul
    )
    run()
    first = layer.weight.grad.clone()
    run()
    assert torch.equal(layer.weight.grad, first)


def test_the_command_writes_its_rows(monkeypatch, tmp_path, random_model, capsys):
    folder = random_model(tmp_path / "model")
    monkeypatch.setattr(step, "DEMO", folder)
    arguments = step.argparse.ArgumentParser()
    step.add_arguments(arguments)
    step.run(
        arguments.parse_args(
            ["--windows", "demo", "--schemes", "W2A16", "--matmul", "float32", "--compile", "never", "--batch", "1",
             "--seqlen", "8", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
        )
    )  # fmt: skip
    (path,) = (tmp_path / "out").rglob("step.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["window"], row["scheme"], row["matmul"], row["compiled"]) == ("demo", "W2A16", "float32", False)
    assert "| demo | W2A16 | float32 |" in capsys.readouterr().out
