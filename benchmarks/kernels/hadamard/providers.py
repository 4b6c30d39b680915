"""Who rotates: our ops, fused and unfused; a copy, than which nothing is faster; and the public kernels.

The peers only rotate powers of two, by the same matrix as ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from sliderquant_kernels import hadamard, hadamard_quantize, quantize_activations

from ..harness.case import Case, Prepared, Provider, Unsupported
from ..low_bit.quantize.providers import compared
from ..shared import inputs
from ..shared.rotations import launches
from ..shared.rows import is_cold, own_providers
from .operands import ROTATE, HadamardArithmetic, Rows, scheme_of

__all__ = ["PROVIDERS"]

# HadaCore rounds after every factor of 16.
HADACORE_FACTOR = 16


def prepare(given: Rows) -> Prepared:
    """Our op: one launch, two for long rows."""
    scheme, transform = given.scheme, given.transform

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Any:
        if scheme is None:
            return hadamard(t[0], transform)
        x, gate = (t[0][1], t[0][0]) if scheme.parts == 2 else (t[0], None)
        return hadamard_quantize(x, transform, scheme.bits, scheme.symmetric, gate=gate)

    between = _launches(given) - 1
    return _prepared(given, call, between)


def prepare_unfused(given: Rows) -> Prepared:
    """Torch's SiLU and product, our rotation, our quantization."""
    scheme, transform = given.scheme, given.transform
    if scheme is None:
        raise Unsupported("nothing is fused in rotating alone")

    def call(x: Tensor, t: tuple[Tensor, ...]) -> Any:
        ready = inputs.before(t[0], t[0], scheme)
        return quantize_activations(hadamard(ready, transform), scheme.bits, scheme.symmetric)

    return _prepared(given, call, _launches(given))


def prepare_fast_hadamard(given: Rows) -> Prepared:
    """fast-hadamard-transform: sums and differences in fp32, in registers and shared memory."""
    from fast_hadamard_transform import hadamard_transform

    scale = given.transform.n**-0.5
    return _prepared(given, lambda x, t: hadamard_transform(t[0], scale), 0)


def prepare_hadacore(given: Rows) -> Prepared:
    """HadaCore as vLLM ships it: matrix instructions on factors of 16, in 16 bits."""
    from vllm import _custom_ops

    steps = math.ceil(math.log(given.transform.n, HADACORE_FACTOR))
    return _prepared(given, lambda x, t: _custom_ops.hadacore_transform(t[0], inplace=False), steps - 1)


def _prepared(given: Rows, call: Callable[[Tensor, tuple[Tensor, ...]], Any], between: int) -> Prepared:
    arithmetic = HadamardArithmetic(between=between)
    quantizes = given.scheme is not None
    return Prepared(
        (given.x,), call, lambda m: arithmetic, compared=compared if quantizes else lambda y: y, cold=is_cold(given)
    )  # fmt: skip


def _launches(given: Rows) -> int:
    """Launches between which all values are rounded to 16 bits."""
    return launches(given.transform, given.x.dtype, given.x.device, given.scheme is not None)


def compilation(case: Case) -> Hashable:
    """One kernel for each size and scheme."""
    return case.scheme, case.shape, case.dtype


def compilation_unfused(case: Case) -> Hashable:
    """One for the rotation, one for quantizing."""
    return scheme_of(case.scheme), case.shape, case.dtype


def accepts_unfused(case: Case) -> str | None:
    """Rotating alone has nothing to be fused."""
    return "nothing is fused in rotating alone" if case.scheme == ROTATE else None


def accepts_powers(case: Case) -> str | None:
    """The peers: rotating alone, powers of two up to 32768."""
    (n,) = case.shape
    if case.scheme != ROTATE:
        return "it does not quantize"
    return None if n & (n - 1) == 0 and n <= 32768 else f"its matrix of order {n} is another one, or missing"


_EVERY = [
    *own_providers(prepare, compilation, prepare_unfused, compilation_unfused, accepts_unfused),
    Provider(
        "fast-hadamard-transform",
        prepare_fast_hadamard,
        distribution="fast-hadamard-transform==1.1.0",
        peer=True,
        accepts=accepts_powers,
    ),
    Provider("hadacore", prepare_hadacore, distribution="vllm==0.33.0", peer=True, accepts=accepts_powers),
]
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _EVERY}
