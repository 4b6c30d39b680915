import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import PackedWeight, WeightLayout, choose_layout
from sliderquant_kernels.cpu import native as cpu_native
from sliderquant_kernels.weight_only import bits as bitpack

_PATTERN = {
    torch.float16: (torch.int16, 0x7BFF),
    torch.bfloat16: (torch.int16, 0x7F7F),
    torch.float32: (torch.int32, 0x7F7FFFFF),
}


_NO_LAYOUT = ("cpu_dense", torch.bfloat16)


@st.composite
def packable(draw):
    """A layout of any kind with codes, scales and zero points that it must store exactly."""
    kind = draw(st.sampled_from(["triton", "cpu_bits", "cpu_dense", "cpu_int4", "cpu_int8", "cpu_vnni"]))
    bits = {"cpu_int4": st.sampled_from([2, 3, 4]), "cpu_int8": st.just(8)}.get(kind, st.sampled_from([2, 3, 4, 8]))
    bits = draw(bits)
    aligned = kind in ("cpu_int4", "cpu_int8", "cpu_vnni")
    n = draw(st.integers(1, 9)) * 16 if aligned and kind != "cpu_vnni" else draw(st.integers(1, 70))
    group_size = None if kind == "cpu_int8" else draw(st.sampled_from([32, 64, 128, None]))
    if group_size is not None:
        k = group_size * draw(st.integers(1, 3))
    else:
        k = draw(st.integers(1, 6)) * 32 if aligned else draw(st.integers(1, 200))
    symmetric = kind == "cpu_int8" or draw(st.booleans())
    layout = WeightLayout(kind, bits, n, k, group_size, symmetric)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    dtypes = [torch.bfloat16] if aligned else [dtype for dtype in _PATTERN if (kind, dtype) != _NO_LAYOUT]
    dtype = draw(st.sampled_from(dtypes))
    # Bit patterns rather than values, so that subnormal and huge scales occur; cpu_int4 holds scales up to max / 8, and
    # cpu_dense those whose product with a code is finite.
    integer, last = _PATTERN[dtype]
    if kind == "cpu_int4":
        last -= 3 << 7
    if kind == "cpu_dense":
        last -= 8 << (23 if dtype == torch.float32 else 10)
    scale = torch.randint(1, last + 1, (n, layout.groups), generator=generator).to(integer).view(dtype)
    zero_point = None
    if not symmetric:
        zero_point = torch.randint(0, 2**bits, (n, layout.groups), dtype=torch.uint8, generator=generator)
    return layout, codes, scale, zero_point


@settings(deadline=None, max_examples=150)
@given(packable())
def test_unpack_inverts_pack(case):
    layout, codes, scale, zero_point = case
    packed = layout.pack(codes, scale, zero_point)
    layout.check_packed(packed)
    got = layout.unpack(packed)
    assert torch.equal(got[0], codes)
    assert got[1].dtype == scale.dtype
    assert torch.equal(got[1], scale)
    assert (got[2] is None) == (zero_point is None)
    assert zero_point is None or torch.equal(got[2], zero_point)
    assert layout.bytes(scale.dtype) == sum(t.numel() * t.element_size() for t in packed if t is not None)


@settings(deadline=None, max_examples=50)
@given(packable())
def test_metadata_round_trip(case):
    layout = case[0]
    assert WeightLayout.from_metadata(layout.metadata()) == layout


