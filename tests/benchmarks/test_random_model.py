"""Models of random weights for benchmarks."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import random_model
from sliderquant.evaluation.bench_worker import weight_bytes
from sliderquant.pipeline import quantize
from sliderquant.schemes import Scheme


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


@pytest.mark.parametrize("scheme", [None, "W4A16-g128", "W3A16-sym", "W4A4"])
def test_models_in_memory_are_those_that_load_makes(scheme: str | None, tmp_path: Path) -> None:
    """The same modules and the same bytes, without a file."""
    found = random_model.build("tiny", torch.device("cpu"), None if scheme is None else Scheme.parse(scheme))
    folder = tmp_path / "source"
    random_model.write(folder, "tiny")
    if scheme is None:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    else:
        loaded = quantize(folder, tmp_path / "out", scheme=scheme, method="rtn").load()

    def modules(model: nn.Module) -> dict[str, type]:
        return {name: type(module) for name, module in model.named_modules()}

    assert modules(found) == modules(loaded)
    assert weight_bytes(found) == weight_bytes(loaded)
    assert found.training is False
    assert not any(parameter.requires_grad for parameter in found.parameters())
    logits = found(torch.arange(16)[None]).logits
    assert 0.1 < logits.float().std() < 10
    assert torch.isfinite(logits).all()
