"""The ops that are measured. An op is a module with the functions of `case.Op`; a further one is an entry here."""

from . import hadamard, weight_only
from .harness.case import Op
from .low_bit import linear, quantize

__all__ = ["OPS"]

OPS: dict[str, Op] = {op.NAME: op for op in (weight_only, linear, quantize, hadamard)}
