"""Calls that skip torch's dispatcher: the same results, the same errors, and never where something would see the op.

Tensors on the CPU stand for those on CUDA, and the kernels are interpreted.
"""

from operator import attrgetter

import pytest
import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from sliderquant_kernels import (
    LowBitLayout,
    PackedWeight,
    QuantizedActivations,
    WeightLayout,
    dequantize,
    direct_linear,
    direct_low_bit_linear,
    factor_hadamard,
    hadamard,
    hadamard_quantize,
    low_bit_linear,
    quantize_activations,
    weight_only_linear,
)
from sliderquant_kernels.activations import kernels as activations_triton
from sliderquant_kernels.activations import op as activations
from sliderquant_kernels.common import devices
from sliderquant_kernels.common.launching import INTERPRETED
from sliderquant_kernels.cpu.vnni import Rounding
from sliderquant_kernels.low_bit import launch as low_bit_launch
from sliderquant_kernels.low_bit import op as low_bit
from sliderquant_kernels.rotation import launch as hadamard_launch
from sliderquant_kernels.rotation import op as hadamard_ops
from sliderquant_kernels.weight_only import launch as weight_only_triton
from sliderquant_kernels.weight_only import op as weight_only

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")
N, K = 32, 128


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    monkeypatch.setattr(devices, "on_gpu", attrgetter("is_cpu"))
    for kind in (WeightLayout, LowBitLayout):
        monkeypatch.setattr(kind, "device_type", property(lambda self: "cpu"))


@pytest.fixture
def ops(monkeypatch):
    """Counts the calls of each op; they compute nothing."""
    called = []

    def stand_in(name, result):
        def op(*arguments, **keywords):
            called.append(name)
            return result

        return op

    y, four = torch.zeros(1), (torch.zeros(1),) * 4
    monkeypatch.setattr(weight_only, "_linear_op", stand_in("weight_only_linear", y))
    monkeypatch.setattr(weight_only, "_dequantize_op", stand_in("dequantize", y))
    monkeypatch.setattr(low_bit, "_op", stand_in("low_bit_linear", y))
    monkeypatch.setattr(activations, "_op", stand_in("quantize_activations", four))
    monkeypatch.setattr(hadamard_ops, "_hadamard_op", stand_in("hadamard", y))
    monkeypatch.setattr(hadamard_ops, "_quantize_op", stand_in("hadamard_quantize", four))
    return called


@pytest.fixture
def weight(make_weight):
    layout = WeightLayout("triton", 4, N, K, 32, False)
    return layout.pack(*make_weight(4, N, K, 32, False, torch.float16)[:3]), layout


@pytest.fixture
def low(make_weight):
    layout = LowBitLayout("triton_int8", 4, N, K, None, True)
    return layout.pack(*make_weight(4, N, K, None, True, torch.float16)[:3]), layout


def _calls(x, weight, low):
    """Every op, by name."""
    transform = factor_hadamard(K)
    plain = x.detach().as_subclass(torch.Tensor)
    found = activations_triton.quantize_activations(plain, 8, True, None, 0.0, None, False)
    tokens = QuantizedActivations(*found)
    return {
        "weight_only_linear": lambda: weight_only_linear(x, *weight),
        "dequantize": lambda: dequantize(*weight, x.dtype),
        "low_bit_linear": lambda: low_bit_linear(tokens, *low, x.dtype),
        "quantize_activations": lambda: quantize_activations(x),
        "hadamard": lambda: hadamard(x, transform),
        "hadamard_quantize": lambda: hadamard_quantize(x, transform),
    }


def test_no_op_is_called_where_nothing_watches(ops, weight, low, make_x):
    for call in _calls(make_x((3, K), torch.float16), weight, low).values():
        call()
    with torch.inference_mode():
        for call in _calls(make_x((3, K), torch.float16), weight, low).values():
            call()
    with torch.no_grad():
        for call in _calls(Parameter(make_x((3, K), torch.float16)), weight, low).values():
            call()
    assert ops == []


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Compiling:
    def __enter__(self):
        self.kept, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True

    def __exit__(self, *_):
        torch.compiler.is_compiling = self.kept


