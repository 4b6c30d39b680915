"""Who quantizes activations: our op, fused and unfused, and what no kernel is faster than: a copy."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from sliderquant_kernels import QuantizedActivations

from ...harness.case import Case, Prepared, Provider
from ...shared.rows import is_cold, own_providers
from ...shared.schemes import RMS_NORM, ActivationScheme
from ..linear.operands import LowBitArithmetic
from ..linear.providers import quantized
from .operands import Activations

__all__ = ["PROVIDERS", "compared"]


def prepare(given: Activations, *, fused: bool = True) -> Prepared:
    """Our op. Without `fused`, torch's norm or SiLU and product come before it."""
    scheme = given.scheme
    tensors = (given.x, given.norm_weight) if scheme.fused == RMS_NORM else (given.x,)

    def call(x: Tensor, t: tuple[Tensor, ...]) -> QuantizedActivations:
        return quantized(t[0], t[-1], scheme, fused)

    arithmetic = LowBitArithmetic(rounded_once=False if fused else None)
    return Prepared(tensors, call, lambda m: arithmetic, compared=compared, cold=is_cold(given))


def prepare_unfused(given: Activations) -> Prepared:
    """Torch's norm or SiLU and product, then our op."""
    return prepare(given, fused=False)


def compared(result: QuantizedActivations) -> Tensor:
    """What `operands.expected` wants, in fp32, which holds these integers exactly."""
    codes, zero = result.codes, result.zero_point
    if codes.dtype == torch.uint8:
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8)
        codes = (nibbles ^ 8) - 8
    codes = codes.int()
    columns = [codes, (result.token_sum - codes.sum(-1))[:, None], result.scale[:, None]]
    if zero is not None:
        columns = [codes - zero[:, None], *columns[1:], zero[:, None]]
    return torch.cat([column.float() for column in columns], -1)


def compilation(case: Case) -> Hashable:
    """One kernel for each size and scheme."""
    return ActivationScheme.parse(case.scheme), case.shape, case.dtype


def compilation_unfused(case: Case) -> Hashable:
    """That of what has nothing before it."""
    return replace(ActivationScheme.parse(case.scheme), fused=None), case.shape, case.dtype


def accepts_unfused(case: Case) -> str | None:
    """Without anything before, nothing is there to be fused."""
    return None if ActivationScheme.parse(case.scheme).fused else f"nothing before quantizing in {case.scheme}"


_EVERY = own_providers(prepare, compilation, prepare_unfused, compilation_unfused, accepts_unfused)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _EVERY}
