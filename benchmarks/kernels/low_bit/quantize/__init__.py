"""Quantizing activations, alone and after a norm or SiLU-mul, against a copy of what it reads."""

from __future__ import annotations

from ...harness.case import Case, Prepared, Work
from ...shared.rows import BASELINE, Copy, activations, operands_key
from ...shared.schemes import ActivationScheme
from .goals import goals
from .operands import expected, operands
from .plan import NAME, plan, subsets
from .providers import PROVIDERS

__all__ = [
    "BASELINE", "NAME", "PROVIDERS",
    "activations", "expected", "goals", "operands", "operands_key", "plan", "subsets", "work",
]  # fmt: skip


def work(case: Case, prepared: Prepared) -> Work:
    """Inputs read once and codes written once, with 12 bytes a token, 8 if symmetric; no products."""
    scheme, (k,) = ActivationScheme.parse(case.scheme), case.shape
    if isinstance(prepared.arithmetic(case.m), Copy):
        return Work(2 * prepared.bytes(), 0.0)
    per_token = k * scheme.bits // 8 if scheme.packed else k
    return Work(prepared.bytes() + case.m * (per_token + (8 if scheme.symmetric else 12)), 0.0)
