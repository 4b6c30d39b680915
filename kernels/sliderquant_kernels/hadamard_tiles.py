"""Which kernel and tiles a rotation takes: a pure function of its orders and the device, as in `tiles`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .tiles import Device, family

# Architectures whose widest matrix instruction takes 64 rows from shared memory: fewer and wider products.
_WIDE = (90, 100)
_SMALLEST = 16  # what a matrix instruction takes
_LONGEST_DENSE = 128


@dataclass(frozen=True)
class HadamardChoice:
    """What is launched for one block of a rotation, n = leading * A * Q * B, and why. See `hadamard_triton`.

    Attributes:
        variant: `rows` (one product for several short rows), `row` (a row per program), or `matmul` (torch's products,
            one for each order; the rest is 0).
        left, right: the orders whose Kronecker products H_A and H_B are; `rows` has no left.
        q: the order of the Sylvester matrix between them.
        sizes: A, padded, as the products' rows.
        leading: an order that a second launch multiplies by; 1: there is none.
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
def choose_hadamard(orders: tuple[int, ...], device: Device, plain: bool = True) -> HadamardChoice:
    """The kernel and tiles for one block, the Kronecker product of the matrices of `orders`, powers of two last.

    Args:
        plain: 16-bit rows without signs and gate. They can be fetched ahead of their turn.
    """
    n = math.prod(orders)
    if n <= _LONGEST_DENSE:
        return HadamardChoice("rows", right=orders, reason="short rows: one product with the whole matrix")
    power = orders[-1] if orders[-1] & (orders[-1] - 1) == 0 else 1
    others = orders if power == 1 else orders[:-1]
    if len(others) > 1:
        return _several(others, power, device, plain)
    choice = _row(others[0] if others else 1, power, device, plain)
    return choice or _leading(orders, device, plain)


def _several(others: tuple[int, ...], power: int, device: Device, plain: bool) -> HadamardChoice:
    """More than one order that is no power of two: the first from the left, the rest from the right."""
    right = others[1:] if power == 1 else (*others[1:], power)
    b = math.prod(right)
    if others[0] > 64 or b > _LONGEST_DENSE:
        return _leading((*others, power), device, plain)
    size = padded(others[0])
    reason = "two orders, one on each side"
    return HadamardChoice("row", others[:1], 1, right, (size,), num_warps=_warps(size), reason=reason)


def _leading(orders: tuple[int, ...], device: Device, plain: bool) -> HadamardChoice:
    """What one program cannot hold: the rest of the orders in a first launch, the first one in a second."""
    if len(orders) == 1:
        orders = (32, orders[0] // 32)
    rest = tuple(order for order in orders[1:] if order > 1)
    if 1 < orders[0] <= 128 and rest:
        inner = choose_hadamard(rest, device, plain)
        if inner.variant == "row" and inner.leading == 1:
            return HadamardChoice(
                "row", inner.left, inner.q, inner.right, inner.sizes, orders[0], inner.again, inner.num_warps,
                inner.num_stages, inner.programs, "more than a program holds: two launches",
            )  # fmt: skip
    return HadamardChoice("matmul", reason="orders that no kernel has tiles for")


def _row(m: int, power: int, device: Device, plain: bool) -> HadamardChoice | None:
    """m 2^k in one program, or None where its registers would not do."""
    arch = family(device.arch)
    if m > 128:
        return _large(m, power, arch in _WIDE)
    for most, limit in ((32, 4096), (64, 16384), (128, 16384)):
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
    if arch == 90 and plain and size <= 64:
        stages, programs = 2, {1: 16, 2: 6, 4: 2 if held > 8192 else 4}[warps]
    left = (m, a // m) if m > 1 else (a,)
    reason = "a row in the registers of one program"
    return HadamardChoice("row", left, rest // b, (b,), (size,), 1, False, warps, stages, programs, reason)


def _large(m: int, power: int, wide: bool) -> HadamardChoice | None:
    """m from 129 to 192: products of uneven pieces, which pad less than a power of two would."""
    reason = "a long left side, in pieces"
    b = min(power, 64)
    if m <= 160 and power <= 128:
        return HadamardChoice("row", (m,), power // b, (b,), (128, 32), again=True, num_warps=8, reason=reason)
    if m <= 192 and power <= 64:
        if wide:
            return HadamardChoice("row", (m,), power // b, (b,), (64, 64, 64), num_warps=4, reason=reason)
        b = min(power, 32)
        return HadamardChoice("row", (m,), power // b, (b,), (128, 64), num_warps=8, reason=reason)
    return None


def _warps(size: int) -> int:
    return max(size // 16, 1)
