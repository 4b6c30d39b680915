"""Which kernel and tiles a rotation takes: a pure function of its orders and the device, as in `weight_only.tiles`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..common.choices import Device, family
from ..common.releases import triton_release

# Architectures whose widest matrix instruction takes 64 rows from shared memory: fewer and wider products.
_WIDE = (90, 100)
_SMALLEST = 16  # what a matrix instruction takes
_LONGEST_DENSE = 128


@dataclass(frozen=True)
class HadamardChoice:
    """What is launched for one block of a rotation, n = leading * A * Q * B, and why. See `kernels`.

    Attributes:
        variant: `rows` (one product for several short rows), `row` (a row per program), or `matmul` (torch's products,
            one for each order; the rest is 0).
        left, right: the orders whose Kronecker products H_A and H_B are; `rows` has no left.
        q: the order of the Sylvester matrix between them.
        sizes: A, padded, as the products' rows.
        leading: an order that a second launch multiplies by; 1: there is none.
        pinned: products take their right operand from registers; see `kernels.pinned`.
        again: the left matrix is fetched again for every tile.
        num_warps, num_stages: as in Triton; 0 stages: programs do not go from row to row.
        programs: on one multiprocessor, if they do.
        reason: one sentence.
    """

    variant: str
    left: tuple[int, ...] = ()
    q: int = 1
    right: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    leading: int = 1
    pinned: bool = False
    again: bool = False
    num_warps: int = 4
    num_stages: int = 0
    programs: int = 0
    reason: str = ""

    @property
    def a(self) -> int:
        return math.prod(self.left)

    @property
    def b(self) -> int:
        return math.prod(self.right)

    @property
    def padded_b(self) -> int:
        return padded(self.b)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`."""
    return max(1 << (size - 1).bit_length(), _SMALLEST)


@lru_cache(maxsize=1024)
def choose_hadamard(
    orders: tuple[int, ...], device: Device, dtype: torch.dtype = torch.bfloat16, plain: bool = True
) -> HadamardChoice:
    """The kernel and tiles for one block, the Kronecker product of the matrices of `orders`, powers of two last.

    Args:
        dtype: of the rows: fp16, bf16, fp32.
        plain: rows without signs and gate. With 16 bits they can be fetched ahead of their turn.
    """
    n = math.prod(orders)
    if n <= _LONGEST_DENSE:
        return HadamardChoice("rows", right=orders, reason="short rows: one product with the whole matrix")
    power = orders[-1] if orders[-1] & (orders[-1] - 1) == 0 else 1
    others = orders if power == 1 else orders[:-1]
    if len(others) > 1:
        return _several(others, power, device, dtype, plain)
    choice = _row(others[0] if others else 1, power, device, dtype, plain)
    return choice or _leading(orders, device, dtype, plain)


def _several(others: tuple[int, ...], power: int, device: Device, dtype: torch.dtype, plain: bool) -> HadamardChoice:
    """More than one order that is no power of two: the first from the left, the rest from the right."""
    right = others[1:] if power == 1 else (*others[1:], power)
    b = math.prod(right)
    if others[0] > 64 or b > _LONGEST_DENSE:
        return _leading((*others, power), device, dtype, plain)
    size = padded(others[0])
    reason = "two orders, one on each side"
    pinned = _pinned(size, device)
    return HadamardChoice("row", others[:1], 1, right, (size,), pinned=pinned, num_warps=_warps(size), reason=reason)


def _leading(orders: tuple[int, ...], device: Device, dtype: torch.dtype, plain: bool) -> HadamardChoice:
    """What one program cannot hold: the rest of the orders in a first launch, the first one in a second."""
    if len(orders) == 1:
        orders = (32, orders[0] // 32)
    rest = tuple(order for order in orders[1:] if order > 1)
    most = 64 if family(device.arch) == 100 and triton_release() < (3, 8) else 128  # see `common.releases`
    if 1 < orders[0] <= most and rest:
        inner = choose_hadamard(rest, device, dtype, plain)
        if inner.variant == "row" and inner.leading == 1:
            return replace(inner, leading=orders[0], reason="more than a program holds: two launches")
    return HadamardChoice("matmul", reason="orders that no kernel has tiles for")


def _row(m: int, power: int, device: Device, dtype: torch.dtype, plain: bool) -> HadamardChoice | None:
    """m 2^k in one program, or None where its registers would not do."""
    arch = family(device.arch)
    if m > 128:
        # In fp32 its parts do not fit beside each other.
        return None if dtype == torch.float32 else _large(m, power, device)
    # What makes the values takes registers too, where products take them from there.
    light = arch in _WIDE or (plain and dtype != torch.float32)
    if arch == 100 and triton_release() == (3, 8):
        light = False  # see `common.releases`
    for most, limit in ((32, 4096), (64, 16384 if light else 8192), (128, 16384)):
        a = m
        while a * 2 <= most and power // (a * 2 // m) >= _SMALLEST:
            a *= 2
        size, rest = padded(a), power // (a // m)
        if a <= most and size * max(rest, _SMALLEST) <= limit:
            break
    else:
        return None
    # Without the wide instruction a product costs by its length: short ones, and sums over more tiles.
    b = min(rest, 64 if arch in _WIDE and size >= 64 else 32)
    held = size * max(rest, _SMALLEST)
    warps = _warps(size) if held > 1024 else 1
    stages = programs = 0
    # On the others the registers do not suffice for it, or tcgen05 compiles to twice as much in a loop.
    if arch == 90 and plain and dtype != torch.float32 and size <= 64:
        stages, programs = 2, {1: 16, 2: 6, 4: 2 if held > 8192 else 4}[warps]
    left = (m, a // m) if m > 1 else (a,)
    reason = "a row in the registers of one program"
    return HadamardChoice(
        "row", left, rest // b, (b,), (size,), pinned=_pinned(size, device), num_warps=warps, num_stages=stages,
        programs=programs, reason=reason,
    )  # fmt: skip


def _large(m: int, power: int, device: Device) -> HadamardChoice | None:
    """m from 129 to 192: products of uneven pieces, which pad less than a power of two would."""
    if m <= 160 and power <= 128:
        sizes: tuple[int, ...] = (128, 32)
        b, warps = min(power, 64), 8
    elif m <= 192 and power <= 64:
        wide = family(device.arch) in _WIDE
        b, sizes, warps = (power, (64, 64, 64), 4) if wide else (min(power, 32), (128, 64), 8)
    else:
        return None
    return HadamardChoice(
        "row", (m,), power // b, (b,), sizes, pinned=_pinned(sizes[-1], device), again=sizes == (128, 32),
        num_warps=warps, reason="a long left side, in pieces",
    )  # fmt: skip


def _pinned(size: int, device: Device) -> bool:
    """Whether the products of `size` rows take their right operand from registers."""
    return family(device.arch) not in _WIDE or size < 64


def _warps(size: int) -> int:
    return max(size // 16, 1)
