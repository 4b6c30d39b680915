import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sliderquant.errors import InputError
from sliderquant.modules import PackedLinear
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, round_to_nearest
from sliderquant.schemes import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_ONLY = ("W2A16-g32", "W3A16-g64-sym", "W4A16-g32", "W4A16-sym", "W4A16", "W8A16", "W8A16-sym")
LOW_BIT = ("W4A4", "W4A4-sym-act-sym", "W4A8-g32", "W4A8-g64-sym-act-sym", "W2A8-act-sym", "W8A8", "W8A8-g32-sym")
SCHEMES = (*WEIGHT_ONLY, *LOW_BIT)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: with more threads, most of the time goes into waking them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    scheme: str = "W4A16-g32", out: int = 48, inputs: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[PackedLinear, QuantizedWeight]:
    torch.manual_seed(0)
    parsed = Scheme.parse(scheme)
    quantized = round_to_nearest(torch.randn(out, inputs), parsed, dtype)
    return PackedLinear(quantized, parsed, torch.randn(out) if bias else None), quantized


def same(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    for name, one, other in zip(QuantizedWeight._fields, actual, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name


def tensor_bytes(module: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (37, 90)])
def test_forward(scheme: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if shape[1] % 32 and "-g" in scheme:
        pytest.skip("a group does not divide the inputs")
    linear, quantized = make(scheme, *shape, dtype=dtype)
    assert linear.dtype == dtype
    same(linear.quantized(), quantized)
    dense = dequantize(quantized, Scheme.parse(scheme))
    assert torch.equal(linear.dequantize(torch.float32), dense)
    assert torch.equal(linear.dequantize(), dense.to(dtype))
    for leading in ((1,), (2, 3), (40,)):
        x = torch.randn(*leading, shape[1]).to(dtype)
        expected = torch.nn.functional.linear(x.double(), dense.double(), linear.bias.double())
        y = linear(x)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (y.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("scheme", LOW_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (37, 90)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_with_rounded_inputs(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int], bias: bool, round_tokens: Callable[..., torch.Tensor]
) -> None:
    if shape[1] % 32 and "-g" in scheme:
        pytest.skip("a group does not divide the inputs")
    linear, quantized = make(scheme, *shape, dtype=dtype, bias=bias)
    parsed = linear.scheme
    same(linear.quantized(), quantized)
    dense = dequantize(quantized, parsed)
    assert torch.equal(linear.dequantize(torch.float32), dense)
    assert torch.equal(linear.dequantize(), dense.to(dtype))
    for leading in ((1,), (2, 3), (40,), (0,)):
        x = torch.randn(*leading, shape[1]).to(dtype) * 3 + 0.5
        if leading == (40,) and parsed.group_size is None:
            x[0] = 0  # in groups, asymmetric, that is a difference of large sums in fp32
        simulated = round_tokens(x, parsed.activation_bits, parsed.activation_symmetric)
        expected = torch.nn.functional.linear(simulated, dense.double(), linear.bias.double() if bias else None)
        y = linear(x)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        # The integers are exact. What is left: a few roundings in fp32, and that of the result to its dtype.
        largest = simulated.abs() @ dense.double().abs().T + 1
        error = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert ((y.double() - expected).abs() <= 2.0**-20 * largest + error * expected.abs()).all()


def test_low_bit_inputs_of_another_dtype() -> None:
    linear, _ = make("W4A4", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"x: expected dtype torch.bfloat16 like the layer, got torch.float32"):
        linear(torch.randn(2, 64))


def test_more_inputs_than_a_token_can_have() -> None:
    codes, scale = torch.zeros(1, 32769, dtype=torch.uint8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="32769 inputs: at most 32768 are quantized per token; use W4A16"):
        PackedLinear(QuantizedWeight(codes, scale, None), Scheme.parse("W4A4-sym"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_a_cast_packs_again(scheme: str, first: torch.dtype, second: torch.dtype) -> None:
    linear, quantized = make(scheme, dtype=first)
    moved = linear.to(second)
    assert moved is linear
    assert linear.dtype == linear.bias.dtype == second
    codes, scale, zero_point = quantized
    same(linear.quantized(), QuantizedWeight(codes, scale.to(second), zero_point))
    x = torch.randn(3, 64).to(second)
    assert linear(x).dtype == second
    expected = PackedLinear(QuantizedWeight(codes, scale.to(second), zero_point), linear.scheme, linear.bias.detach())
    assert linear.layout == expected.layout
    assert torch.equal(linear(x), expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_to_the_same_dtype_changes_nothing(dtype: torch.dtype) -> None:
    linear, quantized = make(dtype=dtype)
    before = linear.packed
    for move in (
        lambda: linear.to(dtype),
        lambda: linear.to("cpu"),
        lambda: linear.cpu(),
        lambda: linear.requires_grad_(False),
    ):
        move()
        same(linear.quantized(), quantized)
    assert all(a is b or a.dtype == b.dtype for a, b in zip(before, linear.packed, strict=True))


def test_casts_of_a_whole_model() -> None:
    linear, quantized = make(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(64, 64), linear)
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        getattr(model, name)()
        assert model(torch.randn(2, 64).to(dtype)).dtype == dtype
        assert torch.equal(linear.quantized().codes, quantized.codes)


def test_a_scale_that_the_layout_holds_in_another_dtype_is_not_cast() -> None:
    """A cast within one dtype may meet scales that a layout keeps wider."""
    linear, _ = make(dtype=torch.float16)
    linear._buffers["packed_scale"] = linear.packed_scale.float()
    linear.to(torch.float16)
    assert linear.packed_scale.dtype == torch.float32
    assert linear.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_it_cannot_compute_in(dtype: torch.dtype) -> None:
    linear, quantized = make()
    with pytest.raises(InputError, match=f"dtype {dtype}: a packed linear computes in"):
        linear.to(dtype)
    same(linear.quantized(), quantized)
    assert linear.bias.dtype == torch.float32


def test_meta() -> None:
    linear, _ = make()
    linear.to("meta")
    assert linear.device.type == "meta"
    assert linear.bias.is_meta
    assert all(buffer.is_meta for buffer in linear.buffers())


def test_from_quantized_takes_device_and_dtype() -> None:
    _, quantized = make()
    linear = PackedLinear.from_quantized(quantized, Scheme.parse("W4A16-g32"), device="cpu", dtype=torch.bfloat16)
    assert linear.dtype == torch.bfloat16
    assert linear.bias is None
    assert torch.equal(linear.quantized().codes, quantized.codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_is_the_checkpoint_format(scheme: str) -> None:
    linear, quantized = make(scheme, 37, 64)
    state = nn.Sequential(linear).state_dict()
    names = {"0.weight_packed", "0.weight_scale", "0.weight_shape", "0.bias"}
    assert set(state) == names | (set() if Scheme.parse(scheme).symmetric else {"0.weight_zero_point"})
    assert state["0.weight_packed"].dtype == torch.int32

    other = PackedLinear(
        QuantizedWeight(
            torch.zeros_like(quantized.codes),
            torch.ones_like(quantized.scale),
            None if quantized.zero_point is None else torch.zeros_like(quantized.zero_point),
        ),
        linear.scheme,
        torch.zeros(37),
        dtype=torch.bfloat16,
    )
    assert not any(nn.Sequential(other).load_state_dict(state))
    codes, scale, zero_point = quantized
    same(other.quantized(), QuantizedWeight(codes, scale.bfloat16(), zero_point))
    assert torch.equal(other.bias, linear.bias.bfloat16())


def test_state_dicts_that_do_not_fit() -> None:
    linear, _ = make()
    state = linear.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        linear.load_state_dict({key: value for key, value in state.items() if key != "weight_scale"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_g_idx"):
        linear.load_state_dict(state | {"weight_g_idx": torch.ones(1)})
    larger, _ = make(out=64)
    with pytest.raises(RuntimeError, match=r"weight_shape is \[64, 64\], expected \[48, 64\]"):
        linear.load_state_dict(larger.state_dict())


def test_copies_are_independent() -> None:
    linear, quantized = make()
    other = copy.deepcopy(linear).to(torch.bfloat16)
    assert (linear.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    same(linear.quantized(), quantized)


def test_the_weight_can_be_looked_at() -> None:
    """Model code reads `linear.weight`, its dtype or its device."""
    linear, quantized = make(dtype=torch.bfloat16)
    assert (linear.weight.dtype, linear.weight.device, linear.weight.shape) == (torch.bfloat16, linear.device, (48, 64))
    assert torch.equal(linear.weight, dequantize(quantized, linear.scheme).bfloat16())
    assert "weight" not in dict(linear.named_parameters())
    assert not any(name == "weight" for name, _ in linear.named_buffers())


def test_repr() -> None:
    assert repr(make("W3A16-sym", bias=False)[0]) == (
        "PackedLinear(in_features=64, out_features=48, bias=False, bits=3, group_size=None, symmetric=True)"
    )
    assert repr(make("W4A4-act-sym")[0]).endswith("symmetric=False, activations=4 bits per token, symmetric)")


@pytest.mark.parametrize(("out", "inputs"), [(8192, 2048), (2048, 8192)])
def test_the_weight_stays_packed_in_memory(out: int, inputs: int) -> None:
    """The layers of a model of a billion weights, W4A16-g128: less than 0.32 of bf16, before and after a forward."""
    codes = torch.randint(0, 16, (out, inputs), dtype=torch.uint8)
    zero_point = torch.full((out, inputs // 128), 7, dtype=torch.uint8)
    scale = torch.ones(out, inputs // 128, dtype=torch.bfloat16)
    linear = PackedLinear(QuantizedWeight(codes, scale, zero_point), Scheme(4, 128))
    held: dict[str, Any] = dict(linear.__dict__)
    for tokens in (1, 5):
        assert tensor_bytes(linear) < 0.32 * 2 * out * inputs
        linear(torch.randn(tokens, inputs).bfloat16())
    assert linear.__dict__.keys() == held.keys()
    assert tensor_bytes(linear) < 0.32 * 2 * out * inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_cpu_other_dtypes_than_bf16_take_the_memory_of_the_original(dtype: torch.dtype) -> None:
    linear, quantized = make("W4A16-g32", 512, 256, dtype, bias=False)
    dense = linear.out_features * linear.in_features * dtype.itemsize
    groups = quantized.scale.numel()
    assert tensor_bytes(linear) == dense + groups * (dtype.itemsize + 1)
    x = torch.randn(3, 256).to(dtype)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, dequantize(quantized, linear.scheme).to(dtype)))


def test_another_weight_or_bias_is_multiplied_at_once() -> None:
    """What was checked for one weight is not used for another."""
    linear, _ = make(dtype=torch.bfloat16)
    other, _ = make("W4A16-g32", dtype=torch.bfloat16)
    x = torch.randn(2, 64).bfloat16()
    before = linear(x)
    with torch.no_grad():
        linear.bias.add_(1)
    assert torch.allclose(linear(x).float(), before.float() + 1, atol=0.1)
    linear.bias = nn.Parameter(torch.zeros(48, dtype=torch.bfloat16), requires_grad=False)
    expected = x.double() @ linear.dequantize(torch.float32).double().T
    assert (linear(x).double() - expected).norm() < 1e-2 * expected.norm()
    state = {key: value * 2 if "scale" in key else value for key, value in other.state_dict().items()}
    linear.load_state_dict(state)
    other.load_state_dict(state)
    assert torch.equal(linear(x), other(x))
    assert torch.equal(copy.deepcopy(linear)(x), other(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_move_to_a_gpu_packs_again(
    scheme: str, dtype: torch.dtype, round_tokens: Callable[..., torch.Tensor]
) -> None:
    linear, quantized = make(scheme, dtype=dtype)
    x = torch.randn(5, 64).to(dtype)
    multiplied = x.double()
    if linear.scheme.quantizes_activations:
        multiplied = round_tokens(x, linear.scheme.activation_bits, linear.scheme.activation_symmetric)
    expected = multiplied @ dequantize(quantized, linear.scheme).double().T + linear.bias.double()
    cpu_layout = linear.layout
    y = linear.cuda()(x.cuda())
    assert linear.layout.device_type == linear.device.type == linear.bias.device.type == y.device.type == "cuda"
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (y.cpu().double() - expected).norm() < tolerance * expected.norm()
    same(linear.cpu().quantized(), quantized)
    assert linear.layout == cpu_layout
