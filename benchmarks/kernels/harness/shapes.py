"""Linear layers `[N, K]` of the models that are measured, from the models' dimensions.

Merged projections (`qkv`, `gate_up`) are what runs; the single ones are what engines that do not merge run. A shard is
what one of eight tensor-parallel GPUs holds: outputs are split in qkv and gate_up, inputs in o and down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MODELS", "TOKENS", "Layer", "Model", "every_layer", "layers", "subsets", "unique"]

SHARDS = 8


@dataclass(frozen=True)
class Model:
    """The dimensions of a decoder that decide the shapes of its linear layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128


MODELS = {
    "llama-2-7b": Model(4096, 11008, 32, 32),
    "llama-2-13b": Model(5120, 13824, 40, 40),
    "llama-3-8b": Model(4096, 14336, 32, 8),
    "llama-3-70b": Model(8192, 28672, 64, 8),
    "qwen2.5-7b": Model(3584, 18944, 28, 4),
    "qwen2.5-14b": Model(5120, 13824, 40, 8),
}
# Those that are served on several GPUs are measured whole and as one shard.
SHARDED = ("llama-3-8b", "llama-3-70b")


@dataclass(frozen=True)
class Layer:
    """A weight `[n, k]` and what it is called."""

    name: str
    n: int
    k: int


def layers(name: str, *, single: bool = True, shard: bool = False) -> list[Layer]:
    """The layers of one model: merged projections, o, down; with `single` also q, k (v is alike) and gate (up)."""
    model = MODELS[name]
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    parts = SHARDS if shard else 1
    named = {
        "qkv": ((queries + 2 * keys) // parts, model.hidden),
        "o": (model.hidden, queries // parts),
        "gate_up": (2 * model.intermediate // parts, model.hidden),
        "down": (model.hidden, model.intermediate // parts),
    }
    if single:
        named |= {
            "q": (queries // parts, model.hidden),
            "k": (keys // parts, model.hidden),
            "gate": (model.intermediate // parts, model.hidden),
        }
    prefix = f"{name}/{SHARDS}" if shard else name
    return [Layer(f"{prefix} {layer}", n, k) for layer, (n, k) in named.items()]


def every_layer() -> list[Layer]:
    """The layers of all models, and of the shards of the large ones."""
    found = [layer for name in MODELS for layer in layers(name)]
    return found + [layer for name in SHARDED for layer in layers(name, single=False, shard=True)]


def unique(found: Iterable[Layer]) -> list[Layer]:
    """One layer per shape, named after all the layers that have it."""
    names: dict[tuple[int, int], list[str]] = {}
    for layer in found:
        names.setdefault((layer.n, layer.k), []).append(layer.name)
    return [Layer(", ".join(dict.fromkeys(group)), n, k) for (n, k), group in names.items()]


TOKENS = tuple(2**i for i in range(14))
# 8.7, 31, 61 and 123 MB at 4 bits: what the goals speak of.
QUICK_LAYERS = (
    Layer("llama-3-70b down", 8192, 28672),
    Layer("llama-3-8b gate_up", 28672, 4096),
    Layer("llama-3-8b gate", 14336, 4096),
    Layer("llama-3-8b o", 4096, 4096),
)
CPU_LAYERS = (Layer("llama-3-8b o", 4096, 4096), Layer("llama-3-8b down", 4096, 14336))
TINY_LAYERS = (Layer("tiny", 256, 512),)
# Even for every tile, and larger than one tile of any variant; and a shape that fits none.
CHECK_SHAPE, ODD_SHAPE = (1024, 2048), (1000, 1056)


def subsets(device: str) -> tuple[str, ...]:
    """`quick` is for every day; `tiny` for tests; the others take minutes to hours, and can be resumed."""
    return ("quick", "tiny") if device == "cpu" else ("quick", "decode", "prefill", "schemes", "full", "tiny")
