"""A model layer by layer computes what transformers computes with the whole of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sliderquant.calibration.layerwise import LayerwiseModel
from sliderquant.calibration.streams import ActivationStream
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import open_model

CPU = torch.device("cpu")
IDS = torch.randint(2, 60, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(random_model, tmp_path):
    return random_model(tmp_path / "model", dtype="float32")


@pytest.mark.parametrize("memory_limit", [0, 1e9], ids=["in a file", "in memory"])
def test_its_layers_are_those_of_the_whole_model(folder, memory_limit):
    model = LayerwiseModel(Decoder(open_model(folder), CPU), IDS)
    stream = model.stream(memory_limit)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = whole(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(stream.data, wanted[0])
    for index in range(2):
        stream.walk(model.layer(index), CPU, 2)
    normed = whole.model.norm(stream.data)
    assert ((normed - wanted[-1]).norm() / wanted[-1].norm()).item() < 1e-5
    stream.close()


def test_what_is_prepared_stands_in_the_layer(folder):
    model = LayerwiseModel(Decoder(open_model(folder), CPU), IDS)

    def prepare(module):
        module.mlp.down_proj.weight.zero_()

    layer = model.layer(1, prepare)
    assert not layer.linear("mlp.down_proj").weight.any()
    assert layer.linear("mlp.up_proj").weight.any()
    assert layer.spec.name == "model.layers.1"


def test_a_stream_that_cannot_be_filled_leaves_no_file(folder, monkeypatch):
    model, closed = LayerwiseModel(Decoder(open_model(folder), CPU), IDS), []
    monkeypatch.setattr(ActivationStream, "close", lambda stream: closed.append(stream.in_file))
    monkeypatch.setattr(ActivationStream, "fill", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        model.stream(memory_limit=0)
    assert closed == [True]
