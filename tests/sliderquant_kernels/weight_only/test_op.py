"""What the ops promise whatever the device: validation, registration, tracing, gradients."""

import subprocess
import sys

import pytest
import torch

from sliderquant_kernels import PackedWeight, WeightLayout, choose_layout, dequantize, weight_only_linear
from sliderquant_kernels.common import checks

_KINDS = ["cpu_int4", "cpu_bits", "cpu_int8"]


@pytest.fixture(params=_KINDS)
def packed_weight(request, make_weight):
    """(packed, layout) `[48, 64]` of each CPU kind, bf16."""
    kind = request.param
    bits, group_size, symmetric = (8, None, True) if kind == "cpu_int8" else (4, 32, False)
    layout = WeightLayout(kind, bits, 48, 64, group_size, symmetric)
    return layout.pack(*make_weight(bits, 48, 64, group_size, symmetric, torch.bfloat16)[:3]), layout


def _fields(layout):
    return layout.kind, layout.bits, layout.n, layout.k, layout.group_size or 0, layout.symmetric


def test_opcheck(packed_weight, make_x):
    packed, layout = packed_weight
    ops = torch.ops.sliderquant_kernels
    for shape in ((64,), (1, 64), (2, 3, 64), (0, 64)):
        bias = make_x((48,), torch.bfloat16) if len(shape) == 2 else None
        residual = make_x((*shape[:-1], 48), torch.bfloat16, seed=3) if len(shape) == 3 else None
        operands = (make_x(shape, torch.bfloat16), *packed, bias, residual)
        torch.library.opcheck(ops.weight_only_linear.default, (*operands, *_fields(layout), "", False))
    torch.library.opcheck(ops.dequantize.default, (*packed, *_fields(layout)), {"dtype": torch.float32})


def test_shapes_and_strides_of_x(packed_weight, make_x):
    packed, layout = packed_weight
    x = make_x((64, 2, 3), torch.bfloat16).permute(2, 1, 0)
    y = weight_only_linear(x, packed, layout)
    assert y.shape == (3, 2, 48)
    assert y.is_contiguous()
    assert torch.equal(y.view(6, 48), weight_only_linear(x.reshape(6, 64), packed, layout))
    assert torch.equal(y[0, 0], weight_only_linear(x[:1, 0], packed, layout)[0])
    assert weight_only_linear(x[0, 0], packed, layout).shape == (48,)
    assert weight_only_linear(x[:0], packed, layout).shape == (0, 2, 48)


def test_compiles_without_graph_breaks(packed_weight, make_x):
    packed, layout = packed_weight
    bias = make_x((48,), torch.bfloat16)

    def function(x):
        return torch.relu(weight_only_linear(x * 2, packed, layout, bias)) + dequantize(packed, layout, x.dtype).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for m in (1, 3):
        x = make_x((m, 64), torch.bfloat16)
        assert torch.equal(compiled(x), function(x))


def test_compiles_with_inductor(make_weight, make_x):
    layout = choose_layout(4, 48, 64, 32, True, "cpu", torch.bfloat16)
    packed = layout.pack(*make_weight(4, 48, 64, 32, True, torch.bfloat16)[:3])
    compiled = torch.compile(lambda x: weight_only_linear(x, packed, layout) * 2, fullgraph=True)
    x = make_x((2, 64), torch.bfloat16)
    assert torch.equal(compiled(x), weight_only_linear(x, packed, layout) * 2)


def test_gradients_are_refused_when_asked_for(packed_weight, make_x):
    packed, layout = packed_weight
    x = make_x((2, 64), torch.bfloat16).requires_grad_()
    bias = torch.zeros(48, dtype=torch.bfloat16, requires_grad=True)
    for y in (weight_only_linear(x, packed, layout), weight_only_linear(x.detach(), packed, layout, bias)):
        with pytest.raises(
            NotImplementedError, match=r"for inference and have no backward; call them under torch.no_grad"
        ):
            y.sum().backward()
    scaled = PackedWeight(packed.weight, packed.scale.clone().requires_grad_(), packed.zero_point)
    with pytest.raises(NotImplementedError, match="have no backward"):
        dequantize(scaled, layout, torch.float32).sum().backward()
    with torch.no_grad():
        assert not weight_only_linear(x, packed, layout, bias).requires_grad
    with torch.inference_mode():
        weight_only_linear(x, packed, layout, bias)


