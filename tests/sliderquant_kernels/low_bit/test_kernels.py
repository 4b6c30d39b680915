"""The Triton code of low-bit linears and of quantizing activations, in the interpreter; its PTX, by emulation."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import LowBitLayout, QuantizedActivations, reference
from sliderquant_kernels.activations import kernels as quantizing
from sliderquant_kernels.activations import op as activations
from sliderquant_kernels.common.choices import Choice, Device
from sliderquant_kernels.low_bit import fragments as int8_fragments
from sliderquant_kernels.low_bit import launch
from sliderquant_kernels.low_bit import tiles as low_bit_tiles
from sliderquant_kernels.low_bit.kernels import plane_ptx
from sliderquant_kernels.low_bit.tiles import VARIANTS, choose_low_bit

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels were imported without TRITON_INTERPRET=1")

_CHOICES = {
    "warp_k": Choice("warp_k", 8, 1, 2, 2),
    "warp_k-wide": Choice("warp_k", 16, 2, 4, 2),
    "rows": Choice("rows", 16, 4, 4, 2),
    "rows-joined": Choice("rows", 16, 4, 4, 2),
    "tiles": Choice("tiles", 16, 2, 4, 2),
}
# N and K below, at and beyond a tile, an odd number of blocks along K, and a K that fills no block.
_SHAPES = [(33, 256, None), (17, 192, 64), (20, 96, 32), (5, 77, None), (40, 640, 128), (16, 320, None)]


def _activations(m, k, symmetric, seed=1):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    zero = None if symmetric else torch.randint(-128, 128, (m,), dtype=torch.int32, generator=generator)
    scale = torch.rand(m, generator=generator) * 0.02 + 0.001
    return QuantizedActivations(codes, scale, zero, codes.int().sum(1).int())


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _CHOICES)
def test_low_bit_linear(name, shape, monkeypatch, make_weight, make_x):
    n, k, group_size = shape
    if name == "tiles" and group_size is not None:
        with pytest.raises(ValueError, match="'tiles' has no groups"):
            choose_low_bit(600, n, k, 4, group_size, Device.typical(90), "tiles")
        return
    monkeypatch.setattr(launch, "choose_low_bit", lambda *_: _CHOICES[name])
    monkeypatch.setattr(launch, "device_of", lambda _: Device.typical(90 if name == "rows-joined" else 80))
    schemes = itertools.product((2, 4, 8), (True, False), (True, False))
    for index, (bits, symmetric, x_symmetric) in enumerate(schemes):
        if bits == 8 and group_size is not None and not symmetric:
            continue
        weight = make_weight(bits, n, k, group_size, symmetric, torch.float32)
        layout = LowBitLayout("triton_int8", bits, n, k, group_size, symmetric)
        packed = layout.pack(*weight[:3])
        m = (1, 3, 17)[index % 3]
        x = _activations(m, k, x_symmetric)
        bias = make_x((n,), torch.float32, 2) if index % 2 else None
        residual = make_x((m, n), torch.float32, 3) if index % 3 == 0 else None
        got = launch.low_bit_linear(*x, *packed, bias, residual, layout, torch.float32)
        exact = x.dequantize(torch.float64)
        want = reference.weight_only_linear(exact, *weight, bias, residual)
        # Sums are exact; each group's is scaled and added in fp32, in blocks of at least 32 inputs.
        parts = k // 32 + 4
        bound = 2.0**-23 * (parts * reference.magnitude(exact, *weight) + 4 * want.abs()) + 1e-30
        for addend in (bias, residual):
            bound += 0 if addend is None else 2.0**-22 * addend.abs()
        # The zero-point of the activations is taken off in fp32 after the groups have been added up.
        if not x_symmetric and group_size is not None:
            bound += 2.0**-22 * 300 * reference.magnitude(torch.ones_like(exact) * x.scale[:, None], *weight)
        assert ((got.double() - want).abs() <= bound).all(), (bits, symmetric, x_symmetric)


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("m", [0, 1, 20])
def test_what_the_rules_choose(m, variant, make_weight):
    weight = make_weight(4, 70, 256, None, True, torch.float32)
    layout = LowBitLayout("triton_int8", 4, 70, 256, None, True)
    x = _activations(m, 256, True)
    y = launch.low_bit_linear(*x, *layout.pack(*weight[:3]), None, None, layout, torch.float16, variant)
    assert y.shape == (m, 70)
    want = reference.weight_only_linear(x.dequantize(torch.float64), *weight)
    assert torch.allclose(y.double(), want, rtol=2e-3, atol=2e-3 * float(want.abs().max() if m else 1))


@pytest.mark.parametrize("name", ["warp_k", "rows"])
def test_a_token_of_zeros_gives_the_bias_exactly(name, monkeypatch, make_weight, make_x):
    n, k, group_size = 20, 128, 32
    monkeypatch.setattr(launch, "choose_low_bit", lambda *_: _CHOICES[name])
    layout = LowBitLayout("triton_int8", 4, n, k, group_size, False)
    packed = layout.pack(*make_weight(4, n, k, group_size, False, torch.float32)[:3])
    x, bias = make_x((3, k), torch.float16), make_x((n,), torch.float32, 2)
    x[1] = 0
    for bits in (4, 8):
        tokens = quantizing.quantize_activations(x, bits, False, None, 1e-6, None, False)
        got = launch.low_bit_linear(*tokens, *packed, bias, None, layout, torch.float32)
        assert torch.equal(got[1], bias)
        assert not torch.equal(got[0], bias)


@pytest.mark.parametrize("name", ["rows", "tiles"])
@pytest.mark.parametrize("block_m", [64, 128])
def test_tiles_that_are_stored_in_parts(name, block_m, monkeypatch, make_weight, make_x):
    """Each token's own scale, zero-point, sum and residual, whichever part of a tile it is in."""
    n, k, m = 40, 64, block_m + 37
    monkeypatch.setattr(launch, "choose_low_bit", lambda *_: Choice(name, block_m, 2, 4, 2))
    weight = make_weight(4, n, k, None, False, torch.float32)
    layout = LowBitLayout("triton_int8", 4, n, k, None, False)
    x = _activations(m, k, False)
    bias, residual = make_x((n,), torch.float32, 2), make_x((m, n), torch.float32, 3)
    got = launch.low_bit_linear(*x, *layout.pack(*weight[:3]), bias, residual, layout, torch.float32)
    want = reference.weight_only_linear(x.dequantize(torch.float64), *weight, bias, residual)
    torch.testing.assert_close(got.double(), want, rtol=2.0**-20, atol=2.0**-20)


