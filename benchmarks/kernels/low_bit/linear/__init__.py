"""The low-bit linear end to end: what comes before it, quantizing its input, int8 matmul."""

from __future__ import annotations

from collections.abc import Hashable

from ...harness.case import Case, Prepared, Work
from ...shared.schemes import LowBitScheme
from .goals import goals
from .operands import activations, expected, operands
from .plan import NAME, plan, subsets
from .providers import BASELINE, PROVIDERS

__all__ = [
    "BASELINE", "NAME", "PROVIDERS",
    "activations", "expected", "goals", "operands", "operands_key", "plan", "subsets", "work",
]  # fmt: skip


def operands_key(case: Case) -> Hashable:
    """Weights do not depend on the tokens; a residual does."""
    tokens = case.m if LowBitScheme.parse(case.scheme).residual else None
    return case.op, case.shape, case.scheme, case.dtype, tokens


def work(case: Case, prepared: Prepared) -> Work:
    """The provider's own tensors, the 16-bit inputs and the residual read once, y written once; 2 M N K operations."""
    scheme, (n, k) = LowBitScheme.parse(case.scheme), case.shape
    values = scheme.activations.parts * k + (2 if scheme.residual else 1) * n
    return Work(prepared.bytes() + 2 * case.m * values, 2.0 * case.m * n * k)
