"""Which kernel a rotation takes: pure, and the same rotation whatever it is split into."""

import math

import pytest
import torch

from sliderquant_kernels.common.choices import Device
from sliderquant_kernels.rotation import tiles as hadamard_tiles
from sliderquant_kernels.rotation.matrix import factor_hadamard, kronecker
from sliderquant_kernels.rotation.tiles import choose_hadamard, padded

_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_SIZES = [
    1, 2, 12, 64, 96, 128, 172, 192, 256, 512, 576, 592, 768, 1024, 1040, 1408, 1536, 2048, 2304, 3072, 4096, 4864,
    5120, 6144, 8192, 9216, 11008, 12288, 13824, 14336, 16384, 17920, 18432, 18944, 25600, 27648, 28672, 29568, 32768,
]  # fmt: skip


@pytest.mark.parametrize("n", _SIZES)
@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_choices_fit(arch, n):
    for dtype, plain in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        transform = factor_hadamard(n)
        choice = choose_hadamard(transform.orders, Device.typical(arch), dtype, plain)
        assert choice.reason
        if dtype == torch.float32 and any(order > 128 and order & (order - 1) for order in transform.orders):
            assert choice.variant == "matmul"
            continue
        assert choice.variant == ("rows" if n <= 128 else "row")
        assert choice.leading * choice.a * choice.q * choice.b == n
        if choice.variant == "rows":
            continue
        assert choice.q & (choice.q - 1) == 0
        assert sum(choice.sizes) >= choice.a > sum(choice.sizes[:-1])
        assert all(size >= 16 and size % choice.sizes[-1] == 0 for size in choice.sizes)
        assert choice.padded_b <= 128
        # Values of a row, padded, that a thread holds in fp32.
        assert sum(choice.sizes) * choice.q * choice.padded_b / (32 * choice.num_warps) <= 128
        assert not choice.num_stages or (plain and dtype != torch.float32 and choice.programs > 0)
        assert choice.pinned == (arch not in (90, 100) or choice.sizes[-1] < 64)
        assert choice.leading <= 128


@pytest.mark.parametrize("n", [n for n in _SIZES if n <= 2304])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_parts_make_the_same_matrix(arch, n):
    orders = factor_hadamard(n).orders
    choice = choose_hadamard(orders, Device.typical(arch))
    parts = (choice.leading, *choice.left, choice.q, *choice.right)
    assert torch.equal(kronecker(parts), kronecker(orders))


def test_one_program_wherever_a_row_fits():
    for n in (4096, 8192, 11008, 13824, 14336, 16384, 18944):
        assert choose_hadamard(factor_hadamard(n).orders, Device.typical(90)).leading == 1, n
    assert choose_hadamard((28, 1024), Device.typical(90)).leading == 28
    assert choose_hadamard((32768,), Device.typical(90)).leading == 32


def test_a_release_without_the_registers_takes_a_longer_left_side(monkeypatch):
    found = []
    for release in ((3, 6), (3, 8), (3, 9)):
        monkeypatch.setattr(hadamard_tiles, "triton_release", lambda release=release: release)
        found.append(choose_hadamard.__wrapped__((28, 512), Device.typical(100)))
    assert [(choice.sizes, choice.q, choice.num_warps) for choice in found] == [
        ((64,), 4, 4), ((128,), 2, 8), ((64,), 4, 4)
    ]  # fmt: skip


def test_orders_without_tiles():
    for n in (752, 300):
        assert choose_hadamard(factor_hadamard(n).orders, Device.typical(90)).variant == "matmul"


@pytest.mark.parametrize(("size", "want"), [(1, 16), (16, 16), (17, 32), (28, 32), (64, 64), (108, 128)])
def test_padded(size, want):
    assert padded(size) == want
    assert math.log2(want).is_integer()


def test_what_an_older_triton_does_not_compile_for_sm_100(monkeypatch):
    """A first order of 108, which the second launch pads to 128."""
    device = Device.typical(100)
    for release, want in (((3, 9), ("row", 108)), ((3, 6), ("matmul", 1))):
        choose_hadamard.cache_clear()
        monkeypatch.setattr(hadamard_tiles, "triton_release", lambda release=release: release)
        found = choose_hadamard(factor_hadamard(27648).orders, device)
        assert (found.variant, found.leading) == want
        assert choose_hadamard(factor_hadamard(28672).orders, device).leading == 28
    choose_hadamard.cache_clear()
