"""The problems of known models: what their layers launch, for `inspect`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..common.choices import Problem
from .problems import TWO_LAUNCHES_FROM, Case

__all__ = ["MODELS", "ModelShape", "model_cases"]


class ModelShape(NamedTuple):
    """Sizes of a decoder layer, as config.json has them. intermediate 0: its MLP consists of experts, left out here.
    head_norms: queries and keys are normalized by head."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Weights `[N, K]` as they are launched: of q, k and v, and of gate and up, in one."""
        attention = self.heads * self.head_dim
        found = {
            "qkv_proj": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o_proj": (self.hidden, attention),
        }
        if self.intermediate:
            found["gate_up_proj"] = (2 * self.intermediate, self.hidden)
            found["down_proj"] = (self.hidden, self.intermediate)
        return found


MODELS = {
    "SmolLM2-135M": ModelShape(576, 1536, 9, 3, 64),
    "Qwen2.5-0.5B": ModelShape(896, 4864, 14, 2, 64),
    "Qwen2.5-7B": ModelShape(3584, 18944, 28, 4, 128),
    "Qwen2.5-32B": ModelShape(5120, 27648, 40, 8, 128),
    "Llama-3-8B": ModelShape(4096, 14336, 32, 8, 128),
    "Llama-3-70B": ModelShape(8192, 28672, 64, 8, 128),
    "Qwen3-30B-A3B": ModelShape(2048, 0, 32, 4, 128, head_norms=True),
}
TOKENS = (1, 8, 16, 32, 64, 256, 4096)
# Widths and groups of 16-bit activations; 64 takes the place of 128 where that does not divide K.
_WEIGHT_ONLY = ((4, 128), (3, 128), (2, 128), (8, 128), (4, 32))
_LOW_BIT = (4, 8)


def model_cases(names: tuple[str, ...], ops: tuple[str, ...]) -> Iterator[Case]:
    """What the layers of models launch in bf16, each once: prompts and decoding, in all widths of the weights.

    Args:
        names: keys of `MODELS`.
        ops: only these.
    """
    cases = itertools.chain.from_iterable(_cases(MODELS[name]) for name in names)
    yield from (case for case in dict.fromkeys(cases) if case.op in ops)


def _cases(model: ModelShape) -> Iterator[Case]:
    for n, k in model.linears().values():
        for bits, group_size in _WEIGHT_ONLY:
            group_size = group_size if k % group_size == 0 else 64
            for m in TOKENS:
                yield Case("weight_only_linear", _problem(m, n, k, bits, group_size, False))
            yield Case("dequantize", _problem(1, n, k, bits, group_size, False))
        for bits, m in itertools.product(_LOW_BIT, TOKENS):
            yield Case("low_bit_linear", _problem(m, n, k, bits, None, bits == 8))
    for k, fused in (
        (model.hidden, "rms_norm"),
        (model.heads * model.head_dim, None),
        (model.intermediate, "silu_mul"),
    ):
        for bits in _LOW_BIT if k else ():
            yield Case("quantize_activations", _problem(1, 0, k, bits, None, False), fused)
    if model.intermediate:
        for bits, variant in itertools.product(_LOW_BIT, ("silu_mul", *_second(model.intermediate))):
            yield Case("hadamard_quantize", _problem(1, 0, model.intermediate, bits, None, False), variant)
        yield Case("silu_mul", _problem(1, 0, model.intermediate, 16, None, True))
    yield Case("hadamard", _problem(1, 0, model.head_dim, 0, None, True))
    for k in (model.hidden, *([model.head_dim] if model.head_norms else [])):
        yield Case("rms_norm", _problem(1, 0, k, 16, None, True))
    yield Case("rotary", _problem(1, 0, model.head_dim, 16, None, True))
    yield Case("decode_attention", _problem(1, model.heads // model.kv_heads, model.head_dim, 16, None, True))
    yield Case("decode_attention", _problem(1, 0, model.head_dim, 16, None, True), "join")


def _problem(m: int, n: int, k: int, bits: int, group_size: int | None, symmetric: bool) -> Problem:
    return Problem(m, n, k, bits, group_size, symmetric, torch.bfloat16)


def _second(k: int) -> tuple[str, ...]:
    return ("second",) if k > TWO_LAUNCHES_FROM else ()
