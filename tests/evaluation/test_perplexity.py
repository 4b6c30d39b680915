import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliderquant.errors import InputError
from sliderquant.evaluation.perplexity import perplexity
from sliderquant.models.source import default_seqlen


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def test_it_is_the_published_protocol(model_and_tokenizer, calibration_file):
    """Against a plain loop over blocks, in fp64."""
    model, tokenizer = model_and_tokenizer
    tokens = tokenizer(calibration_file.read_text(), return_tensors="pt").input_ids
    losses = []
    for block in range(tokens.shape[1] // 48):
        ids = tokens[:, block * 48 : (block + 1) * 48]
        logits = model(ids).logits.double()
        losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    result = perplexity(model, tokenizer, str(calibration_file), seqlen=48)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.blocks, result.tokens, result.seqlen) == (len(losses), 48 * len(losses), 48)
    assert (result.dtype, result.device, result.dataset) == ("float32", "cpu", str(calibration_file))
    assert "blocks of 48 tokens" in result.protocol


def test_progress_reaches_the_end(model_and_tokenizer, calibration_file):
    seen = []
    result = perplexity(
        *model_and_tokenizer, str(calibration_file), 128, lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (result.blocks, result.blocks)


@pytest.mark.parametrize("seqlen", [1, 129])
def test_seqlen_out_of_range(model_and_tokenizer, calibration_file, seqlen):
    with pytest.raises(InputError, match=f"seqlen {seqlen}: expected 2 to 128"):
        perplexity(*model_and_tokenizer, str(calibration_file), seqlen)


def test_default_seqlen_is_2048_or_what_the_model_takes(model_and_tokenizer):
    assert default_seqlen(model_and_tokenizer[0].config) == 128
    assert default_seqlen(type("Config", (), {"max_position_embeddings": 131072})()) == 2048


def test_the_embedded_model_on_wikitext2(shared, demo_model):
    """The figure that the model was published with, on the first tenth of its text here."""
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    source = f"{shared / 'data' / 'wikitext2' / 'wiki.test.raw'}[:40000]"
    assert perplexity(model, tokenizer, source, 256).value == pytest.approx(40.2, rel=0.15)
