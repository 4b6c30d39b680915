"""What tests of decoding share: small quantized models, and captures without a GPU, whose replay calls the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sliderquant.decoding import cache as buffers
from sliderquant.decoding.runner import DecodeRunner, _Graph, attach_decode_runner
from sliderquant.loading import load
from sliderquant.pipeline import quantize


class Recorder:
    """Captures without a GPU: nothing is computed until the replay, and the logits stay where they are."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> _Graph:
        self.captures += 1
        graph = _Graph(lambda: None, torch.empty(0))

        def replay() -> None:
            self.replays += 1
            logits = step()
            graph.logits = logits if graph.logits.numel() == 0 else graph.logits.copy_(logits)

        graph.replay = replay
        return graph


@pytest.fixture
def short_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs over 16, 32, 64, ... positions, so that a few tokens need several of them."""
    monkeypatch.setattr(buffers, "SHORTEST", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> Callable[..., Path]:
    found: dict[tuple[str, str], Path] = {}

    def folder(model_type: str, scheme: str = "W4A16-g32", **changes: Any) -> Path:
        key = (model_type, scheme + str(changes))
        if key not in found:
            where = tmp_path_factory.mktemp(model_type)
            source = random_model(where / "source", dtype="float32", model_type=model_type, **changes)
            quantize(source, where / "out", scheme=scheme, method="rtn")
            found[key] = where / "out"
        return found[key]

    return folder


@pytest.fixture
def llama(folders: Callable[..., Path]) -> PreTrainedModel:
    return load(folders("llama"), device="cpu")


@pytest.fixture(scope="session")
def attached() -> Callable[..., Any]:
    """Attaches a runner to a model, and returns it with its recorder."""

    def attached(model: PreTrainedModel) -> tuple[DecodeRunner, Recorder]:
        recorder = Recorder()
        runner = attach_decode_runner(model, capture=recorder)
        assert runner is not None
        return runner, recorder

    return attached


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Any]:
    """Random tokens and their mask."""

    def prompt(batch: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
        ids = torch.randint(2, 2000, (batch, tokens), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return prompt


@pytest.fixture(scope="session")
def written() -> Callable[..., Any]:
    """What a model generates, greedily and without stopping unless told otherwise."""

    def written(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int = 40, **keywords: Any) -> Any:
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        return model.generate(**inputs, **{**settings, **keywords})

    return written