@pytest.mark.parametrize("watcher", [_Dispatch, _Function, _Compiling, torch.profiler.profile])
def test_what_watches_sees_the_ops(ops, weight, low, make_x, watcher):
    calls = _calls(make_x((3, K), torch.float16), weight, low)
    direct, rounded = direct_linear(*weight), direct_low_bit_linear(*low, torch.float16, None, Rounding(4, True, None))
    x = make_x((3, K), torch.float16)
    with watcher():
        for call in calls.values():
            call()
        assert not direct.fits(x)
        assert not rounded.fits(x)
    assert ops == list(calls)
    assert direct.fits(x)
    assert rounded.fits(x)


def test_tracers_and_transforms_see_the_ops(ops, weight, low, make_x):
    x = make_x((3, K), torch.float16)
    torch.jit.trace(lambda x: x * (1 if weight_only_linear(x, *weight) is not None else 0), x, check_trace=False)
    torch.func.vmap(lambda x: x * (1 if weight_only_linear(x, *weight) is not None else 0))(x)
    assert ops == ["weight_only_linear"] * 2


class _Subclass(torch.Tensor):
    pass


def test_subclasses_and_gradients_see_the_ops(ops, weight, low, make_x):
    for x in (make_x((3, K), torch.float16).as_subclass(_Subclass), make_x((3, K), torch.float16).requires_grad_()):
        ops.clear()
        calls = _calls(x, weight, low)
        for call in calls.values():
            call()
        assert ops == [name for name in calls if name not in ("dequantize", "low_bit_linear")]
    ops.clear()
    x, bias = make_x((3, K), torch.float16), torch.zeros(N, dtype=torch.float16, requires_grad=True)
    weight_only_linear(x, *weight, bias)
    assert ops == ["weight_only_linear"]
    assert not direct_linear(*weight, bias).fits(x)
    with torch.no_grad():
        assert direct_linear(*weight, bias).fits(x)


def test_numbers_of_other_types_are_left_to_the_ops(ops, make_x):
    x = make_x((3, K), torch.float16)
    quantize_activations(x, 8.0)
    hadamard_quantize(x, factor_hadamard(K), True)
    quantize_activations(x, 8, 1)
    assert ops == ["quantize_activations", "hadamard_quantize", "quantize_activations"]


def test_the_same_results_as_the_launches(weight, low, make_x):
    x, bias, residual = (make_x(shape, torch.float16) for shape in ((2, 3, K), (N,), (2, 3, N)))
    (packed, layout), (low_packed, low_layout) = weight, low
    want = weight_only_triton.weight_only_linear(x, packed.weight, packed.scale, bias, residual, layout)
    assert torch.equal(weight_only_linear(x, packed, layout, bias, residual), want)
    strided = make_x((N, 2), torch.float16)[:, 0]
    want = weight_only_linear(x, packed, layout, strided)
    direct = direct_linear(packed, layout, strided)
    assert direct.fits(x)
    for _ in range(2):
        assert torch.equal(direct(x), want)
    strided.add_(1)  # it is not a copy that was made before
    assert torch.equal(direct(x), weight_only_linear(x, packed, layout, strided))
    for sizes in ((16, 16), (5, 27)):
        parts = direct.parts(x, sizes)
        assert torch.equal(torch.cat(list(parts), -1), direct(x))
        assert [part.shape[-1] for part in parts] == list(sizes)
    assert torch.equal(
        dequantize(packed, layout, torch.float32),
        weight_only_triton.dequantize(packed.weight, packed.scale, layout, torch.float32),
    )
    for bits, symmetric, clip in ((4, True, None), (8, False, (0.5, 1))):
        found = quantize_activations(x, bits, symmetric, clip=clip)
        filled = activations._on_cuda(x, bits, symmetric, None, 1e-6, None, False, clip)
        for got, other in zip(found, filled, strict=True):
            assert got is None or torch.equal(got, other)
        assert (found.zero_point is None) == symmetric
        direct = direct_low_bit_linear(low_packed, low_layout, x.dtype, bias, Rounding(bits, symmetric, clip))
        want = low_bit_linear(found, low_packed, low_layout, x.dtype, bias)
        assert torch.equal(want, low_bit_launch.low_bit_linear(*found, *low_packed, bias, None, low_layout, x.dtype))
        assert direct.fits(x)
        assert torch.equal(direct(x), want)
        assert torch.equal(torch.cat(list(direct.parts(x, (20, 12))), -1), want)
    transform = factor_hadamard(K)
    assert torch.equal(hadamard(x, transform), hadamard_launch.hadamard(x, None, transform, False))


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 0, K)])
def test_any_number_of_dimensions(weight, low, shape, make_x):
    x = make_x(shape, torch.float16)
    tokens = shape[:-1]
    assert weight_only_linear(x, *weight).shape == (*tokens, N)
    for found in (quantize_activations(x, 4, False), hadamard_quantize(x, factor_hadamard(K), 4, False)):
        assert found.codes.shape == shape
        assert found.scale.shape == found.zero_point.shape == found.token_sum.shape == tokens
        assert low_bit_linear(found, *low, x.dtype).shape == (*tokens, N)
    assert hadamard(x, factor_hadamard(K)).shape == shape
    assert direct_linear(*weight)(x).shape == (*tokens, N)


