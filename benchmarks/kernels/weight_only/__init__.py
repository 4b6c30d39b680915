"""The weight-only linear: 16-bit activations times weights of 2, 3, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Hashable

from ..harness.case import Case, Prepared, Work
from ..harness.shapes import subsets
from .goals import goals
from .operands import activations, expected, operands
from .plan import NAME, plan
from .providers import BASELINE, PROVIDERS

__all__ = [
    "BASELINE", "NAME", "PROVIDERS",
    "activations", "expected", "goals", "operands", "operands_key", "plan", "subsets", "work",
]  # fmt: skip


def operands_key(case: Case) -> Hashable:
    """Weights do not depend on the tokens."""
    return case.op, case.shape, case.scheme, case.dtype


def work(case: Case, prepared: Prepared) -> Work:
    """The provider's own tensors and x read once, y written once; 2 M N K operations."""
    n, k = case.shape
    return Work(prepared.bytes() + 2 * case.m * (n + k), 2.0 * case.m * n * k)
