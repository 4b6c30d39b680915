"""The baseline: torch.nn.functional.linear on the dequantized weight in 16 bits."""

from __future__ import annotations

from torch.nn.functional import linear

from ...harness.case import Arithmetic, Prepared, Provider
from ..operands import Operands

CUBLAS, ONEDNN = "cublas", "onednn"
# Split-K inside cuBLAS may add partial sums in 16 bits, which torch allows by default.
ARITHMETIC = Arithmetic(weight_roundings=1, output_roundings=2)


def prepare(weight: Operands) -> Prepared:
    """The weight, rounded once to the activations' dtype."""
    return Prepared((weight.weight(weight.dtype),), lambda x, tensors: linear(x, tensors[0]), lambda m: ARITHMETIC)


PROVIDERS = [
    Provider(CUBLAS, prepare, computes="the dequantized 16-bit weight"),
    Provider(ONEDNN, prepare, devices=("cpu",), computes="the dequantized 16-bit weight"),
]
