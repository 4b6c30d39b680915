"""Write a Hugging Face model folder with random weights in the shapes of a known model: speed and memory depend on
shapes alone. `sliderquant quantize --method rtn` and `sliderquant bench` take it as any other model."""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from sliderquant.checkpoint.skeleton import build_skeleton
from sliderquant.models import family_of
from sliderquant.models.layer import model_layers
from sliderquant.modules.linear import PackedLinear
from sliderquant.modules.merged import MergedLinear
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.schemes import Scheme

SHAPES: dict[str, dict[str, Any]] = {
    # The body of TinyLlama-1.1B with tied embeddings: 1.03 billion weights.
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    # A quarter of its weights is the 16-bit embedding, which is also the output head.
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
TOKENIZER = Path(__file__).parent.parent / "sliderquant" / "assets" / "demo-llama-5m"
SHARD_BYTES = 4_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    weights = write(arguments.folder, arguments.shape, arguments.seed)
    print(f"{arguments.folder}: {arguments.shape}, {weights / 1e9:.2f} billion random weights in bfloat16")


def config_of(shape: str) -> LlamaConfig:
    """The configuration of a shape."""
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
    )


def write(folder: Path, shape: str, seed: int = 0) -> int:
    """Write the model, one shard in memory at a time, and return the number of its weights.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder.mkdir(parents=True)
    config = config_of(shape)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # On a GPU where there is one: 8 billion normal numbers take a CPU minutes.
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    shards: list[tuple[list[str], int]] = [([], 0)]
    for name, shape_of in shapes.items():
        size = 2 * torch.Size(shape_of).numel()
        if shards[-1][1] + size > SHARD_BYTES and shards[-1][0]:
            shards.append(([], 0))
        shards[-1] = ([*shards[-1][0], name], shards[-1][1] + size)
    index: dict[str, str] = {}
    for number, (names, _) in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n", encoding="utf-8")
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return sum(torch.Size(shape_of).numel() for shape_of in shapes.values())


def build(shape: str, device: torch.device, scheme: Scheme | None = None, seed: int = 0) -> PreTrainedModel:
    """Build the model in the memory of a device, with nothing on disk: in bfloat16, or with random codes.

    The modules are those that `sliderquant.load` makes of a checkpoint of `scheme`, merged linears among them; what it
    does besides on a GPU is `sliderquant.loading.make_fast`.
    """
    model = build_skeleton(config_of(shape), shape, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    if scheme is not None:
        family = family_of(shape, model.config.model_type, [type(model).__name__])
        for layer, _ in model_layers(model, family):
            for group in layer.groups:
                _pack_random(model, tuple(map(layer.full, group.linears)), scheme, generator)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = _random_on_device(tuple(parameter.shape), generator)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, PackedLinear):
                module._buffers[name] = buffer.to(device)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _pack_random(model: nn.Module, names: Sequence[str], scheme: Scheme, generator: torch.Generator) -> None:
    """Random codes in the place of linears that read the same input, of a size that keeps activations in bounds."""
    linears = [model.get_submodule(name) for name in names]
    sizes = [linear.out_features for linear in linears]
    shape, groups = (sum(sizes), linears[0].in_features), scheme.groups(linears[0].in_features)
    device, most = generator.device, scheme.levels + 1
    codes = torch.randint(0, most, shape, generator=generator, dtype=torch.uint8, device=device)
    # Uniform codes of b bits spread over 2^b / sqrt(12) steps.
    scale = torch.full((shape[0], groups), 0.02 * 12**0.5 / most, dtype=torch.bfloat16, device=device)
    zero = None if scheme.symmetric else torch.full_like(scale, most // 2, dtype=torch.uint8)
    quantized = QuantizedWeight(codes, scale, zero)
    if len(names) == 1:
        model.set_submodule(names[0], PackedLinear(quantized, scheme))
    else:
        MergedLinear(quantized, scheme, sizes).attach(model, names)


def _random_on_device(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    return torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(0, 0.02, generator=generator)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return _random_on_device(shape, generator).cpu()
