"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..harness import shapes
from ..harness.case import Case, Plan, Task
from ..harness.shapes import subsets as subsets
from ..shared.rows import CHOSEN, UNFUSED, RowSizes, plan_rows
from ..shared.schemes import SILU_MUL, fused_before
from .operands import ROTATE
from .providers import PROVIDERS

__all__ = ["NAME", "plan", "subsets"]

NAME = "hadamard"
MAIN_SCHEMES = (ROTATE, "A4", f"A4+{SILU_MUL}")
OTHER_SCHEMES = ("A8", "A8-sym", "A4-sym", f"A8+{SILU_MUL}")
# What the goals are about, and two sizes whose odd factor is large.
QUICK_SIZES = {
    "A4": (4096, 8192, 14336, 11008, 18944),
    ROTATE: (4096, 14336),
    f"A4+{SILU_MUL}": (14336,),
}
HEAD_SIZE = 128
TINY_SIZE = 96
# Each kernel and kind of factor: a head; a row with few and with many tiles; pieces; two launches; blocks.
CHECK_SIZES = (128, 768, 4096, 5120, 11008, 18944, 28672, 29568, 188)
CHECK_TOKENS = 100


def plan(subset: str, device: str) -> Plan:
    """The rows of a subset, most important first. Raises ValueError for a subset that the device does not have."""
    main = dict.fromkeys(MAIN_SCHEMES, _sizes())
    main[ROTATE] = (HEAD_SIZE, *main[ROTATE])
    sizes = RowSizes(
        tiny=dict.fromkeys(MAIN_SCHEMES, (TINY_SIZE,)),
        quick=QUICK_SIZES,
        main=main,
        other=dict.fromkeys(OTHER_SCHEMES, (4096, 14336)),
    )
    return plan_rows(subset, device, _case, sizes, _checks(), PROVIDERS)


def _sizes() -> tuple[int, ...]:
    """What is rotated online: the inputs of the layers that stand after SiLU-mul, and powers of two."""
    found = {layer.k for layer in shapes.every_layer() if fused_before(layer) == SILU_MUL}
    return tuple(sorted(found | {4096, 8192}))


def _case(n: int, m: int, scheme: str) -> Case:
    return Case(NAME, f"rows of {n}", (n,), m, scheme, "bf16")


def _checks() -> Iterator[Task]:
    """Every size rotated, and quantized; every width x symmetry x SiLU-mul, and fp16, for one of them."""
    for n in CHECK_SIZES:
        for scheme in (ROTATE, "A4"):
            yield Task("check", Case(NAME, "check", (n,), CHECK_TOKENS, scheme, "bf16"), CHOSEN)
    for bits, symmetry, before in product((4, 8), ("", "-sym"), ("", f"+{SILU_MUL}")):
        scheme = f"A{bits}{symmetry}{before}"
        if scheme != "A4":
            yield Task("check", Case(NAME, "check", (4096,), CHECK_TOKENS, scheme, "bf16"), CHOSEN)
    for scheme in (ROTATE, "A8"):
        yield Task("check", Case(NAME, "check", (4096,), CHECK_TOKENS, scheme, "fp16"), CHOSEN)
    yield Task("check", Case(NAME, "check", (4096,), CHECK_TOKENS, "A4", "bf16"), UNFUSED)
