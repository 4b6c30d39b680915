"""Models of random weights for benchmarks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import random_model


@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_reads_it(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shards > 1:
        monkeypatch.setattr(random_model, "SHARD_BYTES", 2_000_000)
    weights = random_model.write(tmp_path / "m", "tiny")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shards > 1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    with pytest.raises(FileExistsError):
        random_model.write(tmp_path / "m", "tiny")
