"""What the tests of one-shot methods share: runs, and what the linears of a loaded model multiply."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sliderquant
from benchmarks.accuracy.outliers import inject_outliers
from sliderquant.calibration.blocks import random_blocks
from sliderquant.calibration.text import read_text
from sliderquant.models.source import open_model

CALIBRATION = {"samples": 6, "seqlen": 48}


@pytest.fixture
def run(calibration_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """`run(model, scheme, method, name="out", **arguments)`: a whole run with little calibration text."""

    def go(model: Path, scheme: str, method: str, name: str = "out", **arguments: Any) -> Any:
        text = {**CALIBRATION, "calibration": str(calibration_file), "device": "cpu"}
        return sliderquant.quantize(model, tmp_path / name, scheme=scheme, method=method, **{**text, **arguments})

    return go


@pytest.fixture
def blocks(calibration_file: Path) -> Callable[[Path], torch.Tensor]:
    """`blocks(model)`: the token ids that `run` calibrates on."""

    def made(model: Path) -> torch.Tensor:
        text = read_text(str(calibration_file), "calibration")
        return random_blocks(text, open_model(model).tokenizer(), seed=2, **CALIBRATION)

    return made


@pytest.fixture(scope="session")
def outliers(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with four channels of large activations at every norm."""
    folder = random_model(tmp_path_factory.mktemp("outliers") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inject_outliers(model, open_model(folder).family, channels=4, factor=32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def inputs_of() -> Callable[..., dict[str, torch.Tensor]]:
    """`inputs_of(model, names, ids)`: by name, what these modules of a model are called with, fp32 `[tokens, in]`."""

    @torch.no_grad()
    def seen(model: torch.nn.Module, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def see(name: str) -> Any:
            return lambda _, arguments: found.update({name: arguments[0].flatten(0, -2).clone()})

        hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
        model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    return seen
