"""Warming up, as far as a machine without a GPU goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sliderquant import warming
from sliderquant.errors import InputError
from sliderquant.warming import WarmUp, warm_up


@pytest.fixture
def model(tmp_path: Path, random_model: Callable[..., Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(random_model(tmp_path / "model"))


def test_on_a_cpu_nothing_is_to_be_done(model: PreTrainedModel) -> None:
    assert warm_up(model) == WarmUp()


@pytest.mark.parametrize(
    "arguments",
    [{"tokens": (0,)}, {"tokens": (1.5,)}, {"tokens": 5}, {"batches": None}, {"batches": (True,)}, {"processes": 0}],
    ids=str,
)
def test_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        warm_up(model, **arguments)


def test_a_models_own_way_to_generate_is_put_back(model: PreTrainedModel) -> None:
    model.generation_config.stop_strings = ["end"]
    before = model.generation_config
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with warming._plain_generation(model):
        assert model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (1, 4)
    assert model.generation_config is before
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(input_ids=ids, max_new_tokens=2)
