"""What the comparison with fp64 lets pass, and what it does not."""

import math

import pytest
import torch

from benchmarks.kernels import weight_only
from benchmarks.kernels.harness import checking
from benchmarks.kernels.harness.case import Arithmetic, Case, Prepared
from benchmarks.kernels.harness.checking import Expected, compare, sample_rows
from benchmarks.kernels.low_bit import linear as low_bit_linear
from benchmarks.kernels.low_bit.linear.operands import LowBitArithmetic
from sliderquant_kernels import hadamard, quantize_activations

SHAPE, EXACT = (256, 512), Arithmetic()


def _problem(scheme="W4A16-g128", dtype="bf16", m=5, arithmetic=EXACT):
    case = Case(weight_only.NAME, "test", SHAPE, m, scheme, dtype)
    operands = weight_only.operands(case, torch.device("cpu"))
    x = weight_only.activations(case, operands)
    prepared = Prepared((operands.codes,), lambda x, tensors: x, lambda m: arithmetic)
    return operands, x, weight_only.expected(operands, x, prepared)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["W4A16-g128", "W2A16-g32-sym", "W3A16", "W8A16-g64"])
def test_exact_weights_and_one_rounding_pass(scheme, dtype):
    operands, x, expected = _problem(scheme, dtype)
    y = (x.double() @ operands.weight(torch.float64).t()).to(x.dtype)
    assert compare(y, expected).correct


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_rounded_weight_passes_only_where_it_is_allowed(dtype):
    for arithmetic, correct in ((Arithmetic(weight_roundings=1), True), (EXACT, False)):
        operands, x, expected = _problem(dtype=dtype, arithmetic=arithmetic)
        y = (x.double() @ operands.weight(x.dtype).double().t()).to(x.dtype)
        assert compare(y, expected).correct is correct


def test_rounded_offsets_pass_only_where_they_are_allowed():
    for arithmetic, correct in ((Arithmetic(1, 1), True), (EXACT, False)):
        operands, x, expected = _problem(arithmetic=arithmetic)
        half = 8 * operands.scale.double()
        offsets = operands.offsets().bfloat16().double()
        groups = operands.codes.double().unflatten(1, (-1, 128)) * operands.scale.double()[..., None]
        weight = (groups - half[..., None] + offsets[..., None]).flatten(1)
        assert compare((x.double() @ weight.t()).bfloat16(), expected).correct is correct


def _drop_an_input(y, operands, x):
    return (x[:, 1:].double() @ operands.weight(torch.float64)[:, 1:].t()).to(x.dtype)


def _wrong_zero_point(y, operands, x):
    weight = operands.weight(torch.float64)
    weight[3, :128] += operands.scale[3, 0].double()
    return (x.double() @ weight.t()).to(x.dtype)


def _swap_columns(y, operands, x):
    y[:, [0, 1]] = y[:, [1, 0]]
    return y


def _zero_an_element(y, operands, x):
    y[2, 7] = 0
    return y


def _leave_an_element_unwritten(y, operands, x):
    y[2, 7] = float("nan")
    return y


def _double_all(y, operands, x):
    return 2 * y


@pytest.mark.parametrize(
    "mistake",
    [_drop_an_input, _wrong_zero_point, _swap_columns, _zero_an_element, _leave_an_element_unwritten, _double_all],
)
def test_mistakes_are_found(mistake):
    operands, x, expected = _problem()
    y = (x.double() @ operands.weight(torch.float64).t()).to(x.dtype)
    assert not compare(mistake(y, operands, x), expected).correct


def test_tolerance_is_that_of_the_roundings():
    want = torch.ones(1, 4, dtype=torch.float64)
    expected = Expected(torch.tensor([0]), want, torch.full((1, 4), 3e-3), 4e-3)
    verdict = compare(torch.full((1, 4), 1.002), expected)
    assert verdict.tolerance == pytest.approx(5e-3)
    assert verdict.relative_error == pytest.approx(2e-3, rel=1e-3)
    assert verdict.worst_element == pytest.approx(2e-3 / (4e-3 + 8 * 3e-3), rel=1e-3)


def test_a_row_that_is_not_compared_must_be_finite():
    want = torch.ones(1, 2, dtype=torch.float64)
    expected = Expected(torch.tensor([0]), want, torch.zeros(1, 2), 4e-3)
    y = torch.tensor([[1.0, 1.0], [1.0, float("inf")]])
    assert math.isnan(compare(y, expected).relative_error)
    assert not compare(y, expected).correct


def test_another_shape_is_an_error():
    expected = Expected(torch.tensor([0, 3]), torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, 2), 4e-3)
    with pytest.raises(ValueError, match=r"expected shape \[4 or more, 2\], got \[4, 3\]"):
        compare(torch.ones(4, 3), expected)
    with pytest.raises(ValueError, match="got"):
        compare(torch.ones(3, 2), expected)


@pytest.mark.parametrize("m", [1, 511, 512, 513, 4096, 8191])
def test_sampled_rows_miss_no_stretch(m):
    rows = sample_rows(m, torch.Generator().manual_seed(0))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 0 <= int(rows[0]) <= int(rows[-1]) < m
    if m <= checking.MAX_CHECKED_ROWS:
        assert len(rows) == m
    else:
        edges = [*rows.tolist(), m]
        longest = 2 * -(-m // checking.MAX_CHECKED_ROWS)
        assert all(after - before <= longest for before, after in zip([0, *edges], edges, strict=False))


@pytest.mark.parametrize("m", [90, 100])
def test_a_code_that_comes_out_differently_is_no_fault(m):
    """Rotated values are rounded to 16 bits before they are quantized: now and then one gets its neighbour's code,
    also in a token of which none was likely to."""
    device = torch.device("cpu")
    case = Case(low_bit_linear.NAME, "test", (256, 2048), m, "W4A4+silu_mul+hadamard+residual", "fp16")
    given = low_bit_linear.operands(case, device)
    x = low_bit_linear.activations(case, given)
    prepared = Prepared((given.weight.codes,), lambda x, tensors: x, lambda m: LowBitArithmetic(between=1))
    expected = low_bit_linear.expected(given, x, prepared)
    gated = torch.nn.functional.silu(x[0].float()).to(x.dtype) * x[1]
    activations = quantize_activations(hadamard(gated, given.transform), 4, False).dequantize().double()
    weight = given.weight.weight(torch.float64)
    y = (activations @ weight.t()).to(x.dtype) + given.residual
    assert compare(y, expected).correct
    activations[:, :32] = 0  # a step of a kernel
    assert not compare((activations @ weight.t()).to(x.dtype) + given.residual, expected).correct
