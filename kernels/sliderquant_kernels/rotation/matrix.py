"""Hadamard matrices, generated, and how a rotation of any size is made of them.

A Hadamard matrix of order m has entries +1 and -1 and orthogonal rows: H H^T = m I. Orders of 1, 2 and many multiples
of 4 can be constructed (`construction`):

- `sylvester`: powers of two, H_2m = [[H, H], [H, -H]];
- `paley1`: q + 1, and `paley2`: 2 (q + 1), from the squares of a finite field of q elements, q = 3 and q = 1 mod 4;
- `goethals_seidel`: 4 w, from four sequences of length w whose periodic autocorrelations sum to 0.

The Kronecker product of two of them is another one. A rotation of size n is a product of few, `factor_hadamard(n)`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

# Changes whenever an order would be constructed differently.
VERSION = 1
# Products of smaller matrices are preferred to one beyond this order.
LARGEST_PREFERRED = 256
LARGEST_ORDER = 2048
# Sequences of +1 (bit 1) and -1, the first in the highest bit; found by a search over sequences that a group of
# multipliers leaves as they are.
_SEQUENCES = {
    23: (0x4D40AC, 0x53E1F2, 0x5CD2CE, 0x7D8C6F),
    29: (0x1CD402B3, 0x12F999F4, 0x1C750AE3, 0x1DA76E5B),
    39: (0x7B6ED50944, 0x7A23410A48, 0x645F45230C, 0x41CF9C179E),
    43: (0x7D859B6686F, 0x7195601AA63, 0x6BD273392F5, 0x583D77BAF06),
}


def construction(order: int) -> str | None:
    """The name of what makes a matrix of this order without a Kronecker product, or None."""
    if order & (order - 1) == 0:
        return "sylvester"
    if order % 4 or order > LARGEST_ORDER:
        return None
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return "paley1"
    if (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1):
        return "paley2"
    return "goethals_seidel" if order // 4 in _SEQUENCES else None


@lru_cache(maxsize=64)
def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix, int8 `[order, order]`, always the same one. Shared: copy it before changing it.

    Raises ValueError when none is known here.
    """
    name = construction(order) if order >= 1 else None
    if name is not None:
        matrix = _CONSTRUCTIONS[name](order)
    else:
        parts = _product(order) if order >= 1 else None
        if parts is None:
            raise ValueError(f"order: no Hadamard matrix of order {order} is known here; use factor_hadamard")
        matrix = kronecker(parts)
    # fp32 holds these sums of +-1 exactly.
    if not torch.equal(matrix.float() @ matrix.float().t(), order * torch.eye(order)):
        raise AssertionError(f"the matrix of order {order} is not orthogonal")
    return matrix


