"""The ops on a CPU, for every layout that a CPU may be given."""

import os
import subprocess
import sys

import pytest
import torch

from sliderquant_kernels import WeightLayout, choose_layout, dequantize, reference, weight_only_linear
from sliderquant_kernels.cpu import int4 as cpu_int4
from sliderquant_kernels.cpu import native as cpu_native
from sliderquant_kernels.weight_only import cpu

# N, K, group size: multiples of every block, of 16 only (a short last block), and of nothing.
_SHAPES = [(128, 256, 128), (80, 192, 64), (48, 96, 32), (144, 160, None), (33, 77, None), (1, 32, 32)]
# On both sides of where the int4 and the int8 matmul give way to dequantization.
_TOKENS = (0, 1, 3, 17, cpu.MAX_INT8_TOKENS + 1, cpu_int4.max_op_tokens(), cpu_int4.max_op_tokens() + 1)


@pytest.fixture(params=["vnni", "torch"])
def route(request, monkeypatch):
    """With the compiled loop of AVX512-VNNI instructions, and as on machines that have none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    elif cpu_native.vnni(4) is None:
        pytest.skip("no AVX512-VNNI, or no C compiler, on this machine")


def _zero_rounding(x, weight, layout):
    """What rounding the container's zeros to bf16 may add: u |2^(b-1) - z| scale |sum of x over the group|."""
    if layout.kind != "cpu_int4" or weight.zero_point is None:
        return None
    zero = (2 ** (layout.bits - 1) - weight.zero_point.double()) * weight.scale.double()
    sums = x.double().unflatten(-1, (layout.groups, -1)).sum(-1)
    return 2.0**-8 * sums.abs() @ zero.abs().t()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weight_only_linear(dtype, bits, shape, symmetric, make_weight, make_x, assert_matmul_close):
    n, k, group_size = shape
    weight = make_weight(bits, n, k, group_size, symmetric, dtype)
    layout = choose_layout(bits, n, k, group_size, symmetric, "cpu", dtype)
    packed = layout.pack(*weight[:3])
    for m in _TOKENS:
        x = make_x((m, k), dtype)
        bias = make_x((n,), dtype, seed=2) if m % 2 else None
        y = weight_only_linear(x, packed, layout, bias)
        extra = _zero_rounding(x, weight, layout)
        assert_matmul_close(y, x, weight, bias, weights_rounded=True, extra=extra)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_container_rounds_no_weight(bits, make_weight, make_x, assert_matmul_close):
    """Symmetric weights, and asymmetric ones of 2 bits, lose nothing in the container: only the result is rounded."""
    if not cpu_int4.is_fast():
        pytest.skip("torch does not vectorize its int4 matmul here")
    x = make_x((3, 256), torch.bfloat16)
    for symmetric in (True, False) if bits == 2 else (True,):
        weight = make_weight(bits, 80, 256, 128, symmetric, torch.bfloat16)
        layout = WeightLayout("cpu_int4", bits, 80, 256, 128, symmetric)
        y = weight_only_linear(x, layout.pack(*weight[:3]), layout)
        assert_matmul_close(y, x, weight)