def _x(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (_x(2, 63), None, ValueError, r"x: expected shape \[\.\.\., 64\], got \(2, 63\); check"),
        (_x(()), None, ValueError, r"x: expected shape \[\.\.\., 64\], got \(\)"),
        (
            _x(2, 64, dtype=torch.float64),
            None,
            TypeError,
            r"x: expected float16, bfloat16 or float32, got torch.float64",
        ),
        (
            _x(2, 64, dtype=torch.float16),
            None,
            TypeError,
            r"x: expected dtype torch.bfloat16 like scale, got torch.float16",
        ),
        (_x(2, 64), _x(47), ValueError, r"bias: expected shape \(48,\), got \(47,\)"),
        (_x(2, 64), _x(1, 48), ValueError, r"bias: expected shape \(48,\), got \(1, 48\)"),
        (
            _x(2, 64),
            _x(48, dtype=torch.float32),
            TypeError,
            r"bias: expected dtype torch.bfloat16 like x, got torch.float32",
        ),
        (_x(2, 64), _x(48, device="meta"), ValueError, r"bias: expected device cpu like x, got meta; move it"),
        (
            _x(2, 64, device="meta"),
            None,
            ValueError,
            r"x: expected device cpu like weight, got meta; move x, or unpack and",
        ),
    ],
)
def test_bad_x_and_bias_are_refused(packed_weight, x, bias, error, message):
    with pytest.raises(error, match=message):
        weight_only_linear(x, *packed_weight, bias)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (_x(2, 47), ValueError, r"residual: expected shape \(2, 48\) like the result, got \(2, 47\); expand"),
        (_x(48), ValueError, r"residual: expected shape \(2, 48\) like the result, got \(48,\)"),
        (
            _x(2, 48, dtype=torch.float32),
            TypeError,
            r"residual: expected dtype torch.bfloat16 like x, got torch.float32",
        ),
        (_x(2, 48, device="meta"), ValueError, r"residual: expected device cpu like x, got meta; move it"),
    ],
)
def test_bad_residual_is_refused(packed_weight, residual, error, message):
    with pytest.raises(error, match=message):
        weight_only_linear(_x(2, 64), *packed_weight, None, residual)


def test_variants_belong_to_cuda(packed_weight):
    with pytest.raises(ValueError, match=r"variant: expected one of warp_k, rows, dense on CUDA, got 'rows' for kind"):
        weight_only_linear(_x(2, 64), *packed_weight, variant="rows")


def test_residual_is_added(packed_weight, make_x):
    packed, layout = packed_weight
    x, bias, residual = (
        make_x(shape, torch.bfloat16, seed) for seed, shape in enumerate(((2, 3, 64), (48,), (2, 3, 48)))
    )
    kept = residual.clone()
    got = weight_only_linear(x, packed, layout, bias, residual)
    assert torch.equal(got, weight_only_linear(x, packed, layout, bias) + residual)
    assert torch.equal(residual, kept)


def test_batch_invariance(packed_weight, make_x):
    """A row has the same bits alone and among any others."""
    packed, layout = packed_weight
    x = make_x((70, 64), torch.bfloat16)
    whole = weight_only_linear(x, packed, layout, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70), slice(0, 70)):
        assert torch.equal(weight_only_linear(x[rows], packed, layout, batch_invariant=True), whole[rows])
    assert torch.equal(whole[5], weight_only_linear(x[5], packed, layout))


def _bits_weight(make_weight):
    layout = WeightLayout("cpu_bits", 4, 48, 64, 32, False)
    return layout.pack(*make_weight(4, 48, 64, 32, False, torch.bfloat16)[:3]), layout


