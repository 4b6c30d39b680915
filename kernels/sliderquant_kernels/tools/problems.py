"""The grid of problems over which the kernels are compiled by `inspect`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..common.choices import Problem

# Weights [N, K]: one for which there are plenty of tiles, one for which there are few, one whose K is an odd number of
# blocks, one that fills no block.
LARGE, SMALL, UNEVEN, ODD = (28672, 4096), (4096, 4096), (4096, 11008), (4096, 4100)
_SHAPES = {LARGE: "large", SMALL: "small", UNEVEN: "uneven-K", ODD: "odd-K"}
_BITS = (2, 3, 4, 8)
# Rotations of more take two launches, of those sizes that are listed here and in `model_problems`.
TWO_LAUNCHES_FROM = 20000
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One thing to compile.

    `variant` None: what the rules choose. For activations it is what is fused, `rms_norm`, `silu_mul` or `signs`,
    `clipped`, with factors on the ends of the range, or the `second` launch of a long rotation; `k` is their size,
    `bits` and `symmetric` are theirs. Of `decode_attention` `k` is the head's size and `n` the query heads for one of
    keys; `join` is its second kernel. `epilogue`: with bias and residual.
    """

    op: str
    problem: Problem
    variant: str | None = None
    epilogue: bool = False

    def describe(self) -> str:
        """Its shape class in words."""
        p = self.problem
        grouping = f"g{p.group_size}" if p.group_size else "channel"
        words = [f"W{p.bits}-{grouping}-{'sym' if p.symmetric else 'asym'}", str(p.dtype).removeprefix("torch.")]
        if self.op in ("rms_norm", "silu_mul", "rotary", "decode_attention"):
            words = [
                words[1],
                f"K={p.k}",
                *([f"groups={p.n}"] if p.n else []),
                *([self.variant] if self.variant else []),
            ]
            return " ".join(words)
        if self.op in ("quantize_activations", "hadamard", "hadamard_quantize"):
            scheme = [] if self.op == "hadamard" else [f"A{p.bits}-{'sym' if p.symmetric else 'asym'}"]
            words = [*scheme, words[1], f"K={p.k}"]
            return " ".join([*words, self.variant] if self.variant else words)
        if self.op in ("weight_only_linear", "low_bit_linear"):
            words.append(f"M={p.m}")
        words.append(_SHAPES.get((p.n, p.k), f"{p.n}x{p.k}"))
        words += [self.variant] if self.variant else []
        words += ["epilogue"] if self.epilogue else []
        return " ".join(words)


def weight_only_cases(full: bool) -> Iterator[Case]:
    """Cases of the matmul."""
    if full:
        schemes = itertools.product(_BITS, (32, 64, 128, None), (True, False), (_BF16, _FP16))
        for (bits, group_size, symmetric, dtype), m in itertools.product(schemes, (1, 16, 32, 64, 256)):
            for shape in (LARGE, SMALL):
                yield _matmul(m, shape, bits, group_size, symmetric, dtype)
        for bits, dtype, m in itertools.product(_BITS, (_BF16, _FP16), (1, 16, 32, 64)):
            yield replace(_matmul(m, UNEVEN, bits, 128, False, dtype), epilogue=True)
            yield _matmul(m, ODD, bits, None, False, dtype)
        return
    for m in (1, 8, 16, 32, 64):
        yield _matmul(m, LARGE)
    for m in (1, 16, 64):
        yield _matmul(m, SMALL)
    for bits in (2, 3, 8):
        yield _matmul(1, LARGE, bits)
        yield _matmul(16, SMALL, bits, 32, True, _FP16)
        yield _matmul(64, LARGE, bits)
    yield _matmul(256, LARGE)
    yield _matmul(256, SMALL, 8, None, True, _FP16)
    yield _matmul(1, LARGE, symmetric=True)
    yield _matmul(1, SMALL, group_size=None, symmetric=True, dtype=_FP16)
    yield _matmul(32, LARGE, group_size=64, dtype=_FP16)
    yield replace(_matmul(1, UNEVEN), epilogue=True)
    yield _matmul(32, ODD, 3, None)
    yield _matmul(4096, LARGE)


def _matmul(
    m: int,
    shape: tuple[int, int],
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    dtype: torch.dtype = _BF16,
) -> Case:
    return Case("weight_only_linear", Problem(m, *shape, bits, group_size, symmetric, dtype))


def dequantize_cases(full: bool) -> Iterator[Case]:
    """Cases of the dequantize op."""
    grid = itertools.product(_BITS, (32, 128, None), (True, False), (_BF16, _FP16, _FP32))
    quick = ((4, 128, False, _BF16), (3, 32, True, _FP16), (2, None, False, _FP32), (8, 128, True, _BF16))
    for bits, group_size, symmetric, dtype in grid if full else quick:
        yield Case("dequantize", Problem(1, *LARGE, bits, group_size, symmetric, dtype))