def _plane_oracle(codes, bits):
    """One code at a time, in Python integers: what planar rows are defined to be."""
    rows = []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % 32)
        out = []
        low = 0
        for width in {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[bits]:
            values = [(code >> low) & (2**width - 1) for code in row]
            columns = len(row) * width // 8
            for j in range(columns):
                out.append(sum(value << (i * width) for i, value in enumerate(values[j::columns])))
            low += width
        rows.append(out)
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 32, 77])
def test_planar_rows_are_what_is_documented(bits, k, make_weight):
    codes = make_weight(bits, 5, k, None, True, torch.float32).codes
    packed = bitpack.pack_rows(codes, bits)
    assert torch.equal(packed, _plane_oracle(codes, bits))
    assert packed.shape[1] == bitpack.row_bytes(k, bits) == -(-k // 32) * 32 * bits // 8


@pytest.mark.parametrize(
    ("bits", "n", "k", "group_size", "symmetric", "device", "dtype", "kinds"),
    [
        (4, 64, 128, 128, True, "cuda", torch.bfloat16, {"triton"}),
        (4, 64, 128, 128, True, "cpu", torch.bfloat16, {"cpu_int4", "cpu_bits"}),
        (2, 64, 96, None, False, "cpu", torch.bfloat16, {"cpu_int4", "cpu_bits"}),
        (4, 65, 128, 128, True, "cpu", torch.bfloat16, {"cpu_bits"}),
        (4, 64, 33, None, True, "cpu", torch.bfloat16, {"cpu_bits"}),
        (4, 64, 128, 128, True, "cpu", torch.float32, {"cpu_dense"}),
        (4, 64, 128, 128, True, "cpu", torch.float16, {"cpu_dense"}),
        (8, 64, 128, None, True, "cpu", torch.bfloat16, {"cpu_int8", "cpu_bits"}),
        (8, 64, 128, None, False, "cpu", torch.bfloat16, {"cpu_bits"}),
        (8, 64, 100, None, True, "cpu", torch.bfloat16, {"cpu_bits"}),
        (8, 64, 128, 64, True, "cpu", torch.bfloat16, {"cpu_bits"}),
    ],
)
def test_choose_layout(bits, n, k, group_size, symmetric, device, dtype, kinds, monkeypatch):
    if cpu_native.vnni(4) is not None:
        layout = choose_layout(bits, n, k, group_size, symmetric, device, dtype)
        vnni = device == "cpu" and dtype == torch.bfloat16 and k % 32 == 0
        assert layout.kind == "cpu_vnni" if vnni else layout.kind in kinds
    monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    layout = choose_layout(bits, n, k, group_size, symmetric, torch.device(device), dtype)
    # Which of two depends on whether torch vectorizes its int4 and int8 matmuls on this machine.
    fast = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert layout.kind in kinds
    assert (layout.kind == "cpu_bits") == (kinds == {"cpu_bits"}) or not fast
    assert (layout.bits, layout.n, layout.k, layout.group_size, layout.symmetric) == (bits, n, k, group_size, symmetric)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_memory_is_really_packed(bits):
    layout = WeightLayout("triton", bits, 256, 1024, 128, True)
    assert layout.bytes() == 256 * 1024 * bits // 8 + 256 * 8 * 2


_GOOD = {"kind": "triton", "bits": 4, "n": 32, "k": 64, "group_size": 32, "symmetric": True, "version": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, r"version: expected 3 for kind 'triton', got 1; repack"),
        ({"kind": "marlin"}, r"kind: expected one of triton, .*, got 'marlin'"),
        ({"bits": 5}, r"bits: expected 2, 3, 4 or 8, got 5"),
        ({"group_size": 48}, r"group_size: expected 32, 64, 128 or None \(per channel\), got 48"),
        ({"group_size": 128}, r"k: expected a multiple of group_size=128, got 64"),
        ({"n": 0}, r"n: expected at least 1, got 0"),
        (
            {"kind": "cpu_int4", "n": 33, "version": 1},
            r"kind: 'cpu_int4' needs .* got bits=4, n=33, k=64; use choose_layout",
        ),
        (
            {"kind": "cpu_vnni", "k": 33, "group_size": None, "version": 1},
            r"kind: 'cpu_vnni' needs k a multiple of 32, got k=33; use choose_layout",
        ),
        (
            {"kind": "cpu_int8", "version": 1},
            r"kind: 'cpu_int8' needs 8 bits, per channel, symmetric, .* use choose_layout",
        ),
    ],
)
def test_bad_metadata_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WeightLayout.from_metadata(_GOOD | change)


def test_metadata_with_other_fields_is_refused():
    with pytest.raises(ValueError, match=r"metadata: expected the fields .*, got"):
        WeightLayout.from_metadata({**_GOOD, "act_order": True})
    with pytest.raises(ValueError, match=r"metadata: expected the fields"):
        WeightLayout.from_metadata({"kind": "triton"})