def test_strided_inputs(weight, low, make_x):
    wide = make_x((4, 2 * K), torch.float16)
    x, dense = wide[:, ::2], wide[:, ::2].contiguous()
    transform = factor_hadamard(K)
    assert torch.equal(weight_only_linear(x, *weight), weight_only_linear(dense, *weight))
    assert torch.equal(hadamard(x, transform), hadamard(dense, transform))
    for got, want in zip(quantize_activations(x, 4, False), quantize_activations(dense, 4, False), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()
    found = quantize_activations(dense, 4)
    odd = QuantizedActivations(found.codes.t().contiguous().t(), found.scale.repeat_interleave(2)[::2], None,
                               found.token_sum.repeat_interleave(2)[::2])  # fmt: skip
    assert torch.equal(low_bit_linear(odd, *low, x.dtype), low_bit_linear(found, *low, x.dtype))


def test_what_does_not_fit(weight, low, make_x):
    x = make_x((2, K), torch.float16)
    for direct in (
        direct_linear(*weight),
        direct_low_bit_linear(*low, torch.float16, None, Rounding(4, True, None)),
    ):
        assert direct.fits(x)
        for other in (x.float(), x[:, :64], x.to("meta"), Parameter(x), torch.tensor(1.0, dtype=torch.float16)):
            assert not direct.fits(other)
        assert not direct.fits(x.clone().requires_grad_())


def test_tensors_of_another_layout_are_refused(weight, low):
    (packed, layout), (low_packed, low_layout) = weight, low
    with pytest.raises(ValueError, match="weight: expected shape"):
        direct_linear(packed, WeightLayout("triton", 4, 64, K, 32, False))
    with pytest.raises(ValueError, match="bias: expected shape"):
        direct_linear(packed, layout, torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="multiple of 16"):
        direct_linear(packed._replace(weight=_shifted(packed.weight)), layout)
    rounding = Rounding(4, True, None)
    with pytest.raises(ValueError, match="weight: expected shape"):
        direct_low_bit_linear(
            low_packed, LowBitLayout("triton_int8", 4, 64, K, None, True), torch.float16, None, rounding
        )
    with pytest.raises(ValueError, match="bias"):
        direct_low_bit_linear(low_packed, low_layout, torch.float16, torch.zeros(3), rounding)
    with pytest.raises(TypeError, match="dtype"):
        direct_low_bit_linear(low_packed, low_layout, torch.float64, None, rounding)
    with pytest.raises(ValueError, match="bits"):
        direct_low_bit_linear(low_packed, low_layout, torch.float16, None, Rounding(3, True, None))
    with pytest.raises(ValueError, match="multiple of 16"):
        direct_low_bit_linear(
            low_packed._replace(weight=_shifted(low_packed.weight)), low_layout, torch.float16, None, rounding
        )


def _shifted(tensor):
    """The same values at an address that is no multiple of 16."""
    out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return out.copy_(tensor)


def _message(call, *errors):
    with pytest.raises(errors) as found:
        call()
    return type(found.value), str(found.value).replace("meta", "cpu")


_HALF = torch.float16


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 64, dtype=_HALF)}, {"x": torch.zeros(2, K)}, {"x": torch.zeros(2, K, dtype=torch.float64)},
        {"x": torch.tensor(1.0, dtype=_HALF)}, {"bias": torch.zeros(N + 1, dtype=_HALF)}, {"bias": torch.zeros(N)},
        {"residual": torch.zeros(3, N, dtype=_HALF)}, {"residual": torch.zeros(2, N)},
        {"weight": torch.zeros(1, dtype=torch.uint8)}, {"scale": torch.zeros(1, dtype=_HALF)},
        {"zero_point": torch.zeros(1, dtype=torch.uint8)}, {"weight": "int8"}, {"scale": "strided"},
    ],
    ids=lambda change: "-".join(f"{name}{getattr(value, 'shape', value)}" for name, value in change.items()),
)  # fmt: skip
def test_the_errors_are_those_of_the_op(change, weight):
    """The op on meta tensors, which share its checks, says the same."""
    (packed, layout) = weight
    given = {"x": torch.zeros(2, K, dtype=_HALF), "bias": None, "residual": None, **packed._asdict()}
    given |= change
    if change.get("weight") == "int8":
        given["weight"] = packed.weight.view(torch.int8)
    if change.get("scale") == "strided":
        given["scale"] = packed.scale

    def call(device):
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}
        if change.get("scale") == "strided":
            moved["scale"] = moved["scale"].repeat(*[1] * (packed.scale.ndim - 1), 2)[..., ::2]
        changed = PackedWeight(moved["weight"], moved["scale"], moved["zero_point"])
        return lambda: weight_only_linear(moved["x"], changed, layout, moved["bias"], moved["residual"])

    assert _message(call("cpu"), ValueError, TypeError) == _message(call("meta"), ValueError, TypeError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", torch.zeros(2, 64, dtype=torch.int8)), ("codes", torch.zeros(2, K, dtype=torch.uint8)),
        ("scale", torch.zeros(3)), ("scale", torch.zeros(2, dtype=_HALF)), ("zero", torch.zeros(3, dtype=torch.int32)),
        ("zero", torch.zeros(2)), ("sum", torch.zeros(3, dtype=torch.int32)), ("sum", torch.zeros(2)),
        ("weight", torch.zeros(1, dtype=torch.uint8)), ("weight_scale", torch.zeros(1)), ("constants", None),
        ("constants", torch.zeros(1, dtype=torch.int32)), ("bias", torch.zeros(N)), ("residual", torch.zeros(2, N)),
        ("bias", torch.zeros(N + 1, dtype=_HALF)), ("residual", torch.zeros(3, N, dtype=_HALF)),
    ],
)  # fmt: skip
def test_the_errors_of_low_bit_linears(name, value, low):
    packed, layout = low
    given = {
        "codes": torch.zeros(2, K, dtype=torch.int8), "scale": torch.zeros(2), "zero": None,
        "sum": torch.zeros(2, dtype=torch.int32), "weight": packed.weight, "weight_scale": packed.scale,
        "constants": packed.zero_point, "bias": None, "residual": None,
    }  # fmt: skip
    given[name] = value

    def call(device):
        moved = [None if tensor is None else tensor.to(device) for tensor in given.values()]
        return lambda: low_bit_linear(
            QuantizedActivations(*moved[:4]), PackedWeight(*moved[4:7]), layout, _HALF, *moved[7:]
        )

    assert _message(call("cpu"), ValueError, TypeError) == _message(call("meta"), ValueError, TypeError)


def test_the_errors_of_activations_and_rotations(make_x):
    x, transform = make_x((2, K), _HALF), factor_hadamard(K)
    for call in (
        lambda x: quantize_activations(x, 5),
        lambda x: quantize_activations(x, 8, packed=True),
        lambda x: quantize_activations(x, clip=(0.0, 1.0)),
        lambda x: quantize_activations(x, norm_weight=x[0], gate=x),
        lambda x: quantize_activations(x, norm_weight=x[0, 1:]),
        lambda x: quantize_activations(x, gate=x.float()),
        lambda x: quantize_activations(x.double()),
        lambda x: hadamard(x[:, 1:], transform),
        lambda x: hadamard(x, transform, x[0, 1:]),
        lambda x: hadamard(x, transform, x[0].float()),
        lambda x: hadamard_quantize(x, transform, 5),
        lambda x: hadamard_quantize(x, transform, gate=x[:1]),
        lambda x: hadamard_quantize(x, transform, clip=(1.0, 2.0)),
    ):
        messages = [_message(lambda of=of: call(of), ValueError, TypeError) for of in (x, x.to("meta"))]  # noqa: B023
        assert messages[0] == messages[1]
