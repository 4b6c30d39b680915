"""Whether a result is right: compared with fp64, within what the provider's own roundings can do.

Two conditions, both from the arithmetic. With u the unit roundoff of the activations' dtype:

- all elements together: |y - want| / |want| (Frobenius norms) stays below the norm of the errors that the roundings can
  cause. A rounding errs by at most u relative, independently of others, so their squares add up.
- every element: rounding the result errs by at most u |want|; the other errors are sums of many independent zero-mean
  terms (activations are random), so `SIGMAS` standard deviations are exceeded by chance in none of 10^14 elements.

The first finds what is slightly wrong everywhere, such as a dropped input, the second what is wrong in few places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["UNIT_ROUNDOFF", "Expected", "Verdict", "accumulation", "compare", "sample_rows"]

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SIGMAS = 8.0
# A matrix instruction adds this many products to the accumulator at a time, and truncates once.
PRODUCTS_PER_STEP = 16
MAX_CHECKED_ROWS = 512


class Expected(NamedTuple):
    """What a call must return.

    rows: `[R]` which rows of the result are compared; want: `[R, N]` fp64; deviation: `[R, N]`, one standard
    deviation of all errors but the result's rounding; rounding: relative error of the result's own roundings.
    """

    rows: Tensor
    want: Tensor
    deviation: Tensor
    rounding: float


class Verdict(NamedTuple):
    """relative_error must not exceed tolerance; worst_element, an error over its limit, must not exceed 1."""

    relative_error: float
    tolerance: float
    worst_element: float

    @property
    def correct(self) -> bool:
        """NaN is never correct."""
        return self.relative_error <= self.tolerance and self.worst_element <= 1


def accumulation(k: int) -> float:
    """Relative error of adding k products in fp32 on a matrix unit, in units of the norm of the products.

    The accumulator is truncated (2^-23) once per step; it is a random walk, and on average two thirds of its end.
    """
    return max(1.0, k / PRODUCTS_PER_STEP) * 2.0**-23 * 2 / 3


def sample_rows(m: int, generator: torch.Generator, limit: int = MAX_CHECKED_ROWS) -> Tensor:
    """All rows of up to `limit`; of more, one at random of each of `limit` equal stretches: no tile is missed."""
    if m <= limit:
        return torch.arange(m, device=generator.device)
    edges = torch.arange(limit + 1, device=generator.device) * m // limit
    inside = torch.rand(limit, generator=generator, device=generator.device)
    return edges[:-1] + (inside * (edges[1:] - edges[:-1])).long()


def compare(y: Tensor, expected: Expected) -> Verdict:
    """Raises ValueError where shapes differ; elements that are not finite, in any row, make the verdict NaN."""
    m, n = y.shape
    if n != expected.want.shape[1] or m <= int(expected.rows.max()):
        wanted = f"[{int(expected.rows.max()) + 1} or more, {expected.want.shape[1]}]"
        raise ValueError(f"result: expected shape {wanted}, got {[m, n]}")
    want, error = expected.want, (y[expected.rows].double() - expected.want).abs()
    own = expected.rounding * want.abs()
    norm = want.norm()
    tolerance = float((own.square() + expected.deviation.double().square()).sum().sqrt() / norm)
    relative_error = float(error.norm() / norm)
    # Below the smallest normal number, rounding errors no longer shrink with the value.
    subnormal = torch.finfo(y.dtype).tiny * UNIT_ROUNDOFF[y.dtype]
    limit = own + SIGMAS * expected.deviation.double() + subnormal
    worst = float((error / limit).max())
    if not bool(torch.isfinite(y).all()):
        relative_error = worst = float("nan")
    return Verdict(relative_error, tolerance, worst)