def low_bit_cases(full: bool) -> Iterator[Case]:
    """Cases of the low-bit matmul."""

    def case(m: int, shape: tuple[int, int], bits: int = 4, group_size: int | None = None) -> Case:
        return replace(_matmul(m, shape, bits, group_size, bits == 8), op="low_bit_linear")

    if full:
        for bits, group_size, m in itertools.product((2, 4, 8), (None, 32, 128), (1, 16, 32, 64, 256, 4096)):
            for shape in (LARGE, SMALL, UNEVEN):
                yield case(m, shape, bits, group_size)
        return
    for m in (1, 16, 64, 4096):
        yield case(m, LARGE)
    yield case(1, SMALL, 2)
    yield case(1, LARGE, 8)
    yield replace(case(64, SMALL, 4, 128), epilogue=True)
    yield case(16, UNEVEN, 4, 32)


def quantize_cases(full: bool) -> Iterator[Case]:
    """Cases of quantizing activations: the sizes of real hidden states and intermediate activations."""
    sizes = (768, 4096, 5120, 8192, 11008, 14336, 18944, 28672) if full else (4096, 14336)
    for k, bits, fused in itertools.product(sizes, (4, 8) if full else (4,), (None, "rms_norm", "silu_mul", "clipped")):
        yield Case("quantize_activations", Problem(1, 0, k, bits, None, False, _BF16), fused)


def hadamard_cases(full: bool) -> Iterator[Case]:
    """Cases of rotating: per head and over rows."""
    if full:
        for k, dtype, variant in itertools.product(_ROTATED, (_BF16, _FP16, _FP32), (None, "signs")):
            yield Case("hadamard", Problem(1, 0, k, 0, None, True, dtype), variant)
        return
    for k, dtype in ((128, _BF16), (4096, _FP16)):
        yield Case("hadamard", Problem(1, 0, k, 0, None, True, dtype))


def hadamard_quantize_cases(full: bool) -> Iterator[Case]:
    """Cases of rotating and quantizing."""
    if full:
        for k, dtype, symmetric in itertools.product(_ROTATED, (_BF16, _FP16, _FP32), (True, False)):
            for variant in (None, "silu_mul", "signs", "second" if k > TWO_LAUNCHES_FROM else "clipped"):
                yield Case("hadamard_quantize", Problem(1, 0, k, 8, None, symmetric, dtype), variant)
        return
    for k in (4096, 8192, 14336, 11008, 18944):
        yield Case("hadamard_quantize", Problem(1, 0, k, 8, None, False, _BF16))
    yield Case("hadamard_quantize", Problem(1, 0, 14336, 4, None, False, _BF16), "silu_mul")
    for k, symmetric in ((128, False), (4096, True), (14336, False)):
        yield Case("hadamard_quantize", Problem(1, 0, k, 4, None, symmetric, _BF16), "clipped")
    yield Case("hadamard_quantize", Problem(1, 0, 28672, 8, None, False, _BF16), "second")


def between_cases(full: bool) -> Iterator[Case]:
    """Cases of what lies between the linears of a layer: norms of rows and of heads, products, rotations of heads."""
    dtypes = (_BF16, _FP16, _FP32) if full else (_BF16,)
    for dtype in dtypes:
        for k in (64, 128, 576, 896, 2048, 4096, 8192, 16384) if full else (128, 4096):
            yield Case("rms_norm", Problem(1, 0, k, 16, None, True, dtype))
        yield Case("silu_mul", Problem(1, 0, 14336, 16, None, True, dtype))
        for k in (64, 80, 96, 128, 256) if full else (128,):
            yield Case("rotary", Problem(1, 0, k, 16, None, True, dtype))


def decode_attention_cases(full: bool) -> Iterator[Case]:
    """Cases of attending with one token."""
    for dtype in (_BF16, _FP16) if full else (_BF16,):
        for k, groups in itertools.product((64, 80, 128, 256), (1, 8, 32)) if full else ((64, 3), (128, 4), (256, 8)):
            yield Case("decode_attention", Problem(1, groups, k, 16, None, True, dtype))
        for k in (64, 128, 256):
            yield Case("decode_attention", Problem(1, 0, k, 16, None, True, dtype), "join")


_ROTATED = (64, 128, 768, 1536, 4096, 5120, 8192, 11008, 12288, 13824, 14336, 16384, 18944, 28672, 29568)

GRIDS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "weight_only_linear": weight_only_cases,
    "dequantize": dequantize_cases,
    "low_bit_linear": low_bit_cases,
    "quantize_activations": quantize_cases,
    "hadamard": hadamard_cases,
    "hadamard_quantize": hadamard_quantize_cases,
    "rms_norm": lambda full: (case for case in between_cases(full) if case.op == "rms_norm"),
    "silu_mul": lambda full: (case for case in between_cases(full) if case.op == "silu_mul"),
    "rotary": lambda full: (case for case in between_cases(full) if case.op == "rotary"),
    "decode_attention": decode_attention_cases,
}
