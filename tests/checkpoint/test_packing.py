"""The stored tensors against a bit stream written out with numpy."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant.checkpoint import packing
from sliderquant.checkpoint.packing import pack, stored_shapes, unpack
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, round_to_nearest
from sliderquant.schemes import Scheme

BITS = (2, 3, 4, 8)


def oracle(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] -> int32 [rows, ceil(n * bits / 32)]: code i of a row starts at bit i * bits, low bit first."""
    rows, count = codes.shape
    stream = ((codes[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, count * bits)
    padded = np.pad(stream, ((0, 0), (0, -count * bits % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def random_weight(scheme: Scheme, out: int, inputs: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(inputs)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, scheme.levels + 1, shape, generator=generator, dtype=torch.uint8)

    zero_point = None if scheme.symmetric else codes(out, groups)
    return QuantizedWeight(codes(out, inputs), torch.rand(out, groups, generator=generator).bfloat16(), zero_point)


def check(scheme: Scheme, out: int, inputs: int, seed: int) -> None:
    weight = random_weight(scheme, out, inputs, seed)
    parts = pack(weight, scheme)
    assert {name: tuple(part.shape) for name, part in parts.items()} == stored_shapes(scheme, out, inputs)
    assert parts["weight_packed"].dtype == torch.int32
    np.testing.assert_array_equal(parts["weight_packed"].numpy(), oracle(weight.codes.numpy(), scheme.bits))
    assert parts["weight_shape"].tolist() == [out, inputs]
    assert parts["weight_shape"].dtype == torch.int64
    if weight.zero_point is not None:
        expected = oracle(weight.zero_point.numpy().T.copy(), scheme.bits).T
        assert parts["weight_zero_point"].dtype == torch.int32
        np.testing.assert_array_equal(parts["weight_zero_point"].numpy(), expected)
    check_unpacked(parts, weight, scheme)


def check_unpacked(parts: dict[str, torch.Tensor], weight: QuantizedWeight, scheme: Scheme) -> None:
    assert all(part.is_contiguous() for part in parts.values())
    for name, before, after in zip(QuantizedWeight._fields, weight, unpack(parts, scheme), strict=True):
        assert (before is None) == (after is None), name
        if before is not None:
            assert after.dtype == before.dtype, name
            assert torch.equal(after, before), name


@settings(deadline=None, max_examples=150)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    out=st.integers(1, 70),
    inputs=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
def test_per_channel(bits: int, symmetric: bool, out: int, inputs: int, seed: int) -> None:
    check(Scheme(bits, None, symmetric), out, inputs, seed)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    out=st.integers(1, 70),
    groups=st.integers(1, 5),
    size=st.sampled_from((32, 64, 128)),
    seed=st.integers(0, 2**31),
)
def test_grouped(bits: int, symmetric: bool, out: int, groups: int, size: int, seed: int) -> None:
    check(Scheme(bits, size, symmetric), out, groups * size, seed)


@settings(deadline=None, max_examples=50)
@given(out=st.integers(1, 70), inputs=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_int8(out: int, inputs: int, seed: int) -> None:
    scheme = Scheme.parse("W8A8-sym-act-sym")
    weight = random_weight(scheme, out, inputs, seed)
    parts = pack(weight, scheme)
    assert {name: tuple(part.shape) for name, part in parts.items()} == stored_shapes(scheme, out, inputs)
    assert parts["weight"].dtype == torch.int8
    np.testing.assert_array_equal(parts["weight"].numpy(), weight.codes.numpy().astype(np.int16) - 128)
    check_unpacked(parts, weight, scheme)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", BITS)
def test_int8_of_other_tools(bits: int, group_size: int | None, symmetric: bool) -> None:
    """Any scheme may be stored so; compressed-tensors' own compressor is the reference."""
    scheme = Scheme(bits, group_size, symmetric)
    weight = random_weight(scheme, 7, 96, seed=3)
    least = -(2 ** (bits - 1))
    parts = {"weight": (weight.codes.short() + least).to(torch.int8), "weight_scale": weight.scale}
    if weight.zero_point is not None:
        parts["weight_zero_point"] = (weight.zero_point.short() + least).to(torch.int8)
    found = unpack(parts, scheme)
    check_unpacked(parts, weight, scheme)
    assert {name: tuple(part.shape) for name, part in parts.items()} == stored_shapes(scheme, 7, 96, "int-quantized")
    theirs = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="channel" if group_size is None else "group",
            group_size=group_size,
        ),
    )  # fmt: skip
    dense = IntQuantizationCompressor.decompress({**parts, "weight_scale": weight.scale.float()}, theirs)["weight"]
    assert torch.equal(dense, dequantize(QuantizedWeight(found.codes, found.scale.float(), found.zero_point), scheme))


@pytest.mark.parametrize(("part", "value"), [("weight", 8), ("weight", -9), ("weight_zero_point", 8)])
def test_an_int8_that_is_no_code(part: str, value: int) -> None:
    parts = {
        "weight": torch.zeros(4, 8, dtype=torch.int8),
        "weight_scale": torch.ones(4, 1),
        "weight_zero_point": torch.zeros(4, 1, dtype=torch.int8),
    }
    unpack(parts, Scheme(4))
    parts[part][1, 0] = value
    with pytest.raises(ValueError, match=rf"{part} holds a value outside of -8 .. 7, the codes of W4A16"):
        unpack(parts, Scheme(4))


@pytest.mark.parametrize("bits", BITS)
def test_large_weights_are_packed_by_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CODES_AT_A_TIME", 1000)
    check(Scheme(bits), 23, 99, seed=1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [96, 99])
def test_codes_can_be_unpacked_into_a_tensor(bits: int, inputs: int) -> None:
    weight = random_weight(Scheme(bits), 23, inputs, seed=2)
    whole = torch.full((40, inputs), 255, dtype=torch.uint8)
    codes = unpack(pack(weight, Scheme(bits)), Scheme(bits), whole[8:31]).codes
    assert codes.data_ptr() == whole[8:].data_ptr()
    assert torch.equal(whole[8:31], weight.codes)
    assert (whole[:8] == 255).all()
    assert (whole[31:] == 255).all()


def test_a_zero_point_of_one_word_has_strides_of_its_own():
    """`contiguous` leaves those of a single row as they are, and safetensors refuses them."""
    scheme = Scheme.parse("W4A16")
    packed = pack(round_to_nearest(torch.randn(8, 32), scheme, torch.float32), scheme)["weight_zero_point"]
    assert (packed.shape, packed.stride()) == ((1, 1), (1, 1))
