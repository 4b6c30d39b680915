"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from ..harness import shapes
from ..harness.case import Case, Plan, Task, timings
from ..harness.shapes import CHECK_SHAPE, CPU_LAYERS, ODD_SHAPE, QUICK_LAYERS, TINY_LAYERS, TOKENS, Layer, subsets
from ..shared.schemes import WeightScheme
from .providers import PROVIDERS
from .providers.ours import CHOSEN, name_of

__all__ = ["MAIN_SCHEME", "NAME", "plan"]

NAME = "weight_only_linear"
MAIN_SCHEME = "W4A16-g128"
OTHER_SCHEMES = (
    "W4A16-g128-sym", "W2A16-g128", "W3A16-g128", "W8A16-g128",
    "W2A16", "W3A16", "W4A16", "W8A16-sym", "W4A16-g64", "W4A16-g32",
)  # fmt: skip
# Their time grows with M, or with a dequantized weight: beyond M = 64 `quick` measures the other ones.
PEERS_FOR_FEW = ("torch-int4", "torchao", "mslk-rowwise", "conch", "bitsandbytes")
# Tokens that reach a variant's tiles; the further ones are checked with fewer schemes, as each is a compilation.
CHECK_TOKENS = {"warp_k": 1, "rows": 32, "dense": 100}
FURTHER_CHECK_TOKENS = {"warp_k": 16, "rows": 100}
CPU_CHECK_TOKENS = (1, 100)


def plan(subset: str, device: str) -> Plan:
    """The rows of a subset, most important first. Raises ValueError for a subset that the device does not have."""
    if subset not in subsets(device):
        raise ValueError(f"subset: expected one of {', '.join(subsets(device))} on {device}, got {subset!r}")
    if subset == "tiny":
        schemes = (MAIN_SCHEME, "W2A16-g128", "W8A16-sym")
        return Plan([], list(timings(_cases(TINY_LAYERS, (1, 4), schemes), PROVIDERS, device)))
    if subset == "quick" and device == "cpu":
        cases = _cases(CPU_LAYERS, (1, 4, 16, 64), (MAIN_SCHEME, "W4A16", "W2A16-g128", "W8A16-sym"))
        return Plan(list(_checks(device)), list(timings(cases, PROVIDERS, device)))
    if subset == "quick":
        return Plan(list(_checks(device)), list(_quick_timings()))
    every = shapes.unique(shapes.every_layer())
    if subset == "decode":
        cases = _cases(every, [m for m in TOKENS if m <= 64], (MAIN_SCHEME,))
    elif subset == "prefill":
        cases = _cases(every, [m for m in TOKENS if m > 64], (MAIN_SCHEME,))
    elif subset == "schemes":
        cases = _other_schemes()
    else:
        cases = _cases(every, TOKENS, (MAIN_SCHEME,)) + _other_schemes()
    return Plan(list(_checks(device)), list(timings(cases, PROVIDERS, device)))


def _other_schemes() -> list[Case]:
    merged = shapes.layers("llama-3-8b", single=False)
    return _cases(merged, TOKENS, OTHER_SCHEMES) + _cases(merged, TOKENS, (MAIN_SCHEME,), "fp16")


def _cases(found: Sequence[Layer], tokens: Iterable[int], schemes: Iterable[str], dtype: str = "bf16") -> list[Case]:
    """Cases that share operands stand next to each other."""
    return [
        Case(NAME, layer.name, (layer.n, layer.k), m, scheme, dtype)
        for scheme, layer, m in product(schemes, found, tuple(tokens))
    ]


def _quick_timings() -> Iterable[Task]:
    """The goals' shapes and tokens; slow variants and peers only where they are not hopeless."""
    yield from _quick_cases((1, 16, 2, 4, 8))
    for task in timings(_cases(QUICK_LAYERS, (1,), ("W2A16-g128", "W8A16-g128")), PROVIDERS, "cuda"):
        if task.provider in (CHOSEN, "cublas", "humming"):
            yield task
    yield from _quick_cases((2048, 4096, 64, 32))
    # Of 3 bits the goal is about our own 4 bits alone.
    for task in timings(_cases(QUICK_LAYERS, (1,), ("W3A16-g128",)), PROVIDERS, "cuda"):
        if task.provider in (CHOSEN, "cublas"):
            yield task


def _quick_cases(tokens: tuple[int, ...]) -> Iterable[Task]:
    for task in timings(_cases(QUICK_LAYERS, tokens, (MAIN_SCHEME,)), PROVIDERS, "cuda"):
        hopeless = (name_of("dense"), "mslk-rowwise") if task.case.m <= 64 else PEERS_FOR_FEW
        if task.provider not in hopeless:
            yield task


def _checks(device: str) -> Iterable[Task]:
    """Every variant x dtype x width x grouping x symmetry, and an odd shape of every variant, dtype and width."""
    schemes = [
        WeightScheme(bits, group, symmetric)
        for symmetric, group, bits in product((False, True), (128, None, 64, 32), (4, 2, 3, 8))
    ]
    few = [scheme for scheme in schemes if not scheme.symmetric and scheme.group_size in (128, None)]
    odd = [scheme for scheme in schemes if not scheme.symmetric and scheme.group_size in (32, None)]
    if device == "cpu":
        yield from _check_tasks(CHECK_SHAPE, schemes, {CHOSEN: CPU_CHECK_TOKENS})
        yield from _check_tasks(ODD_SHAPE, odd, {CHOSEN: CPU_CHECK_TOKENS})
        return
    named = {name_of(variant): (m,) for variant, m in CHECK_TOKENS.items()}
    further = {name_of(variant): (m,) for variant, m in FURTHER_CHECK_TOKENS.items()}
    yield from _check_tasks(CHECK_SHAPE, schemes, named)
    yield from _check_tasks(CHECK_SHAPE, few, further)
    yield from _check_tasks(ODD_SHAPE, odd, named)


def _check_tasks(
    shape: tuple[int, int], schemes: Iterable[WeightScheme], tokens: Mapping[str, tuple[int, ...]]
) -> Iterable[Task]:
    for scheme, dtype in product(schemes, ("bf16", "fp16")):
        for name, some in tokens.items():
            for m in some:
                yield Task("check", Case(NAME, "check", shape, m, str(scheme), dtype), name)
