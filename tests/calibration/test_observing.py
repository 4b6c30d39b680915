import pytest
import torch
from torch import nn

from sliderquant.calibration.observing import watched_inputs


def test_inputs_are_seen_within_the_context_and_not_after_it():
    layers = {"a": nn.Linear(4, 3, dtype=torch.bfloat16), "b": nn.Linear(3, 2, dtype=torch.bfloat16)}
    x, seen = torch.randn(2, 5, 4, dtype=torch.bfloat16), []

    def run():
        return layers["b"](layers["a"](x))

    with watched_inputs(layers, lambda name, rows: seen.append((name, rows))):
        run()
    run()
    with pytest.raises(RuntimeError), watched_inputs(layers, lambda name, rows: seen.append((name, rows))):
        raise RuntimeError
    run()
    assert [name for name, _ in seen] == ["a", "b"]
    assert torch.equal(seen[0][1], x.flatten(0, 1).float())
    assert seen[1][1].shape == (10, 3)
    assert not seen[1][1].requires_grad
