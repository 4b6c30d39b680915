"""Hadamard matrices: every order is orthogonal and always the same; every size gets a rotation."""

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import HadamardTransform, factor_hadamard
from sliderquant_kernels.rotation.matrix import LARGEST_PREFERRED, construction, hadamard_matrix, kronecker

_ORDERS = [1, 2, *range(4, LARGEST_PREFERRED + 1, 4)]
# Multiples of 4 for which there is neither a construction here nor a product of them.
_MISSING = {188, 236}
# What kernels have to rotate: sizes of real intermediate activations, hidden states and heads.
_SIZES = {
    4096: (4096,),
    8192: (8192,),
    5120: (20, 256),
    11008: (172, 64),
    13824: (108, 128),
    14336: (28, 512),
    18944: (148, 128),
    28672: (28, 1024),
    29568: (12, 28, 44, 2),
    768: (12, 64),
    1536: (12, 128),
    6144: (12, 512),
    12288: (12, 1024),
    64: (64,),
    96: (12, 8),
    172: (172,),
    192: (12, 16),
    512: (512,),
}


@pytest.mark.parametrize("order", [order for order in _ORDERS if order not in _MISSING])
def test_rows_are_orthogonal(order):
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.int8
    assert matrix.shape == (order, order)
    assert (matrix.abs() == 1).all()
    identity = order * torch.eye(order, dtype=torch.int64)
    assert torch.equal(matrix.long() @ matrix.long().t(), identity)
    assert torch.equal(matrix.long().t() @ matrix.long(), identity)


def _is_known(order):
    try:
        hadamard_matrix(order)
    except ValueError:
        return False
    return True


@settings(max_examples=25, deadline=None)
@given(order=st.integers(LARGEST_PREFERRED // 4 + 1, 300).map(lambda quarter: 4 * quarter).filter(_is_known))
def test_rows_of_larger_orders_are_orthogonal(order):
    """Those up to 1200 that are known here."""
    matrix = hadamard_matrix(order).double()
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("n", [n for n in _SIZES if n <= 1536])
def test_products_of_factors_are_orthogonal(n):
    """The matrix of a whole size, which Kronecker products make of its orders."""
    matrix = factor_hadamard(n).matrix().double()
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n, dtype=torch.float64))


def test_orders_without_a_matrix():
    for order in (*_MISSING, 3, 6, 0, -4, 1027):
        with pytest.raises(ValueError, match=rf"order: no Hadamard matrix of order {order} is known here; use factor"):
            hadamard_matrix(order)


@pytest.mark.parametrize(
    ("order", "name"),
    [
        (1, "sylvester"),
        (64, "sylvester"),
        (12, "paley1"),
        (28, "paley1"),  # 27 = 3^3
        (244, "paley1"),  # 243 = 3^5
        (36, "paley2"),
        (52, "paley2"),  # 25 = 5^2
        (100, "paley2"),  # 49 = 7^2
        (92, "goethals_seidel"),
        (116, "goethals_seidel"),
        (156, "goethals_seidel"),
        (172, "goethals_seidel"),
        (40, None),
    ],
)
def test_constructions(order, name):
    assert construction(order) == name


def test_matrices_stay_what_they_are():
    """Checkpoints depend on them: whoever changes one has to change the version."""
    expected = {
        16: "4173cdf0377bf83a",
        12: "db7478025ce74776",
        28: "75a65a7aa5dd6380",
        52: "e2278b13940b11ea",
        92: "6be3d0b64c98597e",
        116: "08fea9282d9ede3f",
        156: "41afcec5e5bb7b87",
        172: "8a198ff1b96e2f96",
    }
    for order, digest in expected.items():
        assert hashlib.sha256(hadamard_matrix(order).numpy().tobytes()).hexdigest()[:16] == digest, order
    assert HadamardTransform(4, (4,)).version == 1


def test_kronecker_is_from_left_to_right():
    matrix = kronecker((12, 4))
    assert torch.equal(matrix[:4, 4:8], hadamard_matrix(12)[0, 1] * hadamard_matrix(4))
    assert torch.equal(kronecker((4, 8)), hadamard_matrix(32))


@pytest.mark.parametrize("n", _SIZES)
def test_factors_of_real_sizes(n):
    transform = factor_hadamard(n)
    assert transform.orders == _SIZES[n]
    assert (transform.blocks, transform.block) == (1, n)


def test_every_even_size_has_a_rotation():
    for n in (1, *range(2, 3000, 2)):
        transform = factor_hadamard(n)
        assert transform.block * transform.blocks == n
        assert math.prod(transform.orders) == transform.block
        if n % 2**6 == 0 and n // 2**6 < 47:
            assert transform.blocks == 1, n


@pytest.mark.parametrize(("n", "orders", "blocks"), [(6, (2,), 3), (188, (4,), 47), (752, (752,), 1), (2, (2,), 1)])
def test_fallback(n, orders, blocks):
    transform = factor_hadamard(n)
    assert (transform.orders, transform.blocks) == (orders, blocks)


@pytest.mark.parametrize("n", [0, -2, 3, 4095])
def test_odd_sizes_are_refused(n):
    with pytest.raises(ValueError, match=rf"n: expected 1 or an even size to be rotated, got {n}; pad it"):
        factor_hadamard(n)


@pytest.mark.parametrize("n", [*_SIZES, 6, 188])
def test_metadata(n):
    transform = factor_hadamard(n)
    stored = json.loads(json.dumps(transform.metadata()))
    assert HadamardTransform.from_metadata(stored) == transform
    assert len(stored["constructions"]) == len(stored["orders"])


def test_metadata_of_others_is_refused():
    good = factor_hadamard(14336).metadata()
    assert good == {"n": 14336, "orders": [28, 512], "constructions": ["paley1", "sylvester"], "version": 1}
    for change, message in (
        ({"version": 2}, r"version: expected 1, got 2; .* quantize the model again"),
        ({"constructions": ["paley2", "sylvester"]}, r"constructions: expected \['paley1', 'sylvester'\] for orders"),
        ({"orders": [28, 500]}, r"orders: expected orders whose product divides n=14336, got \(28, 500\)"),
        ({"orders": []}, r"orders: expected orders whose product divides"),
        ({"orders": [14]}, r"orders: no Hadamard matrix of order 14 is known here"),
        ({"seed": 0}, r"metadata: expected the fields \['constructions', 'n', 'orders', 'version'\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            HadamardTransform.from_metadata({**good, **change})
    del good["orders"]
    with pytest.raises(ValueError, match=r"metadata: expected the fields"):
        HadamardTransform.from_metadata(good)
