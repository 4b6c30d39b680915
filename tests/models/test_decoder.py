"""The walk over single layers computes what the whole model computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sliderquant.models.decoder import Decoder
from sliderquant.models.source import open_model

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(random_model, tmp_path, family):
    folder = random_model(tmp_path / family, model_type=family, **FAMILIES[family])
    blocks = torch.randint(2, 2048, (3, 40), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(open_model(folder), torch.device("cpu"))
    samples, inputs = decoder.embed(blocks)
    hidden = torch.cat(list(samples))
    for index, arguments in enumerate(inputs.arguments):
        out = decoder.layer(index)(hidden, **arguments)
        hidden = out[0] if isinstance(out, tuple) else out
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = whole(blocks, output_hidden_states=True).hidden_states[-1]
    got = whole.model.norm(hidden)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_head_of_its_own_makes_the_logits(random_model, tmp_path):
    """Also where config.json ties it to the embedding."""
    folder = random_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) / 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    norm, head = Decoder(open_model(folder), torch.device("cpu")).output()
    hidden = torch.randn(5, 64)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(head(norm(hidden)), whole.lm_head(whole.model.norm(hidden)))


def test_the_decoder_can_embed_again(tiny_llama):
    decoder = Decoder(open_model(tiny_llama), torch.device("cpu"))
    blocks = torch.randint(2, 2048, (2, 16))
    first, second = (torch.cat(list(decoder.embed(blocks)[0])) for _ in range(2))
    assert torch.equal(first, second)
    assert len(decoder.layers) == 2


def test_no_layer_is_in_memory_until_it_is_asked_for(tiny_llama):
    decoder = Decoder(open_model(tiny_llama), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    layer = decoder.layer(1)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
