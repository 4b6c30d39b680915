"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from .. import shapes
from ..case import Case, Plan, Task
from ..low_bit.linear.plan import fused_before
from ..low_bit.schemes import SILU_MUL
from ..weight_only.plan import TOKENS
from ..weight_only.plan import subsets as subsets
from .operands import ROTATE
from .providers import CHOSEN, PROVIDERS, UNFUSED

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
    if subset not in subsets(device):
        raise ValueError(f"subset: expected one of {', '.join(subsets(device))} on {device}, got {subset!r}")
    if subset == "tiny":
        return Plan([], list(_timings(_cases(dict.fromkeys(MAIN_SCHEMES, (TINY_SIZE,)), (4,)), device)))
    if subset == "quick":
        tokens = (2048, 8192, 16) if device == "cuda" else (16, 512)
        return Plan(list(_checks()), list(_timings(_cases(QUICK_SIZES, tokens), device)))
    main, other = dict.fromkeys(MAIN_SCHEMES, _sizes()), dict.fromkeys(OTHER_SCHEMES, (4096, 14336))
    main[ROTATE] = (HEAD_SIZE, *main[ROTATE])
    if subset == "decode":
        cases = _cases(main, [m for m in TOKENS if m <= 64])
    elif subset == "prefill":
        cases = _cases(main, [m for m in TOKENS if m > 64])
    elif subset == "schemes":
        cases = _cases(other, TOKENS)
    else:
        cases = _cases(main, TOKENS) + _cases(other, TOKENS)
    return Plan(list(_checks()), list(_timings(cases, device)))


def _sizes() -> tuple[int, ...]:
    """What is rotated online: the inputs of the layers that stand after SiLU-mul, and powers of two."""
    found = {layer.k for layer in shapes.every_layer() if fused_before(layer) == SILU_MUL}
    return tuple(sorted(found | {4096, 8192}))


def _cases(sizes: Mapping[str, tuple[int, ...]], tokens: Iterable[int], dtype: str = "bf16") -> list[Case]:
    """The tokens that a goal speaks of first."""
    return [
        Case(NAME, f"rows of {n}", (n,), m, scheme, dtype)
        for m, (scheme, some) in product(tokens, sizes.items())
        for n in some
    ]


def _timings(cases: Iterable[Case], device: str) -> Iterator[Task]:
    for case in cases:
        for name, provider in PROVIDERS.items():
            if device in provider.devices and provider.accepts(case) is None:
                yield Task("time", case, name)


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
