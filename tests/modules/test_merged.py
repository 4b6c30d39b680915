"""Linears that share an input, merged into one product: against the same linears, single."""

import copy
import gc
import io
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sliderquant.errors import InputError
from sliderquant.modules import MergedLinear, PackedLinear, merge_linears
from sliderquant.modules import linear as linear_module
from sliderquant.modules.merged import can_merge
from sliderquant.quantizer.grids import QuantizedWeight, round_to_nearest
from sliderquant.schemes import Scheme
from sliderquant_kernels import quantize_activations
from sliderquant_kernels.cpu import native as cpu_native
from sliderquant_kernels.cpu.vnni import DirectVnniLinear
from sliderquant_kernels.weight_only.cpu import DirectLinear

IN, SIZES = 64, (64, 32, 48)
NAMES = ("q_proj", "k_proj", "v_proj")
CPU = torch.device("cpu")


def run_all(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [getattr(self, name)(x) for name in NAMES]


class Projections(nn.Module):
    """Stands in for an attention layer: calls its linears as `run` says; by default all, in the order of NAMES."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, linear in zip(NAMES, linears, strict=True):
            setattr(self, name, linear)
        self.run: Callable[..., Any] = run_all

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def packed_linears(
    scheme: str = "W4A16-g32", dtype: torch.dtype = torch.float32, bias: bool = True, sizes: Sequence[int] = SIZES
) -> list[PackedLinear]:
    torch.manual_seed(0)
    parsed = Scheme.parse(scheme)
    return [
        PackedLinear(
            round_to_nearest(torch.randn(out, IN), parsed, dtype),
            parsed,
            torch.randn(out) if bias else None,
            dtype=dtype,
        )
        for out in sizes
    ]


def merged_from(linears: Sequence[PackedLinear]) -> MergedLinear:
    weights = [linear.quantized() for linear in linears]
    zero_points = [weight.zero_point for weight in weights]
    quantized = QuantizedWeight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        None if zero_points[0] is None else torch.cat(zero_points),
    )
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    return MergedLinear(quantized, linears[0].scheme, sizes, bias, dtype=linears[0].dtype)


class Pair:
    """The same projections, single and merged; `launches` counts the products of the merged ones."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.single = Projections(packed_linears(*arguments, **keywords))
        self.both = copy.deepcopy(self.single)
        self.merged = merged_from([getattr(self.both, name) for name in NAMES])
        self.merged.attach(self.both, NAMES)
        self.launches = 0
        self.merged.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.launches += 1

    def run(self, function: Callable[..., Any], x: torch.Tensor) -> Any:
        self.single.run = self.both.run = function
        return self.both(x)

    def expected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.single, name)(x)

    @property
    def left(self) -> list[Any]:
        """What the merged linear still holds of a call in this thread."""
        calls = (self.merged._call, self.merged._traced_call)
        return [item for call in calls for item in (call.x, call.version, *call.parts) if item is not None]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "scheme",
    ["W2A16-g32", "W3A16-g64-sym", "W4A16-g32", "W4A16-sym", "W8A16", "W8A16-sym", "W4A4", "W2A8-g32-act-sym", "W8A8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_bits_in_one_launch(
    scheme: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(scheme, dtype, bias)
    kind = DirectVnniLinear if "A16" not in scheme else DirectLinear
    parts = kind.parts

    def counted(direct: Any, *arguments: Any) -> list[torch.Tensor]:
        pair.launches += 1
        return parts(direct, *arguments)

    monkeypatch.setattr(kind, "parts", counted)
    assert pair.merged.layout.kind == pair.single.q_proj.layout.kind
    for launches, leading in enumerate([(1,), (3, 5), (60,), ()], 1):
        x = torch.randn(*leading, IN).to(dtype)
        for got, expected in zip(pair.both(x), pair.single(x), strict=True):
            assert torch.equal(got, expected)
        assert pair.launches == launches
        assert not pair.left


def test_a_shared_input_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # fp16: in other dtypes a CPU may round and multiply in one call.
    pair, x, seen = Pair("W4A4", torch.float16), torch.randn(2, IN).half(), []

    def counted(x: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        seen.append(x)
        return quantize_activations(x, *arguments, **keywords)

    monkeypatch.setattr(linear_module, "quantize_activations", counted)
    pair.both(x)
    assert len(seen) == 1
    pair.single(x)
    assert len(seen) == 1 + len(NAMES)


@pytest.mark.parametrize("order", itertools.permutations(NAMES))
def test_any_order(order: tuple[str, ...]) -> None:
    pair, x = Pair(), torch.randn(2, IN)
    got = pair.run(lambda self, x: {name: getattr(self, name)(x) for name in order}, x)
    assert pair.launches == 1
    for name in NAMES:
        assert torch.equal(got[name], pair.expected(name, x))


def test_a_slice_that_is_called_twice() -> None:
    pair, x = Pair(), torch.randn(2, IN)
    q, again, k, v = pair.run(lambda self, x: [self.q_proj(x), self.q_proj(x), self.k_proj(x), self.v_proj(x)], x)
    assert torch.equal(q, again)
    assert torch.equal(q, pair.expected("q_proj", x))
    assert torch.equal(k, pair.expected("k_proj", x))
    assert torch.equal(v, pair.expected("v_proj", x))
    assert not pair.left


def test_another_input_in_between() -> None:
    """Cross attention: keys and values of another tensor, with the same values or not."""
    pair, x, other = Pair(), torch.randn(2, IN), torch.randn(2, IN)
    q, k, v = pair.run(lambda self, x: [self.q_proj(x), self.k_proj(other), self.v_proj(other)], x)
    assert torch.equal(q, pair.expected("q_proj", x))
    assert torch.equal(k, pair.expected("k_proj", other))
    assert torch.equal(v, pair.expected("v_proj", other))
    assert pair.launches == 2
    assert not pair.left


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x[0].zero_(), lambda x: x.view(-1).mul_(2)])
def test_an_input_that_changes_in_place(change: Callable[[torch.Tensor], Any]) -> None:
    pair, x = Pair(), torch.randn(2, IN)
    before = x.clone()
    q, _, k, v = pair.run(lambda self, x: [self.q_proj(x), change(x), self.k_proj(x), self.v_proj(x)], x)
    assert not torch.equal(x, before)
    assert torch.equal(q, pair.expected("q_proj", before))
    assert torch.equal(k, pair.expected("k_proj", x))
    assert torch.equal(v, pair.expected("v_proj", x))