def kronecker(orders: tuple[int, ...]) -> Tensor:
    """The Kronecker product of the matrices of `orders`, from left to right, int8 `[prod, prod]`."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for order in orders:
        matrix = torch.kron(matrix, hadamard_matrix(order))
    return matrix


@dataclass(frozen=True)
class HadamardTransform:
    """A rotation of size n: x -> x R^T, R block-diagonal of n / b times the same block H / sqrt(b).

    H is the Kronecker product, from left to right, of the Hadamard matrices of `orders`, and b the orders' product:
    b = n, one block, wherever a matrix of order n can be made. `version` 0 becomes the current one.

    Raises ValueError for orders without a construction, and for those that do not divide n.
    """

    n: int
    orders: tuple[int, ...]
    version: int = 0

    def __post_init__(self) -> None:
        if self.version == 0:
            object.__setattr__(self, "version", VERSION)
        if self.version != VERSION:
            raise ValueError(
                f"version: expected {VERSION}, got {self.version}; this version of sliderquant_kernels would make "
                "other matrices: quantize the model again"
            )
        object.__setattr__(self, "orders", tuple(self.orders))
        if self.n < 1 or not self.orders or min(self.orders) < 1 or self.n % math.prod(self.orders):
            raise ValueError(
                f"orders: expected orders whose product divides n={self.n}, got {self.orders}; use factor_hadamard"
            )
        for order in self.orders:
            if construction(order) is None:
                raise ValueError(f"orders: no Hadamard matrix of order {order} is known here; use factor_hadamard")

    @property
    def block(self) -> int:
        """The order b of one block."""
        return math.prod(self.orders)

    @property
    def blocks(self) -> int:
        """Equal blocks on the diagonal; 1 unless there is no matrix of order n."""
        return self.n // self.block

    def matrix(self) -> Tensor:
        """The matrix of one block, int8 `[b, b]`: b^2 bytes, meant for small sizes."""
        return kronecker(self.orders)

    def metadata(self) -> dict[str, Any]:
        """Plain data for a checkpoint's configuration, see `from_metadata`."""
        return {**asdict(self), "orders": list(self.orders), "constructions": self._constructions()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> HadamardTransform:
        """The inverse of `metadata`.

        Raises ValueError for unknown or missing fields, another version, or matrices that would be made differently.
        """
        expected = {"n", "orders", "constructions", "version"}
        if set(metadata) != expected:
            raise ValueError(f"metadata: expected the fields {sorted(expected)}, got {sorted(metadata)}")
        transform = cls(metadata["n"], tuple(metadata["orders"]), metadata["version"])
        if list(metadata["constructions"]) != transform._constructions():
            raise ValueError(
                f"constructions: expected {transform._constructions()} for orders {list(transform.orders)}, "
                f"got {metadata['constructions']}"
            )
        return transform

    def _constructions(self) -> list[str | None]:
        return [construction(order) for order in self.orders]


@lru_cache(maxsize=1024)
def factor_hadamard(n: int) -> HadamardTransform:
    """How the rotation of size n is made.

    n = m 2^k with the smallest m for which there is a matrix: 14336 = 28 * 512, 11008 = 172 * 64. Where m would exceed
    256, several small orders are tried first: 29568 = 12 * 28 * 44 * 2. Where nothing is to be had, as for 6 or 188,
    the rotation is block-diagonal, of the largest power of two that divides n.

    Raises ValueError when n is odd and not 1: nothing can be rotated.
    """
    if n < 1 or (n % 2 and n > 1):
        raise ValueError(f"n: expected 1 or an even size to be rotated, got {n}; pad it to an even one")
    power = n & -n
    odd = n // power
    if odd == 1:
        return HadamardTransform(n, (n,))
    single = [odd * 2**j for j in range(2, power.bit_length()) if construction(odd * 2**j)]
    if single and single[0] <= LARGEST_PREFERRED:
        orders: tuple[int, ...] | None = (single[0],)
    else:
        orders = _small_orders(odd, power) or (tuple(single[:1]) or None)
    if orders is None:
        return HadamardTransform(n, (power,))
    rest = n // math.prod(orders)
    return HadamardTransform(n, orders if rest == 1 else (*orders, rest))


def _small_orders(odd: int, power: int) -> tuple[int, ...] | None:
    """Ascending orders up to `LARGEST_PREFERRED` whose odd parts multiply to `odd`, with the smallest maximum."""
    found = [
        tuple(sorted(orders))
        for parts in _factorizations(odd)
        if (orders := [_smallest_order(part, power) for part in parts]) and all(orders)
        if power % math.prod(order & -order for order in orders) == 0
    ]
    return min(found, key=lambda orders: (orders[-1], orders), default=None)


def _smallest_order(odd: int, power: int) -> int:
    """The smallest order `odd` 2^j that has a construction, j up to that of `power`; 0: none."""
    orders = (odd * 2**j for j in range(2, power.bit_length()))
    return next((order for order in orders if order <= LARGEST_PREFERRED and construction(order)), 0)


def _factorizations(odd: int, least: int = 3) -> list[tuple[int, ...]]:
    """The ways to write `odd` as a product of ascending factors from `least` on."""
    found: list[tuple[int, ...]] = [(odd,)] if odd >= least else []
    for first in range(least, math.isqrt(odd) + 1, 2):
        if odd % first == 0:
            found += [(first, *rest) for rest in _factorizations(odd // first, first)]
    return found


def _product(order: int) -> tuple[int, ...] | None:
    """Orders with a construction whose product is `order`, or None."""
    if order % 2:
        return None
    orders = factor_hadamard(order).orders
    return orders if math.prod(orders) == order else None


def _sylvester(order: int) -> Tensor:
    index = torch.arange(order)
    both = index[:, None] & index[None, :]
    parity = torch.zeros_like(both)
    while both.any():
        parity ^= both & 1
        both = both >> 1
    return (1 - 2 * parity).to(torch.int8)


def _paley1(order: int) -> Tensor:
    conference = _bordered(order - 1, -1)
    return conference + torch.eye(order, dtype=torch.int8)


def _paley2(order: int) -> Tensor:
    conference = _bordered(order // 2 - 1, 1)
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, ones) + torch.kron(torch.eye(order // 2, dtype=torch.int8), diagonal)


def _bordered(q: int, sign: int) -> Tensor:
    """[[0, 1], [sign, Q]] with Q[i, j] = 1, -1 or 0 as the field element i - j is a square, none, or zero."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[1:, 0] = sign
    matrix[0, 0] = 0
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _jacobsthal(q: int) -> Tensor:
    prime, exponent = _prime_power(q) or (0, 0)
    # A field element is a polynomial over the integers mod p, here by its coefficients, the lowest first.
    elements = [tuple(reversed(digits)) for digits in product(range(prime), repeat=exponent)]
    modulus = _irreducible(prime, exponent)
    squares = {_remainder(_multiply(element, element, prime), modulus, prime) for element in elements if any(element)}
    character = torch.tensor([0 if not any(e) else 1 if e in squares else -1 for e in elements], dtype=torch.int8)
    digits = torch.tensor(elements)
    difference = (digits[:, None, :] - digits[None, :, :]) % prime
    return character[(difference * prime ** torch.arange(exponent)).sum(-1)]


def _goethals_seidel(order: int) -> Tensor:
    w = order // 4
    a, b, c, d = (_circulant(bits, w) for bits in _SEQUENCES[w])
    bt, ct, dt = (part.t().flip(1) for part in (b, c, d))
    b, c, d = (part.flip(1) for part in (b, c, d))
    rows = ((a, b, c, d), (-b, a, dt, -ct), (-c, -dt, a, bt), (-d, ct, -bt, a))
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


def _circulant(bits: int, w: int) -> Tensor:
    first = torch.tensor([1 if bits >> (w - 1 - i) & 1 else -1 for i in range(w)], dtype=torch.int8)
    index = torch.arange(w)
    return first[(index[None, :] - index[:, None]) % w]


_CONSTRUCTIONS = {
    "sylvester": _sylvester,
    "paley1": _paley1,
    "paley2": _paley2,
    "goethals_seidel": _goethals_seidel,
}


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, or None."""
    prime = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    exponent = 0
    while q > 1 and q % prime == 0:
        q, exponent = q // prime, exponent + 1
    return (prime, exponent) if q == 1 and exponent else None


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """The first monic polynomial of a degree that no polynomial of half the degree divides."""
    divisors = [p for d in range(1, degree // 2 + 1) for p in _monic(prime, d)]
    return next(p for p in _monic(prime, degree) if all(any(_remainder(p, d, prime)) for d in divisors))


def _monic(prime: int, degree: int) -> list[tuple[int, ...]]:
    return [(*low, 1) for low in product(range(prime), repeat=degree)]


def _multiply(a: tuple[int, ...], b: tuple[int, ...], prime: int) -> tuple[int, ...]:
    out = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] = (out[i + j] + x * y) % prime
    return tuple(out)


def _remainder(value: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """value mod a monic modulus, padded to the modulus' degree."""
    rest, degree = list(value), len(modulus) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        factor = rest[top]
        for i, m in enumerate(modulus):
            rest[top - degree + i] = (rest[top - degree + i] - factor * m) % prime
    return tuple((rest + [0] * degree)[:degree])
