"""The rotation by torch's matrix products: the route on CPUs, and on CUDA for orders that no kernel has tiles for."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..common.workspace import outside_pools
from .matrix import HadamardTransform, hadamard_matrix

# Sizes of the factors into which a power of two is split. Products with matrices of 16 and 32 take 0.1-0.3 of the time
# of butterflies, and 0.4-0.7 of that of two factors (4096 and 14336, 1 to 256 rows, one thread).
_LARGEST_FACTOR = 32
# Values that are rotated at a time, to stay in the cache: a tenth of the time of 256 rows of 4096 at once.
_CHUNK = 1 << 16


def rotate(x: Tensor, signs: Tensor | None, transform: HadamardTransform, inverse: bool) -> Tensor:
    """x `[M, block]` -> `[M, block]` of x's dtype; signs `[n]` for the blocks in turn.

    Computed in fp32 (on CUDA as precisely as torch multiplies fp32 matrices there) and rounded once.
    """
    matrices = factors(transform, inverse, x.device)
    if x.is_cuda:
        return _rotated(x.float(), signs, transform, matrices, inverse).to(x.dtype)
    out = torch.empty_like(x)
    # Whole tokens, so that every chunk begins with the first of the signs.
    step = max(_CHUNK // transform.n, 1) * transform.blocks
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = _rotated(x[rows].float(), signs, transform, matrices, inverse)
    return out


def factors(transform: HadamardTransform, inverse: bool, device: torch.device) -> list[Tensor]:
    """The matrices on a device whose products rotate; kept."""
    return [_factor(order, inverse, device) for order in factors_of(transform.orders)]


def _rotated(
    x: Tensor, signs: Tensor | None, transform: HadamardTransform, factors: list[Tensor], inverse: bool
) -> Tensor:
    signs = None if signs is None else signs.to(x.dtype).view(transform.blocks, transform.block)
    rows = x.shape[0]
    if signs is not None and not inverse:
        x = (x.view(-1, *signs.shape) * signs).view(rows, -1)
    # From the right: each product acts on one axis, of all that is left of it and right of it.
    right = 1
    for factor in reversed(factors):
        order = factor.shape[0]
        if right == 1:
            x = (x.reshape(-1, order) @ factor.t()).view(rows, -1)
        else:
            x = torch.matmul(factor, x.view(-1, order, right)).view(rows, -1)
        right *= order
    x = x * transform.block**-0.5
    if signs is not None and inverse:
        x = (x.view(-1, *signs.shape) * signs).view(rows, -1)
    return x


@lru_cache(maxsize=1024)
def factors_of(orders: tuple[int, ...]) -> tuple[int, ...]:
    """Orders, powers of two split into equal factors of at most 32."""
    out: list[int] = []
    for order in orders:
        if order & (order - 1):
            out.append(order)
            continue
        exponent = order.bit_length() - 1
        count = math.ceil(exponent / (_LARGEST_FACTOR.bit_length() - 1))
        out += [1 << (exponent * (i + 1) // count - exponent * i // count) for i in range(count)]
    return tuple(out)


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError during the capture of a CUDA graph, which cannot hold the copy of a matrix to the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "hadamard: the first rotation of a size on a device makes its matrices; run it once before capturing"
        )


# Without a limit: CUDA graphs keep the addresses of what is in it.
@cache
def _factor(order: int, transposed: bool, device: torch.device) -> Tensor:
    refuse_capture(device)

    def make() -> Tensor:
        matrix = hadamard_matrix(order)
        return (matrix.t() if transposed else matrix).float().contiguous().to(device)

    return outside_pools(make, device)