def test_the_container_is_in_use_where_torch_vectorizes_it(monkeypatch):
    """A new order of rows in torch would be served correctly by `cpu_bits`, and several times slower: notice it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch does not vectorize its int4 matmul here")
    assert cpu_int4.is_fast()
    monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    assert choose_layout(3, 64, 128, 128, False, "cpu", torch.bfloat16).kind == "cpu_int4"


@pytest.mark.usefixtures("route")
def test_error_of_rounded_zeros_in_the_container(make_weight, make_x):
    """W4 asymmetric on bf16: about as accurate as a dense bf16 weight, whose every element is rounded."""
    weight = make_weight(4, 512, 1024, 128, False, torch.bfloat16)
    layout = choose_layout(4, 512, 1024, 128, False, "cpu", torch.bfloat16)
    x = make_x((4, 1024), torch.bfloat16)
    want = reference.weight_only_linear(x, *weight)
    y = weight_only_linear(x, layout.pack(*weight[:3]), layout)
    dense = torch.nn.functional.linear(x, reference.dequantize(*weight).bfloat16())
    errors = [((t.double() - want).norm() / want.norm()).item() for t in (y, dense)]
    # 2^-8 / sqrt(3) is the root mean square of a rounding at worst; the zeros and the result are rounded once each.
    assert errors[0] <= 2.0**-8 * (2 / 3) ** 0.5
    assert errors[0] <= errors[1] * 1.5


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize(bits, shape, symmetric, make_weight):
    n, k, group_size = shape
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = make_weight(bits, n, k, group_size, symmetric, dtype)
        layout = choose_layout(bits, n, k, group_size, symmetric, "cpu", dtype)
        packed = layout.pack(*weight[:3])
        # The product of an integer and a 16-bit scale is exact in fp32, so one rounding is all: equality.
        assert torch.equal(dequantize(packed, layout, dtype), reference.dequantize(*weight).to(dtype))
        if dtype != torch.float32:
            assert torch.equal(dequantize(packed, layout, torch.float32), reference.dequantize(*weight).float())


@pytest.mark.parametrize("kind", ["cpu_int4", "cpu_bits", "cpu_int8"])
def test_chunks_of_large_weights_join(kind, make_weight, make_x, assert_matmul_close, monkeypatch):
    for module in (cpu, cpu_int4):
        monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 70 * 128)
    bits = 8 if kind == "cpu_int8" else 4
    group_size = None if kind == "cpu_int8" else 64
    weight = make_weight(bits, 208, 128, group_size, True, torch.bfloat16)
    layout = WeightLayout(kind, bits, 208, 128, group_size, True)
    packed = layout.pack(*weight[:3])
    x = make_x((64, 128), torch.bfloat16)
    assert_matmul_close(weight_only_linear(x, packed, layout), x, weight, weights_rounded=True)
    assert torch.equal(layout.unpack(packed)[0], weight.codes)
    assert torch.equal(dequantize(packed, layout, torch.float32), reference.dequantize(*weight).float())


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("kind", ["cpu_int4", "cpu_bits", "cpu_int8"])
def test_runs_are_bitwise_equal(kind, m, make_weight, make_x):
    bits, group_size = (8, None) if kind == "cpu_int8" else (3, 64)
    weight = make_weight(bits, 192, 256, group_size, True, torch.bfloat16)
    layout = WeightLayout(kind, bits, 192, 256, group_size, True)
    packed = layout.pack(*weight[:3])
    x = make_x((m, 256), torch.bfloat16)
    first = weight_only_linear(x, packed, layout)
    assert all(torch.equal(first, weight_only_linear(x, packed, layout)) for _ in range(3))


_OTHER_INSTRUCTION_SETS = """
import torch
from sliderquant_kernels import WeightLayout, choose_layout, dequantize, reference, weight_only_linear
from sliderquant_kernels.cpu import int4
print(torch.backends.cpu.get_cpu_capability(), int4.row_order())
for n in (16, 32, 48, 64, 112, 160):
    codes = torch.randint(0, 16, (n, 96), dtype=torch.uint8)
    scale = torch.rand(n, 3).add(0.1).bfloat16()
    zero_point = torch.randint(0, 16, (n, 3), dtype=torch.uint8)
    layout = WeightLayout("cpu_int4", 4, n, 96, 32, False)
    packed = layout.pack(codes, scale, zero_point)
    assert all(map(torch.equal, layout.unpack(packed), (codes, scale, zero_point)))
    want = reference.dequantize(codes, scale, zero_point, 4)
    assert torch.equal(dequantize(packed, layout, torch.float32).double(), want)
    for m in (1, 64):
        x = torch.randn(m, 96).bfloat16()
        y, z = weight_only_linear(x, packed, layout).double(), x.double() @ want.t()
        assert (y - z).norm() <= 2.0**-7 * z.norm(), (n, m)
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_row_orders_of_other_instruction_sets(capability):
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", _OTHER_INSTRUCTION_SETS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
