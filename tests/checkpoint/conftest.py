"""A tiny Llama, quantized by rounding and written as a checkpoint."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sliderquant.checkpoint import CardInfo, CheckpointWriter
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    config = tiny_config(**changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(config.dtype).eval()
    for name, parameter in model.named_parameters():  # biases and norms that a reader must not forget
        if parameter.ndim == 1:
            parameter.data = (torch.rand(parameter.shape) + 0.5).to(parameter.dtype)
        elif "embed" not in name:
            parameter.data *= 5
    return model.requires_grad_(False)


def write(
    out: Path,
    source: Path,
    model: LlamaForCausalLM,
    scheme_of: Callable[[str], Scheme],
    finish: bool = True,
    **writer_arguments: Any,
) -> LlamaForCausalLM:
    """Write `model`, its projections rounded; return the model with the weights that were stored."""
    stored = copy.deepcopy(model)
    tied = model.config.tie_word_embeddings
    with CheckpointWriter(out, **writer_arguments) as writer:
        for key, weight in stored.state_dict().items():
            if key.endswith("proj.weight"):
                name = key.removesuffix(".weight")
                scheme = scheme_of(name)
                quantized = round_to_nearest(weight.float(), scheme, weight.dtype)
                writer.add_quantized(name, quantized, scheme, dequantize(quantized, scheme))
                weight.copy_(dequantize(quantized, scheme))
            elif not (tied and key == "lm_head.weight"):
                writer.add_tensor(key, weight)
        if finish:
            writer.finish(model.config, source, {"method": "rtn", "perplexity": {"text": 8.5}}, CardInfo(method="rtn"))
    return stored


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an original model: files to carry over, and files to leave."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True}))
    (folder / "LICENSE").write_text("do as you please")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "model.safetensors").write_bytes(b"the original weights")
    (folder / "pytorch_model.bin").write_bytes(b"the original weights")
    return folder


@pytest.fixture
def tiny(tmp_path: Path, source: Path) -> Callable[..., SimpleNamespace]:
    """Write a tiny checkpoint: `tiny("W4A16-g64", tie_word_embeddings=True).path`; `.model` has the stored weights."""

    def make(
        scheme: str = "W4A16-g64",
        folder: str = "out",
        down_proj: str | None = None,
        max_shard_bytes: int = 10**9,
        overwrite: bool = False,
        **config: Any,
    ) -> SimpleNamespace:
        schemes = {True: Scheme.parse(down_proj or scheme), False: Scheme.parse(scheme)}
        out = tmp_path / folder
        model = write(
            out,
            source,
            tiny_model(**config),
            lambda name: schemes[name.endswith("down_proj")],
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )
        return SimpleNamespace(path=out, model=model)

    return make


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change config.json: `edit_config(path, lambda config: ...)`."""

    def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return edit
