"""What the ops on rows of activations share, quantizing and rotating: how they are planned, what they are measured
against, which is a copy of what they read, and what their codes must be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from ..harness.case import Arithmetic, Case, Goal, Plan, Prepared, Provider, Task, timings
from ..harness.checking import Expected
from ..harness.figures import case_key, is_timed, worst
from ..harness.shapes import TOKENS, subsets
from .inputs import Codes

__all__ = [
    "BASELINE", "CHOSEN", "COPY", "UNFUSED", "Copy", "Pair", "RowSizes", "activations", "expected_codes",
    "expected_copy", "goal", "is_cold", "operands_key", "own_providers", "pairs_with_copies", "plan_rows",
]  # fmt: skip

COPY, CHOSEN = "copy", "sliderquant"
UNFUSED = f"{CHOSEN}-unfused"
BASELINE = {"cuda": COPY, "cpu": COPY}
# Smaller ones would be rotated over thousands of copies, and are in the cache where a model runs.
COLD_BYTES = 1 << 20
# Below, the launch decides and not the bytes.
FEWEST_TOKENS = 2048
# Over the time of a copy of as many bytes.
TARGET = 1.2

Row = dict[str, Any]
Pair = tuple[Row, Row]
Sizes = Mapping[str, tuple[int, ...]]


class HasActivations(Protocol):
    """Operands: x `[M, K]`, or `[2, M, K]` before SiLU-mul."""

    @property
    def x(self) -> Tensor: ...


@dataclass(frozen=True)
class RowSizes:
    """For each scheme the sizes of the rows: in the subsets tiny and quick, and, in the others, of the main schemes and
    of all other ones."""

    tiny: Sizes
    quick: Sizes
    main: Sizes
    other: Sizes


def plan_rows(
    subset: str,
    device: str,
    case: Callable[[int, int, str], Case],
    sizes: RowSizes,
    checks: Iterable[Task],
    providers: Mapping[str, Provider],
) -> Plan:
    """The rows of a subset, most important first: the tokens that a goal speaks of.

    Args:
        case: size of a row, tokens, scheme -> the case.

    Raises:
        ValueError: the device does not have the subset.
    """
    if subset not in subsets(device):
        raise ValueError(f"subset: expected one of {', '.join(subsets(device))} on {device}, got {subset!r}")

    def cases(of: Sizes, tokens: Iterable[int]) -> list[Case]:
        return [case(size, m, scheme) for m, (scheme, some) in product(tokens, of.items()) for size in some]

    if subset == "tiny":
        return Plan([], list(timings(cases(sizes.tiny, (4,)), providers, device)))
    if subset == "quick":
        timed = cases(sizes.quick, (2048, 8192, 16) if device == "cuda" else (16, 512))
    elif subset == "decode":
        timed = cases(sizes.main, [m for m in TOKENS if m <= 64])
    elif subset == "prefill":
        timed = cases(sizes.main, [m for m in TOKENS if m > 64])
    elif subset == "schemes":
        timed = cases(sizes.other, TOKENS)
    else:
        timed = cases(sizes.main, TOKENS) + cases(sizes.other, TOKENS)
    return Plan(list(checks), list(timings(timed, providers, device)))


def operands_key(case: Case) -> Hashable:
    """The operands are the activations themselves."""
    return case.key


def activations(case: Case, given: HasActivations) -> Tensor:
    """What a call reads; its tensors are copies of it."""
    return given.x


def is_cold(given: HasActivations) -> bool:
    """Whether they are large enough to be read from memory."""
    return given.x.numel() * given.x.element_size() >= COLD_BYTES


@dataclass(frozen=True)
class Copy(Arithmetic):
    """Nothing is rounded."""


def prepare_copy(given: HasActivations) -> Prepared:
    """Moves all that the op reads."""
    return Prepared(
        (given.x,),
        lambda x, tensors: tensors[0].clone(),
        lambda m: Copy(),
        compared=lambda y: y.flatten(0, -2),
        cold=is_cold(given),
    )


def own_providers(
    prepare: Callable[[Any], Prepared],
    compilation: Callable[[Case], Hashable],
    prepare_unfused: Callable[[Any], Prepared],
    compilation_unfused: Callable[[Case], Hashable],
    accepts_unfused: Callable[[Case], str | None],
) -> list[Provider]:
    """The copy, our op, and our op with torch's own before it."""
    both = ("cuda", "cpu")
    return [
        Provider(COPY, prepare_copy, devices=both, computes="a copy of what is read"),
        Provider(CHOSEN, prepare, devices=both, compilation=compilation),
        Provider(
            UNFUSED, prepare_unfused, devices=both, compilation=compilation_unfused, accepts=accepts_unfused
        ),
    ]  # fmt: skip


def expected_copy(x: Tensor, rows: Tensor) -> Expected:
    """Of some rows, exactly what they were."""
    copied = x.flatten(0, -2)[rows].double()
    return Expected(rows, copied, torch.zeros_like(copied), 0.0)


def expected_codes(found: Codes, rows: Tensor, symmetric: bool) -> Expected:
    """Of a token, side by side: codes less the zero-point; by what the sum of the codes is off; the scale; unless
    symmetric, the zero-point."""
    want = [found.steps, torch.zeros_like(found.scale), found.scale]
    off = [found.steps_off, torch.zeros_like(found.scale), found.scale_off]
    if not symmetric:
        want.append(found.zero)
        off.append(found.zero_off)
    return Expected(rows, torch.cat(want, -1), torch.cat(off, -1), 0.0)


def pairs_with_copies(rows: Iterable[Row], runs: Mapping[int, Mapping[str, Any]]) -> list[Pair]:
    """The rows of our op for many tokens on a GPU, each with that of the copy."""
    timed = [row for row in rows if is_timed(row) and runs[row["run"]]["device"] == "cuda" and row["dtype"] == "bf16"]
    copies = {case_key(row): row for row in timed if row["provider"] == COPY}
    many = [row for row in timed if row["provider"] == CHOSEN and row["m"] >= FEWEST_TOKENS]
    return [(row, copies[case_key(row)]) for row in many if case_key(row) in copies]


def goal(text: str, pairs: Iterable[Pair]) -> Goal:
    """The worst time of the pairs over that of a copy."""
    text = f"{text}, M >= {FEWEST_TOKENS}: time over that of a copy of as many bytes"
    return worst(text, TARGET, pairs, _over_floor, at_least=False)


def _over_floor(pair: Pair) -> float:
    """The copy of the same tensor moved other bytes than the op does: its rate, for the bytes of the latter."""
    row, copy = pair
    return row["q50_us"] / (copy["q50_us"] * row["bytes"] / copy["bytes"])