def test_inference_mode() -> None:
    pair = Pair()
    with torch.inference_mode():
        x = torch.randn(2, IN)
        for got, expected in zip(pair.both(x), pair.single(x), strict=True):
            assert torch.equal(got, expected)
        assert pair.launches == 1
        # Outside of the module that holds them, no call is sure to be followed by the others: nothing is kept.
        q = pair.both.q_proj(x)
        before = x.clone()
        k = pair.both.k_proj(x.add_(1))
        assert torch.equal(q, pair.expected("q_proj", before))
        assert torch.equal(k, pair.expected("k_proj", x))
        assert not pair.left


def test_a_static_buffer_that_is_filled_anew() -> None:
    """As with CUDA graphs, whose replays do not even count as changes."""
    pair, buffer = Pair(), torch.empty(2, IN)
    for _ in range(3):
        torch._C._autograd._unsafe_set_version_counter((buffer,), (0,))
        buffer.copy_(torch.randn(2, IN))
        torch._C._autograd._unsafe_set_version_counter((buffer,), (7,))
        # The first call leaves two parts, which the second one must not find.
        assert torch.equal(pair.run(lambda self, x: self.q_proj(x), buffer), pair.expected("q_proj", buffer))
        assert torch.equal(pair.run(lambda self, x: self.v_proj(x), buffer), pair.expected("v_proj", buffer))