@pytest.mark.parametrize(
    ("field", "change", "error", "message"),
    [
        (
            "weight",
            lambda t: t[:, :31],
            ValueError,
            r"weight: expected shape \(48, 32\) for this layout, got \(48, 31\)",
        ),
        ("weight", lambda t: t.view(torch.int8), TypeError, r"weight: expected dtype torch.uint8, got torch.int8"),
        ("weight", lambda t: t.t().contiguous().t(), ValueError, r"weight: expected a contiguous tensor, got strides"),
        ("scale", lambda t: t[:, :1], ValueError, r"scale: expected shape \(48, 2\) for this layout, got \(48, 1\)"),
        ("scale", lambda t: t.double(), TypeError, r"scale: expected dtype float16, bfloat16 or float32, got"),
        ("scale", lambda t: t.t().contiguous().t(), ValueError, r"scale: expected a contiguous tensor, got strides"),
        ("scale", lambda t: t.to("meta"), ValueError, r"scale: expected device cpu like weight, got meta; move"),
        ("zero_point", lambda t: None, ValueError, r"zero_point: expected a tensor for kind 'cpu_bits' .* got None"),
        (
            "zero_point",
            lambda t: t.bfloat16(),
            TypeError,
            r"zero_point: expected dtype torch.uint8, got torch.bfloat16",
        ),
        (
            "zero_point",
            lambda t: t[:1],
            ValueError,
            r"zero_point: expected shape \(48, 2\) for this layout, got \(1, 2\)",
        ),
    ],
)
def test_bad_packed_tensors_are_refused(field, change, error, message, make_weight):
    packed, layout = _bits_weight(make_weight)
    packed = packed._replace(**{field: change(getattr(packed, field))})
    with pytest.raises(error, match=message):
        weight_only_linear(_x(2, 64), packed, layout)
    with pytest.raises(error, match=message):
        dequantize(packed, layout, torch.bfloat16)


def test_layout_of_another_device_is_refused(make_weight):
    layout = choose_layout(4, 48, 64, 32, False, "cuda", torch.bfloat16)
    packed = layout.pack(*make_weight(4, 48, 64, 32, False, torch.bfloat16)[:3])
    message = (
        r"weight: kind 'triton' runs on cuda, got tensors on cpu; unpack, and repack for the device with choose_layout"
    )
    with pytest.raises(ValueError, match=message):
        weight_only_linear(_x(2, 64), packed, layout)
    with pytest.raises(ValueError, match=message):
        dequantize(packed, layout, torch.bfloat16)


def test_misaligned_weights_are_refused():
    """As the CUDA ops do; what they read 16 bytes at a time must start at such an address."""
    buffer = torch.zeros(64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16
    checks.check_alignment(weight=buffer[start:])
    with pytest.raises(
        ValueError, match=r"weight: expected an address that is a multiple of 16 bytes, got an offset of 3"
    ):
        checks.check_alignment(scale=buffer[start:], weight=buffer[start + 3 :])


def test_wrong_kinds_of_argument_are_refused(make_weight):
    packed, layout = _bits_weight(make_weight)
    with pytest.raises(TypeError, match=r"layout: expected a WeightLayout, got dict; use choose_layout"):
        weight_only_linear(_x(2, 64), packed, layout.metadata())
    with pytest.raises(TypeError, match=r"packed: expected a PackedWeight, got Tensor; use layout.pack"):
        weight_only_linear(_x(2, 64), packed.weight, layout)
    with pytest.raises(TypeError, match=r"dtype: expected float16, bfloat16 or float32, got torch.int8"):
        dequantize(packed, layout, torch.int8)
    fields = ("marlin", 4, 48, 64, 32, False)
    with pytest.raises(ValueError, match=r"kind: expected one of .* got 'marlin'"):
        torch.ops.sliderquant_kernels.weight_only_linear(_x(2, 64), *packed, None, None, *fields, "", False)


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, sliderquant_kernels as kernels
from sliderquant_kernels.weight_only import op
assert not [name for name in sys.modules if name.startswith("sliderquant.")]
layout = kernels.choose_layout(4, 32, 64, 32, True, "cpu", torch.bfloat16)
packed = layout.pack(torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2, dtype=torch.bfloat16))
assert (kernels.weight_only_linear(torch.ones(1, 64, dtype=torch.bfloat16), packed, layout) == -8 * 64).all()
try:
    op._triton()
except ImportError as error:
    assert "need the package triton" in str(error)
else:
    raise AssertionError("imported without triton")
"""


def test_works_without_triton():
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
