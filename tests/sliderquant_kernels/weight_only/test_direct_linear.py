"""The short call for a weight that was checked before."""

import pytest
import torch

from sliderquant_kernels import WeightLayout, choose_layout, direct_linear, weight_only_linear
from sliderquant_kernels.cpu import native as cpu_native


@pytest.fixture(params=["vnni", "torch"], autouse=True)
def _route(request, monkeypatch):
    """With the compiled loop of AVX512-VNNI instructions, and as on machines that have none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    elif cpu_native.vnni(4) is None:
        pytest.skip("no AVX512-VNNI, or no C compiler, on this machine")


def _packed(bits: int, symmetric: bool, dtype: torch.dtype, n: int = 112, k: int = 128):
    torch.manual_seed(0)
    layout = choose_layout(bits, n, k, 64 if bits < 8 else None, symmetric, "cpu", dtype)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, layout.groups).add(0.1).to(dtype)
    zero_point = None if symmetric else torch.randint(0, 2**bits, (n, layout.groups), dtype=torch.uint8)
    return layout.pack(codes, scale, zero_point), layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_bits_as_the_op(bits, symmetric, dtype):
    packed, layout = _packed(bits, symmetric, dtype)
    bias = torch.randn(layout.n).to(dtype)
    for added in (None, bias):
        direct = direct_linear(packed, layout, added)
        for shape in ((128,), (1, 128), (2, 3, 128), (70, 128), (170, 128), (0, 128)):
            x = torch.randn(*shape).to(dtype)
            assert direct.fits(x)
            assert torch.equal(direct(x), weight_only_linear(x, packed, layout, added))
            assert direct(x).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_parts_are_the_columns_of_the_whole(bits, dtype):
    packed, layout = _packed(bits, False, dtype)
    bias, sizes = torch.randn(layout.n).to(dtype), (80, 5, 27)
    x = torch.randn(3, 40, 128).to(dtype)
    whole = weight_only_linear(x, packed, layout, bias)
    parts = direct_linear(packed, layout, bias).parts(x, sizes)
    assert [tuple(part.shape) for part in parts] == [(3, 40, size) for size in sizes]
    assert all(part.is_contiguous() for part in parts)
    error = (torch.cat(parts, -1).double() - whole.double()).norm() / whole.double().norm()
    assert error < {torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]


def test_what_does_not_fit():
    packed, layout = _packed(4, True, torch.bfloat16)
    direct = direct_linear(packed, layout)
    x = torch.randn(2, 128).bfloat16()
    assert direct.fits(x)
    assert not direct.fits(x.float())
    assert not direct.fits(x[:, :64])
    assert not direct.fits(x.to("meta"))
    assert not direct.fits(torch.nn.Parameter(x))
    with torch.enable_grad():
        assert not direct.fits(x.clone().requires_grad_())
    with torch.no_grad():
        assert direct.fits(x.clone().requires_grad_())


def test_tensors_of_another_layout_are_refused():
    packed, layout = _packed(4, True, torch.bfloat16)
    with pytest.raises(ValueError, match="weight: expected shape"):
        direct_linear(packed, WeightLayout(layout.kind, 4, 64, 128, 64, True))
    with pytest.raises(ValueError, match="bias: expected shape"):
        direct_linear(packed, layout, torch.zeros(3, dtype=torch.bfloat16))