def test_choose_layout_refuses():
    with pytest.raises(TypeError, match=r"dtype: expected float16, bfloat16 or float32, got torch.float64"):
        choose_layout(4, 64, 64, None, True, "cpu", torch.float64)
    with pytest.raises(ValueError, match=r"device: expected cuda or cpu, got 'mps'; move the model"):
        choose_layout(4, 64, 64, None, True, "mps", torch.float16)
    with pytest.raises(ValueError, match=r"bits: expected"):
        choose_layout(6, 64, 64, None, True, "cpu", torch.float16)


def _pack_case(**change):
    weight = {
        "codes": torch.zeros(32, 64, dtype=torch.uint8),
        "scale": torch.ones(32, 2, dtype=torch.bfloat16),
        "zero_point": torch.zeros(32, 2, dtype=torch.uint8),
    }
    return {**weight, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(32, 64)}, TypeError, r"codes: expected dtype torch.uint8, got torch.float32"),
        (
            {"codes": torch.zeros(64, 32, dtype=torch.uint8)},
            ValueError,
            r"codes: expected shape \(32, 64\), got \(64, 32\)",
        ),
        (
            {"codes": torch.full((32, 64), 16, dtype=torch.uint8)},
            ValueError,
            r"codes: expected values in 0..15, got 16",
        ),
        ({"scale": torch.ones(32, 1)}, ValueError, r"scale: expected shape \(32, 2\), got \(32, 1\)"),
        ({"scale": torch.ones(32, 2).double()}, TypeError, r"scale: expected float16, bfloat16 or float32, got"),
        ({"scale": torch.zeros(32, 2)}, ValueError, r"scale: expected values above 0"),
        ({"scale": torch.full((32, 2), float("nan"))}, ValueError, r"scale: expected values above 0 .* or NaN"),
        ({"scale": torch.full((32, 2), float("inf"))}, ValueError, r"scale: expected values above 0"),
        ({"zero_point": None}, ValueError, r"zero_point: expected a tensor with symmetric=False, got None"),
        (
            {"zero_point": torch.full((32, 2), 99, dtype=torch.uint8)},
            ValueError,
            r"zero_point: expected values in 0..15",
        ),
        ({"zero_point": torch.zeros(32, 2)}, TypeError, r"zero_point: expected dtype torch.uint8, got torch.float32"),
    ],
)
def test_pack_refuses(change, error, message):
    layout = WeightLayout("triton", 4, 32, 64, 32, False)
    with pytest.raises(error, match=message):
        layout.pack(**_pack_case(**change))


def test_cpu_containers_refuse_other_scales():
    layout = WeightLayout("cpu_int4", 4, 32, 64, 32, False)
    with pytest.raises(TypeError, match=r"scale: kind 'cpu_int4' expects bfloat16, got torch.float32; pass the dtype"):
        layout.pack(**_pack_case(scale=torch.ones(32, 2)))
    huge = torch.full((32, 2), torch.finfo(torch.bfloat16).max / 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"scale: expected values above 0 and up to 4.2\de\+37"):
        layout.pack(**_pack_case(scale=huge))


def test_unpack_refuses_what_another_layout_packed():
    layout = WeightLayout("triton", 4, 32, 64, 32, False)
    packed = layout.pack(**_pack_case())
    other = WeightLayout("triton", 8, 32, 64, 32, False)
    with pytest.raises(
        ValueError, match=r"scale: expected shape \(2, 32, 2\) for this layout, got \(4, 32, 2\); pack with"
    ):
        other.unpack(packed)
    with pytest.raises(ValueError, match=r"zero_point: expected None for kind 'triton' .* got a tensor"):
        layout.unpack(PackedWeight(packed.weight, packed.scale, packed.weight))
    planar = WeightLayout("cpu_bits", 4, 32, 64, 32, False)
    with pytest.raises(ValueError, match=r"zero_point: expected a tensor .* got None"):
        planar.unpack(planar.pack(**_pack_case())._replace(zero_point=None))
