"""One-token forward of a Llama of a billion weights on this CPU or GPU: packed against bf16, in turns in one run.

The weights are random: only their shapes and their packing matter for time and memory. The two models take turns token
by token, so that a change of the machine's speed hits both; the figure is the ratio of the medians.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from benchmarks import results
from sliderquant.modules import PackedLinear, cache_keyword
from sliderquant.quantizer import QuantizedWeight
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
    # Llama-3.2-1B: a quarter of its weights is the 16-bit embedding, which is also the output head.
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--scheme", default="W4A16-g128")
    parser.add_argument("--tokens", type=int, default=30, help="timed tokens of each model")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before the first timed one")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    row = measure(arguments.shape, Scheme.parse(arguments.scheme), arguments.tokens, arguments.context)
    path = results.write(f"decode-{arguments.shape}-{row['scheme']}", [row], arguments.out)
    columns = ["shape", "scheme", "weights", "packed_ms", "bf16_ms", "speedup", "memory_ratio"]
    print(results.markdown([row], columns))
    print(f"written to {path}")


def build(shape: str, scheme: Scheme | None, device: torch.device) -> nn.Module:
    """A bf16 Llama with random weights; with a scheme, every linear of its layers is packed."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and scheme is not None and name != "lm_head":
            packed = _random_packed(module.out_features, module.in_features, scheme, device)
            model.set_submodule(name, packed)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


def measure(shape: str, scheme: Scheme, tokens: int, context: int) -> dict[str, Any]:
    """Milliseconds per token of both models, their ratio, and the ratio of their memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {"packed": build(shape, scheme, device), "bf16": build(shape, None, device)}
    steps = {name: _stepper(model, context, context + tokens + 3, device) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for token in range(tokens + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(token)
            if token >= 3:  # warm
                times[name].append(1e3 * (time.perf_counter() - start))
    memory = {name: model_bytes(model) for name, model in models.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": shape,
        "scheme": str(scheme),
        "weights": sum(p.numel() for p in models["bf16"].parameters()),
        "tokens": tokens,
        "context": context,
        "packed_ms": medians["packed"],
        "bf16_ms": medians["bf16"],
        "speedup": medians["bf16"] / medians["packed"],
        "packed_ms_quartiles": statistics.quantiles(times["packed"], n=4),
        "bf16_ms_quartiles": statistics.quantiles(times["bf16"], n=4),
        "packed_bytes": memory["packed"],
        "bf16_bytes": memory["bf16"],
        "memory_ratio": memory["packed"] / memory["bf16"],
    }


def model_bytes(model: nn.Module) -> int:
    """Bytes of all storages of a model's parameters and buffers, shared ones counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in model.modules()
        for tensor in [*module._parameters.values(), *module._buffers.values()]
        if tensor is not None
    }
    return sum(storages.values())


def _random_packed(out_features: int, in_features: int, scheme: Scheme, device: torch.device) -> PackedLinear:
    groups = scheme.groups(in_features)
    codes = torch.randint(0, scheme.levels + 1, (out_features, in_features), dtype=torch.uint8)
    scale = torch.full((out_features, groups), 0.02 / 2 ** (scheme.bits - 1), dtype=torch.bfloat16)
    zero = None if scheme.symmetric else torch.full((out_features, groups), scheme.offset, dtype=torch.uint8)
    return PackedLinear.from_quantized(QuantizedWeight(codes, scale, zero), scheme, device=device)


def _stepper(model: nn.Module, context: int, longest: int, device: torch.device) -> Any:
    """A function that feeds one more token, after `context` tokens are in the cache."""
    cache = StaticCache(config=model.config, max_cache_len=longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, longest), generator=generator).to(device)
    cached = {cache_keyword(model.forward): cache}
    with torch.inference_mode():
        model(input_ids=ids[:, :context], **cached)

    def step(token: int) -> None:
        position = context + token
        with torch.inference_mode():
            model(input_ids=ids[:, position : position + 1], use_cache=True, **cached)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