def test_an_exception_in_between() -> None:
    def fail(self: nn.Module, x: torch.Tensor) -> None:
        self.q_proj(x)
        raise ValueError("between the layers")

    pair, x = Pair(), torch.randn(2, IN)
    with pytest.raises(ValueError, match="between the layers"):
        pair.run(fail, x)
    assert not pair.left
    assert not pair.merged._call.open
    x.add_(1)
    torch._C._autograd._unsafe_set_version_counter((x,), (0,))
    assert torch.equal(pair.both.k_proj(x), pair.expected("k_proj", x))
    assert torch.equal(pair.run(lambda self, x: self.v_proj(x), x), pair.expected("v_proj", x))


def test_nothing_stays_alive() -> None:
    pair, x = Pair(), torch.randn(2, IN)
    alive = weakref.ref(x)
    for run in (
        lambda self, x: [getattr(self, name)(x) for name in NAMES],
        lambda self, x: [self.q_proj(x), self.v_proj(x)],
        lambda self, x: [self.q_proj(x), self.k_proj(x.clone())],
    ):
        product = weakref.ref(pair.run(run, x)[0])
        gc.collect()
        assert product() is None
        assert not pair.left
    del x
    gc.collect()
    assert alive() is None


def test_the_last_slice_leaves_nothing_for_the_rest_of_the_forward() -> None:
    pair = Pair()

    def run(self: nn.Module, x: torch.Tensor) -> Any:
        outputs = [getattr(self, name)(x) for name in NAMES]
        assert not pair.left
        return outputs

    pair.run(run, torch.randn(2, IN))


