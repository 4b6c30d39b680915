"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from ... import shapes
from ...case import Case, Plan, Task
from ...weight_only.plan import TOKENS
from ...weight_only.plan import subsets as subsets
from ..linear.plan import fused_before
from ..schemes import FUSED
from .providers import CHOSEN, PROVIDERS, UNFUSED

__all__ = ["NAME", "plan", "subsets"]

NAME = "quantize_activations"
MAIN_SCHEMES = ("A4", "A4+rms_norm", "A4+silu_mul")
OTHER_SCHEMES = ("A8", "A8-sym", "A4-sym", "A4-packed", "A8+rms_norm", "A8+silu_mul")
# What norms and SiLU-mul of Llama-3-8B return: goals are about these.
QUICK_SIZES = {
    "A4": (4096, 14336),
    "A4+rms_norm": (4096,),
    "A4+silu_mul": (14336,),
    "A4-packed": (4096,),
    "A8": (4096,),
}
TINY_SIZE, CHECK_SIZE, ODD_SIZE = 512, 2048, 1050
CHECK_TOKENS = 100


def plan(subset: str, device: str) -> Plan:
    """The rows of a subset, most important first. Raises ValueError for a subset that the device does not have."""
    if subset not in subsets(device):
        raise ValueError(f"subset: expected one of {', '.join(subsets(device))} on {device}, got {subset!r}")
    if subset == "tiny":
        return Plan([], list(_timings(_cases(dict.fromkeys(MAIN_SCHEMES, (TINY_SIZE,)), (4,)), device)))
    if subset == "quick":
        tokens = (2048, 8192, 16) if device == "cuda" else (16, 512)
        return Plan(list(_checks()), list(_timings(_cases(QUICK_SIZES, tokens), device)))
    main, other = _sizes(MAIN_SCHEMES), dict.fromkeys(OTHER_SCHEMES, (4096, 14336))
    if subset == "decode":
        cases = _cases(main, [m for m in TOKENS if m <= 64])
    elif subset == "prefill":
        cases = _cases(main, [m for m in TOKENS if m > 64])
    elif subset == "schemes":
        cases = _cases(other, TOKENS)
    else:
        cases = _cases(main, TOKENS) + _cases(other, TOKENS)
    return Plan(list(_checks()), list(_timings(cases, device)))


def _sizes(schemes: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """For each scheme the inputs of the layers that stand after it; of all layers where nothing is before it."""
    every = shapes.every_layer()
    found = {}
    for scheme in schemes:
        fused = scheme.partition("+")[2]
        sizes = {layer.k for layer in every if not fused or fused_before(layer) == fused}
        found[scheme] = tuple(sorted(sizes))
    return found


def _cases(sizes: Mapping[str, tuple[int, ...]], tokens: Iterable[int], dtype: str = "bf16") -> list[Case]:
    """The tokens that a goal speaks of first."""
    return [
        Case(NAME, f"input of {k}", (k,), m, scheme, dtype)
        for m, (scheme, some) in product(tokens, sizes.items())
        for k in some
    ]


def _timings(cases: Iterable[Case], device: str) -> Iterator[Task]:
    for case in cases:
        for name, provider in PROVIDERS.items():
            if device in provider.devices and provider.accepts(case) is None:
                yield Task("time", case, name)


def _checks() -> Iterator[Task]:
    """Every width x symmetry x what comes before, packed too; fp16, and a size that fills no block, for fewer."""
    every = [f"A{bits}{symmetry}" for bits, symmetry in product((4, 8), ("", "-sym"))] + ["A4-packed", "A4-sym-packed"]
    grids = [(CHECK_SIZE, "bf16", every), (CHECK_SIZE, "fp16", ["A4"]), (ODD_SIZE, "bf16", ["A4", "A4-packed"])]
    for k, dtype, names in grids:
        for name, before in product(names, ["", *(f"+{name}" for name in FUSED)]):
            case = Case(NAME, "check", (k,), CHECK_TOKENS, name + before, dtype)
            yield Task("check", case, CHOSEN)
            if before and name == "A4":
                yield Task("check", case, UNFUSED)
