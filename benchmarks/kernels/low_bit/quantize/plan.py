"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from ...harness import shapes
from ...harness.case import Case, Plan, Task
from ...harness.shapes import subsets as subsets
from ...shared.rows import CHOSEN, UNFUSED, RowSizes, plan_rows
from ...shared.schemes import FUSED, fused_before
from .providers import PROVIDERS

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
    sizes = RowSizes(
        tiny=dict.fromkeys(MAIN_SCHEMES, (TINY_SIZE,)),
        quick=QUICK_SIZES,
        main=_sizes(MAIN_SCHEMES),
        other=dict.fromkeys(OTHER_SCHEMES, (4096, 14336)),
    )
    return plan_rows(subset, device, _case, sizes, _checks(), PROVIDERS)


def _sizes(schemes: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """For each scheme the inputs of the layers that stand after it; of all layers where nothing is before it."""
    every = shapes.every_layer()
    found = {}
    for scheme in schemes:
        fused = scheme.partition("+")[2]
        sizes = {layer.k for layer in every if not fused or fused_before(layer) == fused}
        found[scheme] = tuple(sorted(sizes))
    return found


def _case(k: int, m: int, scheme: str) -> Case:
    return Case(NAME, f"input of {k}", (k,), m, scheme, "bf16")


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
