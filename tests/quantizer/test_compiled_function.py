import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant.quantizer import compiled_function as module
from sliderquant.quantizer.compiled_function import compiled_function

pytestmark = pytest.mark.usefixtures("compiler")


def parts(count, x, y):
    """Several results in another order than that in which they are computed, a view that was copied, and none."""
    low, high = x.amin(dim=1), (x * y).amax(dim=1)
    return high - low, None, x[:, :count].contiguous() * 2, low


@pytest.fixture(scope="module")
def compiled():
    return compiled_function(parts)


@pytest.fixture
def calls(monkeypatch):
    """How often what torch.compile returned was called."""
    made, found = torch.compile, []

    def counting(*arguments, **keywords):
        optimized = made(*arguments, **keywords)

        def call(*inputs):
            found.append(inputs)
            return optimized(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    return found


def tensors(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2)]


def check(function, *arguments):
    for got, want in zip(function(*arguments), parts(*arguments), strict=True):
        if want is None:
            assert got is None
        else:
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 6),
    columns=st.integers(1, 6),
    count=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shapes(compiled, rows, columns, count, dtype):
    for seed in (0, 1):
        check(compiled, min(count, columns), *tensors(rows, columns, dtype, seed))


def test_a_kind_that_came_before_is_called_directly(calls):
    function = compiled_function(parts)
    for seed in range(3):
        check(function, 2, *tensors(5, 7, seed=seed))
    assert len(calls) == 1
    check(function, 3, *tensors(5, 7))
    check(function, 3, *tensors(6, 7))
    x, y = tensors(7, 5)
    check(function, 3, x.T, y.T)  # other strides
    assert len(calls) == 4
    for seed in (1, 2):
        check(function, 3, *tensors(6, 7, seed=seed))
    assert len(calls) == 4


def test_what_else_is_compiled_in_is_part_of_a_kind(calls):
    function, inputs = compiled_function(parts), tensors(5, 7)
    check(function, 2, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        check(function, 2, *inputs)
    assert len(calls) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        check(function, 2, *inputs)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3


def test_one_tensor_twice(calls):
    function = compiled_function(parts)
    x, y = tensors(4, 9)
    check(function, 2, x, x)
    check(function, 2, x, y)
    check(function, 2, y, x)
    assert len(calls) == 2  # the first does not tell which is which
    check(function, 2, y, y)
    assert len(calls) == 2


def test_a_lone_result(calls):
    function = compiled_function(lambda x: x * 2)
    for seed in (0, 1):
        x, _ = tensors(3, 4, seed=seed)
        assert torch.equal(function(x), x * 2)
    assert len(calls) == 1


def test_after_an_error():
    function, (x, y) = compiled_function(parts), tensors(4, 9)
    with pytest.raises(Exception, match=r"size|shape|broadcast"):
        function(2, x, y[:3])
    check(function, 2, x, y)


def test_functions_do_not_share_the_limit_of_compilations():
    def made(name):
        def function(x):
            return getattr(torch, name)(x)

        return compiled_function(function)

    x, _ = tensors(4, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("neg", "square", "abs"):
            assert torch.equal(made(name)(x), getattr(torch, name)(x))


def test_options_are_known():
    """Also those of a GPU, where there is none."""
    with torch._inductor.config.patch(module._OPTIONS | module._ON_CUDA):
        assert torch._inductor.config.emulate_precision_casts