def test_two_threads() -> None:
    """Both stand between q and k at the same time: with inputs of their own, and with the same one."""
    pair, barrier = Pair(), threading.Barrier(2, timeout=60)
    shared = torch.randn(2, IN)
    inputs = [torch.randn(2, IN), torch.randn(2, IN)]
    results: dict[int, list[torch.Tensor]] = {}

    def run(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        q = self.q_proj(x)
        barrier.wait()
        k = self.k_proj(x)
        barrier.wait()
        return [q, k, self.v_proj(x)]

    def thread(index: int, x: torch.Tensor) -> None:
        with torch.no_grad():
            results[index] = pair.both(x)

    pair.both.run = run
    for xs in (inputs, [shared, shared]):
        threads = [threading.Thread(target=thread, args=(index, x)) for index, x in enumerate(xs)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        for index, x in enumerate(xs):
            for name, got in zip(NAMES, results.pop(index), strict=True):
                assert torch.equal(got, pair.expected(name, x))
    assert pair.launches == 4


def test_outputs_are_views_of_one_product() -> None:
    pair = Pair()
    q, k, v = pair.both(torch.randn(2, 5, IN))
    assert {part.untyped_storage().data_ptr() for part in (q, k, v)} == {q.data_ptr()}
    assert q.stride() == k.stride() == v.stride() == (5 * sum(SIZES), sum(SIZES), 1)
    # What attention does with them.
    assert q.view(2, 5, 4, 16).transpose(1, 2).data_ptr() == q.data_ptr()


def test_slices_look_like_the_linears() -> None:
    pair = Pair("W4A16-g32", torch.bfloat16)
    for name in NAMES:
        single, part = getattr(pair.single, name), getattr(pair.both, name)
        assert repr(part).startswith(repr(single).replace("PackedLinear(", "LinearSlice(\n  ").removesuffix(")"))
        for attribute in ("in_features", "out_features", "scheme", "dtype", "device"):
            assert getattr(part, attribute) == getattr(single, attribute)
        assert torch.equal(part.bias, single.bias)
        assert torch.equal(part.weight, single.weight)
        assert torch.equal(part.dequantize(torch.float32), single.dequantize(torch.float32))
        for got, expected in zip(part.quantized(), single.quantized(), strict=True):
            assert torch.equal(got, expected)
            assert got.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


@pytest.mark.parametrize("scheme", ["W3A16-g32", "W4A16-sym"])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(scheme: str, bias: bool) -> None:
    pair, other = Pair(scheme, bias=bias), Pair(scheme, bias=bias)
    state, expected = pair.both.state_dict(), pair.single.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert all(state[key].dtype == expected[key].dtype for key in state)

    x = torch.randn(2, IN)
    buffer = io.BytesIO()
    torch.save({key: value + 1 if "scale" in key or "bias" in key else value for key, value in state.items()}, buffer)
    buffer.seek(0)
    changed = torch.load(buffer, weights_only=True)
    assert not any(other.both.load_state_dict(changed))
    assert not any(other.single.load_state_dict(changed))
    for got, expected_part, before in zip(other.both(x), other.single(x), pair.both(x), strict=True):
        assert torch.equal(got, expected_part)
        assert not torch.equal(got, before)


def test_state_dicts_that_do_not_fit() -> None:
    both, single = Pair().both, Pair().single
    state = single.state_dict()
    for key, message in (
        ("k_proj.bias", r"Missing key\(s\) in state_dict: \"k_proj.bias\""),
        ("v_proj.weight_scale", r"Missing key\(s\) in state_dict: \"v_proj.weight_scale\""),
    ):
        with pytest.raises(RuntimeError, match=message):
            both.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_proj.weight_g_idx"):
        both.load_state_dict(state | {"q_proj.weight_g_idx": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"k_proj.bias has shape \[3\], expected \[32\]"):
        both.load_state_dict(state | {"k_proj.bias": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"q_proj.weight_shape is \[48, 64\], expected \[64, 64\]"):
        both.load_state_dict(state | {f"q_proj.{key}": value for key, value in single.v_proj.state_dict().items()})
    x = torch.randn(2, IN)
    for got, expected in zip(both(x), single(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts(dtype: torch.dtype) -> None:
    pair, x = Pair(), torch.randn(2, IN).to(dtype)
    pair.single.to(dtype)
    assert pair.both.to(dtype).k_proj.dtype == dtype
    assert pair.both.q_proj.merged is pair.both.v_proj.merged is pair.merged
    for got, expected in zip(pair.both(x), pair.single(x), strict=True):
        assert torch.equal(got, expected)
    assert pair.launches == 1
    # A slice takes its siblings along.
    pair.both.k_proj.to(torch.float32)
    assert pair.both.q_proj.dtype == torch.float32
    pair.both.to("meta")
    assert all(tensor.is_meta for tensor in [*pair.both.parameters(), *pair.both.buffers()])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how: str) -> None:
    both, x = Pair().both, torch.randn(2, IN)
    expected = both(x)
    if how == "deepcopy":
        other = copy.deepcopy(both)
    else:
        buffer = io.BytesIO()
        torch.save(both, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.q_proj.merged is other.k_proj.merged is not both.q_proj.merged
    assert other.q_proj.merged._call is not both.q_proj.merged._call
    launches: list[int] = []
    for module in (both, other):
        module.q_proj.merged._forward_hooks.clear()
        module.q_proj.merged.register_forward_hook(lambda *_: launches.append(1))
    for got, want in zip(other(x), expected, strict=True):
        assert torch.equal(got, want)
    assert len(launches) == 1
    other.q_proj.merged.detach()
    other(x)
    assert len(launches) == 4  # without its hooks every slice computes for itself
    both(x)
    assert len(launches) == 5


def test_a_module_that_is_called_around_its_hooks() -> None:
    pair, x = Pair(), torch.randn(2, IN)
    for got, expected in zip(pair.both.forward(x), pair.single(x), strict=True):
        assert torch.equal(got, expected)
    assert pair.launches == 3


def test_names_and_sizes_that_do_not_fit() -> None:
    linears = packed_linears()
    with pytest.raises(InputError, match=r"sizes \[64, 32\]: expected a sum of 64"):
        MergedLinear(linears[0].quantized(), linears[0].scheme, [64, 32])
    merged = merged_from(linears)
    model = nn.ModuleDict({"one": Projections(linears), "two": Projections(linears)})
    with pytest.raises(InputError, match=r"names .*: expected those of 3 linears in one module"):
        merged.attach(model, ["one.q_proj", "one.k_proj", "two.v_proj"])
    with pytest.raises(InputError, match=r"names \['one.q_proj'\]: expected those of 3 linears in one module"):
        merged.attach(model, ["one.q_proj"])


def test_what_can_be_merged() -> None:
    scheme = Scheme.parse("W4A16-g32")
    shapes, same, biased = [(64, 64), (32, 64)], [scheme, scheme], [True, True]
    assert can_merge(shapes, same, biased, CPU, torch.float32)
    assert not can_merge([(64, 64), (32, 128)], same, biased, CPU, torch.float32)
    assert not can_merge(shapes, [scheme, scheme.per_channel()], biased, CPU, torch.float32)
    assert not can_merge(shapes, same, [True, False], CPU, torch.float32)
    low_bit = Scheme.parse("W4A8-g32")
    assert can_merge(shapes, [low_bit, low_bit], biased, CPU, torch.float32)
    assert not can_merge(shapes, [low_bit, scheme], biased, CPU, torch.float32)
    assert can_merge(shapes, [low_bit, low_bit], biased, CPU, torch.float32, [(0.5, 0.75)] * 2)
    assert not can_merge(shapes, [low_bit, low_bit], biased, CPU, torch.float32, [(0.5, 0.75), (0.5, 0.5)])
    assert not can_merge(shapes, [low_bit, low_bit], biased, CPU, torch.float32, [(0.5, 0.75), None])


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one layout")
def test_merging_changes_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's int4 layout takes multiples of 16 outputs: one odd linear must not take it from its siblings."""
    monkeypatch.setattr(cpu_native, "vnni", lambda bits: None)
    scheme = Scheme.parse("W4A16-g32")
    for sizes, fits in (((32, 16), True), ((32, 8), False), ((8, 8), False), ((24, 24), False)):
        shapes = [(size, 64) for size in sizes]
        assert can_merge(shapes, [scheme] * 2, [False] * 2, CPU, torch.bfloat16) == fits
        assert can_merge(shapes, [scheme] * 2, [False] * 2, CPU, torch.float32)


def test_merge_of_another_model() -> None:
    with pytest.raises(InputError, match=r"model: Sequential is not of a supported family; expected one of Llama"):
        merge_linears(nn.Sequential(*packed_linears()))


# Under torch.compile


@pytest.mark.parametrize("what", ["the module", "its forward", "a module around it"])
@pytest.mark.parametrize("scheme", ["W4A16-g32", "W4A4"])
def test_compile_without_graph_breaks(what: str, scheme: str, programs: Any) -> None:
    pair, traced = Pair(scheme), programs()
    pair.merged._forward_hooks.clear()
    if what == "its forward":
        pair.both.forward = torch.compile(pair.both.forward, fullgraph=True, backend=traced)
        compiled: Any = pair.both
    else:
        compiled = pair.both if what == "the module" else nn.Sequential(nn.Identity(), pair.both)
        compiled = torch.compile(compiled, fullgraph=True, backend=traced)
    for _ in range(4):
        x = torch.randn(2, IN)
        for got, expected in zip(compiled(x), pair.single(x), strict=True):
            assert torch.equal(got, expected)
        assert not pair.left
    assert traced.products == [1]
    # The slices still work outside of the compiled program, and in it again.
    assert torch.equal(pair.both.q_proj(x), pair.expected("q_proj", x))
    assert torch.equal(compiled(x)[1], pair.expected("k_proj", x))
    assert traced.products == [1]


def test_graph_breaks_between_the_slices(programs: Any) -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        torch._dynamo.graph_break()
        return q[:, :32] + self.k_proj(x) * self.v_proj(x)[:, :32]

    pairs, traced = [Pair() for _ in range(12)], programs()
    for pair in pairs:
        pair.merged._forward_hooks.clear()
        pair.single.run = pair.both.run = run
    grow = torch.randn(32, IN)
    single, both = (
        nn.Sequential(*itertools.chain(*((getattr(pair, which), Grow(grow)) for pair in pairs)))
        for which in ("single", "both")
    )
    compiled = torch.compile(both, backend=traced)
    settled = 0
    for token in range(5):
        x = torch.randn(2, IN)
        assert torch.equal(compiled(x), single(x))
        assert not any(pair.left for pair in pairs)
        if token == 1:
            settled = len(traced.products)
    assert len(traced.products) == settled


class Grow(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)
