"""Shared by the kernel tests: random weights, and the error bound they are all held to."""

from typing import NamedTuple

import pytest
import torch

from sliderquant_kernels import reference

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Weight(NamedTuple):
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int


def _make_weight(bits, n, k, group_size, symmetric, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else k // group_size
    top = 2**bits
    codes = torch.randint(0, top, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).mul_(0.02).to(dtype)
    zero_point = None if symmetric else torch.randint(0, top, (n, groups), dtype=torch.uint8, generator=generator)
    return Weight(codes, scale, zero_point, bits)


def _make_x(shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_matmul_close(y, x, weight, bias=None, residual=None, *, weights_rounded=False, roundoff=None, extra=None):
    """Every element within what the arithmetic can lose, and all of them together much closer.

    u is the unit roundoff of y's dtype and S = sum_k |x| |w|. The result is rounded to y's dtype (u |y|, and again
    after bias and residual where they are added afterwards); fp32 accumulation loses at most K 2^-24 S, and one more
    2^-23 S for the scale and the product; a route that rounds weights first loses another u S. Rounding errors are
    independent, so the relative error of the whole stays below 2 u where accumulation is not what dominates.
    """
    want = reference.weight_only_linear(x, *weight, bias, residual)
    u = UNIT_ROUNDOFF[y.dtype] if roundoff is None else roundoff
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    magnitude = reference.magnitude(x, *weight)
    bound = u * want.abs() + (x.shape[-1] + 2) * 2.0**-24 * magnitude
    for addend in (bias, residual):
        if addend is not None:
            bound += 2 * u * (want.abs() + addend.double().abs())
    if weights_rounded:
        bound += u * magnitude
    if extra is not None:
        bound += extra
    error = (y.double() - want).abs()
    assert torch.isfinite(y).all()
    worst = (error - bound * 1.01).argmax() if error.numel() else 0
    assert (error <= bound * 1.01 + 1e-30).all(), (
        f"error {error.flatten()[worst]:.3e} exceeds {bound.flatten()[worst]:.3e} at element {worst}"
    )
    if y.numel() >= 64 and extra is None:
        relative = (error.norm() / want.norm()).item()
        limit = max(2 * u, 2.0**-24 * x.shape[-1] ** 0.5 * (magnitude.norm() / want.norm()).item())
        assert relative <= limit, f"relative error {relative:.3e} exceeds {limit:.3e}"


@pytest.fixture(scope="session")
def make_weight():
    return _make_weight


@pytest.fixture(scope="session")
def make_x():
    return _make_x


@pytest.fixture(scope="session")
def assert_matmul_close():
    return _assert_matmul_close


def _assert_rotation_close(y, x, want, *, roundoff=None, launches=1):
    """Every element within what the arithmetic can lose, and all of them together much closer.

    With S = sum |x| / sqrt(b) over a token: the result is rounded once, u |y|, and once more u S at most where a second
    launch follows; fp32 accumulation and the parts into which values are split lose less than 2^-16 S of 16-bit values
    and n 2^-24 S of fp32 ones.
    """
    u = UNIT_ROUNDOFF[y.dtype] if roundoff is None else roundoff
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    n = x.shape[-1]
    total = x.double().abs().sum(-1, keepdim=True) / n**0.5
    bound = u * want.abs() + ((launches - 1) * u + (n * 2.0**-24 if y.dtype == torch.float32 else 2.0**-16)) * total
    if y.dtype == torch.float16:
        bound += 2.0**-24  # below 2^-14 its steps stay the same
    error = (y.double() - want).abs()
    assert torch.isfinite(y).all()
    worst = (error - bound).argmax() if error.numel() else 0
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3e} exceeds {bound.flatten()[worst]:.3e} at element {worst}"
    )
    if y.numel() >= 64:
        relative = (error.norm() / want.norm()).item()
        limit = 2.0**-20 if y.dtype == torch.float32 else launches * u
        assert relative <= limit, f"relative error {relative:.3e} exceeds {limit:.3e}"


@pytest.fixture(scope="session")
def assert_rotation_close():
    return _assert_rotation_close