def test_rows_that_are_not_copied_16_bytes_at_a_time_take_no_tiles():
    for arch in (90, 100):
        found = [choose_low_bit(4096, 4096, k, 4, None, Device.typical(arch)).variant for k in (4096, 4112, 4100)]
        assert found == ["tiles", "tiles", "rows"]


def test_where_weights_are_expanded():
    def variants(arch):
        found = [choose_low_bit(m, 4096, 4096, 4, None, Device.typical(arch)).variant for m in (17, 512, 4095, 4096)]
        return "".join(name[0] for name in found)

    assert variants(90) == "rrrt"
    assert variants(80) == variants(120) == "rrrr"


def test_few_tokens_and_rows_take_smaller_tiles():
    def tile(m, n):
        found = choose_low_bit(m, n, 4096, 4, None, Device.typical(90), "rows")
        return found.block_m, found.row_blocks

    assert [tile(m, 4096) for m in (32, 64, 128, 256, 2048)] == [(32, 4), (64, 4), (64, 4), (128, 8), (128, 8)]
    assert tile(128, 28672) == (128, 8)


def test_16_tokens_take_the_tallest_tile_that_leaves_multiprocessors_busy():
    def tile(n, m=16, group_size=None, arch=90):
        found = choose_low_bit(m, n, 4096, 4, group_size, Device.typical(arch))
        return found.row_blocks, found.num_warps, found.num_stages

    assert [tile(n) for n in (28672, 14336, 8192, 4096, 1024)] == [
        (8, 4, 3), (4, 4, 4), (4, 8, 4), (2, 8, 4), (1, 8, 4)
    ]  # fmt: skip
    assert tile(8192, arch=89)[2] == 3  # no room for more
    # Of those with more programs each reads x again.
    for n in range(16, 40000, 16 * 7):
        programs = -(-n // (16 * tile(n)[0]))
        assert programs >= min(0.75 * 132, n // 16)
        assert programs < 3 * 132 or tile(n)[0] == 8
    # In groups the loop has no registers for them; up to 8 tokens the reads go through the L1 cache.
    assert tile(28672, group_size=128) == (4, 4, 3)
    assert [tile(n, m=8) for n in (28672, 14336, 8192, 4096)] == [(4, 4, 4), (4, 4, 4), (2, 8, 4), (1, 8, 4)]


@pytest.mark.parametrize("bits", [2, 4])
def test_ptx_of_the_planes(bits):
    """Every byte beside every zero-point, four at a time: no code disturbs its neighbours."""
    stored = torch.arange(256).repeat(2**bits)
    zeros = torch.arange(2**bits).repeat_interleave(256)
    stored, zeros = (t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))].view(-1, 4) for t in
                     (stored, zeros))  # fmt: skip
    word = (stored << torch.tensor([0, 8, 16, 24])).sum(1)
    zero = (zeros << torch.tensor([0, 8, 16, 24])).sum(1)
    for i in range(8 // bits):
        code = stored >> (bits * i) & (2**bits - 1)
        assert torch.equal(_bytes(_run(plane_ptx(bits, i, False), word, zero)), code)
        assert torch.equal(_bytes(_run(plane_ptx(bits, i, True), word, zero)), code - zeros)


def _run(text, word, zero):
    """shr, and, sub, xor and lop3 on 32-bit registers."""
    registers = {"$1": word, "$2": zero}
    for statement in text.strip("{} ").split(";"):
        opcode, *operands = statement.replace(",", " ").split() or [".reg"]
        if opcode == ".reg":
            continue
        sources = [registers[o] if o in registers else torch.tensor(int(o, 0)) for o in operands[1:]]
        registers[operands[0]] = {
            "shr.u32": lambda a, b: a >> b,
            "and.b32": lambda a, b: a & b,
            "xor.b32": lambda a, b: a ^ b,
            "sub.u32": lambda a, b: (a - b) & 0xFFFFFFFF,
            "lop3.b32": lambda a, b, c, table: (a & b) | c,
        }[opcode](*sources)
    return registers["$0"]


def _bytes(word):
    parts = (word[:, None] >> torch.tensor([0, 8, 16, 24])) & 255
    return parts - (parts >> 7) * 256


@pytest.mark.parametrize("mode", ["plain", "clipped", "norm", "gate"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_activations(bits, symmetric, mode, make_x):
    """The same bits as plain torch wherever fp32 sums are not involved; elsewhere scales within fp32's rounding."""
    for dtype, k in ((torch.float16, 77), (torch.float32, 300), (torch.float16, 1), (torch.float32, 128)):
        x = make_x((3, k), dtype) * 3 + 0.5
        x[1] = 0
        weight = make_x((k,), dtype, 2) if mode == "norm" else None
        gate = make_x((3, k), dtype, 3) if mode == "gate" else None
        packed, clip = bits == 4 and k % 2 == 0, (0.93, 0.41) if mode == "clipped" else None
        got = quantizing.quantize_activations(x, bits, symmetric, weight, 1e-6, gate, packed, clip)
        want = torch.ops.sliderquant_kernels.quantize_activations(x, bits, symmetric, weight, 1e-6, gate, packed, clip)
        exact = mode in ("plain", "clipped") or dtype == torch.float16
        assert ((got[1] - want[1]).abs() <= want[1] * (0 if exact else 2.0**-21)).all()
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[3], want[3])
        assert symmetric or torch.equal(got[2], want[2])
    empty = quantizing.quantize_activations(make_x((0, 8), torch.float16), bits, symmetric, None, 1e-6, None, False)
    assert empty[0].shape == (0, 8)


def test_corrected_reciprocals_divide_exactly():
    """What the compiled kernel does instead of a division, with its fused multiply-adds in fp64: every code equals that
    of the division, also where the quotient lies beside the middle of two codes."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-40, 15):
        scale = torch.rand((), generator=generator).add(0.5) * 2.0**exponent
        steps = torch.randint(-128, 128, (20_000,), generator=generator) + 0.5 * torch.randint(0, 2, (20_000,))
        x = (steps.double() * scale.double()).float()
        x = (x.view(torch.int32) + torch.randint(-3, 4, x.shape, generator=generator, dtype=torch.int32)).view(x.dtype)
        reciprocal = 1 / scale
        near = x * reciprocal
        error = (x.double() - near.double() * scale.double()).float()
        quotient = (error.double() * reciprocal.double() + near.double()).float()
        normal = x.abs() > 1e-37
        assert torch.equal(quotient.round()[normal], (x / scale).round()[normal])


def test_expanded_weights_are_the_codes(make_weight):
    for bits in (2, 4, 8):
        codes = make_weight(bits, 37, 150, None, True, torch.float32).codes
        layout = LowBitLayout("triton_int8", bits, 37, 150, None, True)
        expanded = launch.expand(int8_fragments.pack_codes(codes, bits), layout)
        assert torch.equal(expanded.int() + int8_fragments.shift(bits), codes.int())


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.5]])  # its scale is 1
    got = quantizing.quantize_activations(x, 8, True, None, 1e-6, None, False)
    assert activations.quantize(x, 8, True)[0].tolist() == got[0].tolist()
    assert got[0].tolist() == [[0, 2, 2, 0, -2, 127]]


def test_tiles_where_their_product_is_the_widest(monkeypatch):
    found = []
    for release in ((3, 6), (3, 8)):
        monkeypatch.setattr(low_bit_tiles, "triton_release", lambda release=release: release)
        for arch in (90, 100):
            choice = choose_low_bit.__wrapped__(4096, 28672, 4096, 4, None, Device.typical(arch))
            found.append((choice.variant, choice.block_m))
    assert found == [("tiles", 128), ("rows", 128), ("tiles", 128), ("tiles", 128)]


def test_values_a_thread():
    found = {k: quantizing.quantize_options(k)["num_warps"] for k in (64, 4096, 16384, 16385, 32768)}
    assert found == {64: 1, 4096: 4, 16384: 16, 16385: 8, 32768: 8}


GUARDED = """
import ctypes, mmap
import torch
from sliderquant_kernels import LowBitLayout
from sliderquant_kernels.common.choices import Choice, Device
from sliderquant_kernels.low_bit import launch

kept = []

def at_the_end_of_memory(tensor):
    used = tensor.numel() * tensor.element_size()
    size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - used)
    return place.copy_(tensor.flatten()).view(tensor.shape)

n, k, m = 16, 320, 3
codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
layout = LowBitLayout("triton_int8", 4, n, k, None, True)
weight, scale, constants = layout.pack(codes, torch.ones(n, 1))
x = torch.randint(-8, 8, (m, k), dtype=torch.int8)
want = x.double() @ (codes.double() - 8).T
for arch in (80, 90):
    launch.device_of = lambda _: Device.typical(arch)
    launch.choose_low_bit = lambda *_: Choice("rows", 16, 4, 4, 2)
    got = launch.low_bit_linear(at_the_end_of_memory(x), torch.ones(m), None, x.int().sum(1).int(),
                                at_the_end_of_memory(weight), scale, constants, None, None, layout, torch.float32)
    assert torch.equal(got.double(), want), arch
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_is_read_beyond_the_weight_and_the_tokens():
    """5 blocks along K, of which a step takes 2."""
    done = subprocess.run([sys.executable, "-c", GUARDED], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
