"""Hadamard rotations, alone and quantized in the same kernel, against a copy of what they read and against peers."""

from __future__ import annotations

from ..harness.case import Case, Prepared, Work
from ..shared.rows import BASELINE, Copy, activations, operands_key
from .goals import goals
from .operands import expected, operands, scheme_of
from .plan import NAME, plan, subsets
from .providers import PROVIDERS

__all__ = [
    "BASELINE", "NAME", "PROVIDERS",
    "activations", "expected", "goals", "operands", "operands_key", "plan", "subsets", "work",
]  # fmt: skip


def work(case: Case, prepared: Prepared) -> Work:
    """Inputs read once; the rotated values, or codes and 12 bytes a token (8 if symmetric), written once. The products
    with +-1 are not counted: a transform by sums and differences needs none."""
    (n,), scheme = case.shape, scheme_of(case.scheme)
    if scheme is None or isinstance(prepared.arithmetic(case.m), Copy):
        return Work(2 * prepared.bytes(), 0.0)
    return Work(prepared.bytes() + case.m * (n + (8 if scheme.symmetric else 12)), 0.0)
