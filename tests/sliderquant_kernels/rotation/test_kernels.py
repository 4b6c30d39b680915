"""The Triton code of the rotations, run by Triton's interpreter: every kernel, kind of factor and dtype, odd shapes."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import HadamardTransform, factor_hadamard, prepare_hadamard, reference
from sliderquant_kernels.activations.op import prepared
from sliderquant_kernels.common.choices import Device
from sliderquant_kernels.rotation import launch
from sliderquant_kernels.rotation.tiles import HadamardChoice

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels were imported without TRITON_INTERPRET=1")

_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# The interpreter truncates to bf16 instead of rounding: twice the unit roundoff.
_ROUNDOFF = {torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7}
# One multiprocessor: programs that go from row to row have several of them.
_DEVICES = {80: Device(80, 1), 90: Device(90, 1)}
_ARCHITECTURES = [*((90, dtype) for dtype in _DTYPES), (80, torch.float16)]
# By what is launched: several rows, dense, also in blocks; one row with few and many tiles between the sides, padded
# on the left, on the right, on both; pieces of uneven size, their matrix kept or fetched again.
_SIZES = [1, 2, 6, 12, 64, 96, 128, 188, 192, 256, 768, 1024, 1040, 1536, 1152, 2560, 1216, 172, 344, 592]
# Two launches, of sizes that would not need them.
_LEADING = {
    "leading": (1536, HadamardChoice("row", (16,), 1, (8,), (16,), leading=12, num_warps=1)),
    "leading-padded": (960, HadamardChoice("row", (20,), 1, (4,), (32,), leading=12, num_warps=2)),
    "leading-loop": (
        1024,
        HadamardChoice("row", (16,), 2, (16,), (16,), leading=2, num_warps=2, num_stages=2, programs=3),
    ),
}


def _signs(n, dtype):
    return (torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(5)) * 2 - 1).to(dtype)


@pytest.fixture
def on(monkeypatch):
    """`on(arch)`: what is launched next takes the choices for this architecture. `on(choice=...)`: this choice."""

    def use(arch=90, choice=None):
        monkeypatch.setattr(launch, "device_of", lambda _: _DEVICES[arch])
        if choice is not None:
            monkeypatch.setattr(launch, "choose_hadamard", lambda *_: choice)

    return use


def _assert_quantized(got, x, want, bits, symmetric, launches=1, clip=(1.0, 1.0)):
    """Codes are what the scale and zero-point make of the oracle's values, and those are the oracle's, up to what is
    lost before (see `assert_rotation_close`)."""
    codes, scale, zero, total = (None if part is None else part.double() for part in got)
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    n = x.shape[-1]
    lost = (x.double().abs().sum(-1) / n**0.5) * (
        n * 2.0**-24 if x.dtype == torch.float32 else 2.0**-16 + (launches - 1) * _ROUNDOFF[x.dtype]
    )
    _, wanted_scale, _ = reference.quantize_activations(want, bits, symmetric, clip)
    steps = (2**bits - 1) / 2 if symmetric else 2**bits - 1
    assert ((scale - wanted_scale).abs() <= 2 * lost / steps + 2.0**-22 * wanted_scale).all()
    assert torch.equal(total, codes.sum(-1))
    slack = lost / scale + 2.0**-20 * 2**bits
    if symmetric:
        zero = torch.zeros_like(scale)
    else:
        exact = low_code - want.amin(-1).clamp(max=0) * clip[0] / scale
        assert ((zero - exact.clamp(low_code, high_code)).abs() <= 0.5 + slack).all()
    quotient = (want / scale.unsqueeze(-1) + zero.unsqueeze(-1)).clamp(low_code, high_code)
    assert ((codes - quotient).abs() <= 0.5 + slack.unsqueeze(-1)).all()


@pytest.mark.parametrize(("arch", "dtype"), _ARCHITECTURES, ids=str)
@pytest.mark.parametrize("n", _SIZES)
def test_hadamard(n, arch, dtype, on, make_x, assert_rotation_close):
    on(arch)
    transform, signs = factor_hadamard(n), _signs(n, dtype)
    for m, sign, inverse in ((1, None, False), (3, signs, False), (17, None, True), (3, signs, True), (0, None, False)):
        x = make_x((m, n), dtype)
        y = launch.hadamard(x, sign, transform, inverse)
        assert_rotation_close(y, x, reference.hadamard(x, transform, sign, inverse), roundoff=_ROUNDOFF[dtype])


@pytest.mark.parametrize("name", _LEADING)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_two_launches(dtype, name, on, make_x, assert_rotation_close):
    n, choice = _LEADING[name]
    on(choice=choice)
    orders = (choice.leading, *choice.left, choice.q, *choice.right)
    transform = HadamardTransform(n, tuple(order for order in orders if order > 1))
    signs = _signs(n, dtype)
    for m, sign, inverse in ((1, None, False), (5, signs, False), (2, signs, True)):
        x = make_x((m, n), dtype)
        y = launch.hadamard(x, sign, transform, inverse)
        want = reference.hadamard(x, transform, sign, inverse)
        assert_rotation_close(y, x, want, roundoff=_ROUNDOFF[dtype], launches=2)
        if not inverse:
            for bits, symmetric in ((8, True), (4, False)):
                got = launch.hadamard_quantize(x, sign, None, transform, bits, symmetric)
                _assert_quantized(got, x, want, bits, symmetric, launches=2)


def test_two_launches_in_blocks(on, make_x, assert_rotation_close):
    n, choice = _LEADING["leading-padded"]
    on(choice=choice)
    transform, signs = HadamardTransform(3 * n, (12, 20, 4)), _signs(3 * n, torch.float16)
    x = make_x((2, 3 * n), torch.float16)
    for inverse in (False, True):
        y = launch.hadamard(x, signs, transform, inverse)
        assert_rotation_close(y, x, reference.hadamard(x, transform, signs, inverse), launches=2)


def test_a_size_of_two_launches(make_x, assert_rotation_close):
    """29568 = 12 * 28 * 44 * 2, as the rules have it."""
    transform = factor_hadamard(29568)
    x = make_x((1, 29568), torch.float16)
    y = launch.hadamard(x, None, transform, False)
    back = launch.hadamard(y, None, transform, True)
    assert (back - x).norm() <= 4 * 2.0**-11 * x.norm()
    torch.testing.assert_close(
        y.float(), launch.hadamard_cpu.rotate(x, None, transform, False).float(), rtol=0, atol=4e-3
    )


@pytest.mark.parametrize(("arch", "dtype"), _ARCHITECTURES, ids=str)
@pytest.mark.parametrize("n", _SIZES)
def test_quantize(n, arch, dtype, on, make_x):
    on(arch)
    transform = factor_hadamard(n)
    launches = 1 if transform.blocks == 1 else 2
    for m, bits, symmetric in ((1, 8, True), (3, 8, False), (17, 4, False), (3, 4, True)):
        x = make_x((m, n), dtype)
        got = launch.hadamard_quantize(x, None, None, transform, bits, symmetric)
        _assert_quantized(got, x, reference.hadamard(x, transform), bits, symmetric, launches)
    codes, scale, zero, total = launch.hadamard_quantize(x[:0], None, None, transform, 8, False)
    assert codes.shape == (0, n)
    assert scale.shape == zero.shape == total.shape == (0,)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("n", [12, 64, 192, 188, 1040, 592])
def test_clipped(n, symmetric, on, make_x):
    """Several rows at once, one row, blocks, padded rows: values outside of the range get the codes of its ends."""
    on()
    transform, launches = factor_hadamard(n), 1 if factor_hadamard(n).blocks == 1 else 2
    for dtype, bits, clip in ((torch.float16, 4, (0.9, 0.3)), (torch.float32, 8, (0.2, 1.0))):
        x = make_x((3, n), dtype)
        got = launch.hadamard_quantize(x, None, None, transform, bits, symmetric, clip)
        _assert_quantized(got, x, reference.hadamard(x, transform), bits, symmetric, launches, clip)
        zeros = launch.hadamard_quantize(torch.zeros_like(x), None, None, transform, bits, symmetric, clip)
        assert not zeros[0].any()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", _LEADING)
def test_clipped_in_two_launches(name, symmetric, on, make_x):
    n, choice = _LEADING[name]
    on(choice=choice)
    orders = (choice.leading, *choice.left, choice.q, *choice.right)
    transform = HadamardTransform(n, tuple(order for order in orders if order > 1))
    x, clip = make_x((3, n), torch.float32), (0.3, 0.7)
    got = launch.hadamard_quantize(x, None, None, transform, 4, symmetric, clip)
    _assert_quantized(got, x, reference.hadamard(x, transform), 4, symmetric, launches=2, clip=clip)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("clip", [None, (0.9, 0.8)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("n", [64, 192, 1536, 592])
def test_fused_equals_unfused(n, clip, symmetric, on, make_x):
    """fp32: quantizing what `hadamard` returns gives the same scales to the bit, and the same codes but at ties."""
    on()
    transform, x = factor_hadamard(n), make_x((5, n), torch.float32)
    rotated = launch.hadamard(x, None, transform, False)
    for bits in (4, 8):
        codes, scale, zero, _ = launch.hadamard_quantize(x, None, None, transform, bits, symmetric, clip)
        want = launch.quantize_activations(rotated, bits, symmetric, None, 0.0, None, False, clip)
        assert torch.equal(scale, want[1])
        if not symmetric:
            assert torch.equal(zero, want[2])
        differ = codes != want[0]
        quotient = (rotated.double() / scale.double().unsqueeze(-1)).abs()
        assert ((quotient % 1 - 0.5).abs() <= 1e-4)[differ].all()
        # Symmetric codes reach 127.5 steps by construction, a tie in every row.
        assert differ.sum() <= (5 if symmetric else 0)


@pytest.mark.parametrize("n", [192, 960])
def test_pinned_values_are_the_same(n, on, make_x, monkeypatch):
    """What keeps Triton from moving arithmetic changes nothing; only compiled kernels take it."""
    on(80, choice=_LEADING["leading-padded"][1] if n == 960 else None)
    transform = HadamardTransform(n, (12, 20, 4)) if n == 960 else factor_hadamard(n)
    x, signs = make_x((1, n), torch.float32), _signs(n, torch.float32)
    want = launch.hadamard(x, signs, transform, False)
    monkeypatch.setattr(launch, "_PIN", True)
    assert torch.equal(launch.hadamard(x, signs, transform, False), want)


@pytest.mark.parametrize("n", [64, 192, 768, 1536])
def test_gate_and_signs(n, on, make_x):
    on(choice=_LEADING["leading"][1] if n == 1536 else None)
    transform = factor_hadamard(n)
    for dtype in (torch.float16, torch.float32):
        x, gate, signs = make_x((3, n), dtype), make_x((3, n), dtype, seed=2) * 3, _signs(n, dtype)
        gated = prepared(x, None, 0.0, gate)
        want = reference.hadamard(gated, transform, signs)
        # silu may round to the other side of a tie.
        got = launch.hadamard_quantize(x, signs, gate, transform, 8, False)
        _assert_quantized(got, gated, want, 8, False, launches=2)
        assert not torch.equal(got[0], launch.hadamard_quantize(x, None, gate, transform, 8, False)[0])


def test_extreme_gates(on, make_x):
    on()
    transform = factor_hadamard(64)
    gate = torch.tensor([-1e4, -100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 100.0] * 8, dtype=torch.float16)[None]
    x = make_x((1, 64), torch.float16)
    want = reference.hadamard(prepared(x, None, 0.0, gate), transform)
    _assert_quantized(launch.hadamard_quantize(x, None, gate, transform, 8, True), x, want, 8, True, launches=2)


@pytest.mark.parametrize("n", [64, 192, 1536, 592])
def test_tokens_of_zeros_and_of_one_sign(n, on):
    on()
    transform = factor_hadamard(n)
    zeros = torch.zeros(2, n, dtype=torch.float16)
    for symmetric in (True, False):
        codes, scale, zero, total = launch.hadamard_quantize(zeros, None, None, transform, 8, symmetric)
        assert torch.equal(scale, torch.ones(2))
        assert not codes.any()
        assert symmetric or not zero.any()
        assert not total.any()
    # What rotates to a single one: its range goes from 0 on, and the rest are exactly the zero-point.
    single = torch.zeros(1, n)
    single[0, 0] = 3.0
    x = launch.hadamard(single, None, transform, True).half()
    codes, _, zero, _ = launch.hadamard_quantize(x, None, None, transform, 4, False)
    assert codes[0, 0] == 7
    assert zero[0] <= -7


@pytest.mark.parametrize("n", [12, 192, 1040, 1152, 592])
def test_what_lies_beyond_a_row_never_counts(n, on, make_x):
    on()
    transform = factor_hadamard(n)
    beyond = torch.full((5, n), float("nan"), dtype=torch.float16)
    beyond[1:4] = make_x((3, n), torch.float16)
    x = beyond[1:4]
    assert torch.equal(launch.hadamard(x, None, transform, False), launch.hadamard(x.clone(), None, transform, False))
    got = launch.hadamard_quantize(x, None, None, transform, 8, False)
    want = launch.hadamard_quantize(x.clone(), None, None, transform, 8, False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n", [64, 192, 1536, 592])
def test_rows_do_not_depend_on_each_other(n, on, make_x):
    on()
    transform, x = factor_hadamard(n), make_x((19, n), torch.float16)
    whole = launch.hadamard_quantize(x, None, None, transform, 8, False)
    for rows in (slice(0, 1), slice(3, 19)):
        alone = launch.hadamard_quantize(x[rows], None, None, transform, 8, False)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, whole, strict=True))


def test_strided_and_batched(on, make_x, assert_rotation_close):
    """Per head: the last dimension of `[tokens, heads, head_dim]`."""
    on()
    transform = factor_hadamard(64)
    x = make_x((64, 3, 2), torch.float16).permute(2, 1, 0)
    y = launch.hadamard(x, None, transform, False)
    assert y.is_contiguous()
    assert_rotation_close(y, x, reference.hadamard(x, transform))
    codes, scale, zero, total = launch.hadamard_quantize(x, None, None, transform, 8, False)
    assert codes.shape == (2, 3, 64)
    assert scale.shape == zero.shape == total.shape == (2, 3)


def test_orders_without_tiles(on, make_x, assert_rotation_close):
    on()
    transform = factor_hadamard(300)
    x = make_x((3, 300), torch.float16)
    assert_rotation_close(launch.hadamard(x, None, transform, True), x, reference.hadamard(x, transform, inverse=True))
    got = launch.hadamard_quantize(x, None, None, transform, 8, True)
    _assert_quantized(got, x, reference.hadamard(x, transform), 8, True, launches=2)


def test_matrices_are_made_before_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"hadamard: the first rotation of a size .* before capturing"):
        launch.operand.__wrapped__((16,), (16,), False, torch.float16, SimpleNamespace(type="cuda"))


def test_operands():
    left = launch.operand((12,), (16,), False, torch.float16, torch.device("cpu"))
    assert left.shape == (16, 16)
    assert not left[12:].any()
    assert not left[:, 12:].any()
    assert torch.equal(launch.operand((12,), (16,), True, torch.float16, torch.device("cpu")), left.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [64, 188, 1536, 28672])
def test_prepared_rotations_make_no_matrices(n, dtype, make_x):
    transform, kept = factor_hadamard(n), (launch.operand, launch.hadamard_cpu._factor)
    launch._plans.clear()
    for function in kept:
        function.cache_clear()
    launch.prepare(transform, torch.device("cpu"), dtype)
    before = [function.cache_info().misses for function in kept]
    assert sum(before) > 0
    x, signs = make_x((2, n), dtype), torch.ones(n, dtype=dtype)
    for inverse in (False, True):
        for given in (None, signs):
            launch.hadamard(x, given, transform, inverse)
    launch.hadamard_quantize(x, signs, x, transform, 4, True)
    assert [function.cache_info().misses for function in kept] == before


def test_what_cannot_be_prepared():
    with pytest.raises(TypeError, match="transform"):
        prepare_hadamard(64, "cpu", torch.float16)
    with pytest.raises(TypeError, match="dtype"):
        prepare_hadamard(factor_hadamard(64), "cpu", torch.float64)
    prepare_hadamard(factor_hadamard(64), "cpu", torch.float16)
