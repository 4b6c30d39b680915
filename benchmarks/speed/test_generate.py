"""`make bench`: tokens by `generate` along the user's path, of a small random model in 16 bits and quantized."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sliderquant
from benchmarks import random_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_model.write(folder, "tiny")
    return folder


@pytest.mark.parametrize("scheme", [None, "W4A16-g128", "W2A16-g128", "W8A16-sym"])
def test_generate(benchmark, scheme, original, tmp_path):
    if scheme is None:
        model = AutoModelForCausalLM.from_pretrained(original, dtype="auto").eval()
    else:
        model = sliderquant.quantize(original, tmp_path / "out", scheme=scheme, method="rtn").load()
    ids = torch.arange(16)[None].to(model.device)
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    benchmark.pedantic(lambda: model.generate(ids, **settings), rounds=10, warmup_rounds=2)
