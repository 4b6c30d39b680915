"""Rotations, for several ops: in fp64, with what the kernels' roundings can do, and how often they round."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sliderquant_kernels import HadamardTransform
from sliderquant_kernels.common.choices import Device
from sliderquant_kernels.rotation.matrix import hadamard_matrix
from sliderquant_kernels.rotation.tiles import choose_hadamard

from ..harness.checking import SIGMAS, UNIT_ROUNDOFF
from . import inputs
from .inputs import Codes
from .schemes import ActivationScheme

__all__ = ["launches", "rotated", "rotated_codes", "rotated_rows"]

# Of products with +-1 whose operand is split into 16 bits, or added in fp32: relative to a row's root mean square.
EXACT = 2.0**-17
# Of silu in fp32, which decides a few of the roundings to 16 bits that follow it.
SILU = 2.0**-15


def rotated(x: Tensor, transform: HadamardTransform, inverse: bool = False) -> Tensor:
    """x fp64 `[R, n]`, rotated one order after the other, by sums and differences where it is a power of two."""
    rows, right = x.shape[0], 1
    for order in reversed(transform.orders):
        axis = x.reshape(-1, order, right)
        if order & (order - 1) == 0:
            size = 1
            while size < order:
                pairs = axis.reshape(-1, 2, size * right)
                axis = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
                size *= 2
        else:
            matrix = hadamard_matrix(order).to(x.device, x.dtype)
            axis = (matrix.t() if inverse else matrix) @ axis
        x, right = axis.reshape(rows, -1), right * order
    return x / transform.block**0.5


def rotated_rows(
    x: Tensor, scheme: ActivationScheme, transform: HadamardTransform, rows: Tensor, between: int
) -> tuple[Tensor, Tensor]:
    """Some rows after what comes before and the rotation, fp64 `[R, n]`, and one standard deviation of their errors
    `[R, 1]`. between: how often all values are rounded to 16 bits on the way; a result's own rounding apart."""
    want = rotated(inputs.candidates(x, x.new_empty(0), scheme, rows, False)[0], transform)
    relative = EXACT + between**0.5 * UNIT_ROUNDOFF[x.dtype] + (SILU if scheme.fused else 0.0)
    return want, want.square().mean(-1, keepdim=True).sqrt() * relative


def rotated_codes(
    x: Tensor,
    scheme: ActivationScheme,
    transform: HadamardTransform,
    rows: Tensor,
    between: int,
    sigmas: float = SIGMAS,
) -> Codes:
    """The codes of some rows after the rotation, and how far they may be off where values are off by `sigmas` of their
    standard deviations; see `rotated_rows`."""
    want, deviation = rotated_rows(x, scheme, transform, rows, between)
    found = inputs.codes_of([want, want - sigmas * deviation, want + sigmas * deviation], scheme)
    if sigmas >= SIGMAS:
        return found
    # Values further away from the middle of two codes come out differently now and then, too. Where it is few of a
    # token's, those that lie nearer may be none: each has its share of the expected number, at most deviation / scale.
    share = found.scale * (deviation / found.scale).clamp(max=1).sqrt()
    return replace(found, values_off=torch.hypot(found.values_off, share))


def launches(transform: HadamardTransform, dtype: torch.dtype, device: torch.device, quantizes: bool) -> int:
    """Launches of our rotation, with quantizing in the last one or not, between which values are rounded to dtype."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    found = Device(10 * properties.major + properties.minor, properties.multi_processor_count)
    choice = choose_hadamard(transform.orders, found, dtype)
    separate = quantizes and (choice.variant == "matmul" or transform.blocks > 1)
    return 2 if choice.leading > 1 or separate else 1
