"""Launches by plan on a GPU: the same bits as through the dispatcher and Triton's JIT, wherever they run."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import (
    choose_layout,
    choose_low_bit_layout,
    direct_linear,
    direct_low_bit_linear,
    factor_hadamard,
    hadamard,
    hadamard_quantize,
    low_bit_linear,
    prepare_hadamard,
    quantize_activations,
    weight_only_linear,
)
from sliderquant_kernels.common import devices, launch_plan, launching, workspace
from sliderquant_kernels.cpu.vnni import Rounding
from sliderquant_kernels.rotation import launch as hadamard_launch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(launching.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]
N, K = 256, 8192  # split over programs


@pytest.fixture
def calls(make_weight, make_x):
    """Every op, by name, as a function of x `[tokens, K]`."""
    weight = make_weight(4, N, K, 128, False, torch.bfloat16)
    layout = choose_layout(4, N, K, 128, False, "cuda", torch.bfloat16)
    packed = layout.pack(*(part.cuda() for part in weight[:3]))
    low = make_weight(4, N, K, None, True, torch.bfloat16)
    low_layout = choose_low_bit_layout(4, N, K, None, True, "cuda")
    low_packed = low_layout.pack(low.codes.cuda(), low.scale.cuda())
    bias, transform = make_x((N,), torch.bfloat16).cuda(), factor_hadamard(K)
    large = factor_hadamard(28672)
    return {
        "warp_k": lambda x: weight_only_linear(x, packed, layout, bias, variant="warp_k"),
        "rows": lambda x: weight_only_linear(x, packed, layout, bias, variant="rows"),
        "dense": lambda x: weight_only_linear(x, packed, layout, variant="dense"),
        "chosen": lambda x: weight_only_linear(x, packed, layout, bias),
        "direct": direct_linear(packed, layout, bias),
        "low_bit": lambda x: low_bit_linear(quantize_activations(x, 4), low_packed, low_layout, x.dtype, bias),
        "low_bit tiles": lambda x: low_bit_linear(
            quantize_activations(x, 8, False), low_packed, low_layout, x.dtype, variant="tiles"
        ),
        "direct low_bit": direct_low_bit_linear(low_packed, low_layout, torch.bfloat16, bias, Rounding(4, True, None)),
        "hadamard": lambda x: hadamard(x, transform),
        "two launches": lambda x: hadamard(x.repeat(1, 4)[:, :28672], large),
        "hadamard_quantize": lambda x: hadamard_quantize(x, transform, 4).dequantize(),
    }


def _through_the_op(call, x, monkeypatch):
    """Through the dispatcher and Triton's JIT."""
    with monkeypatch.context() as patch:
        patch.setattr(devices, "nothing_watches", lambda: False)
        patch.setattr(
            launch_plan.Launcher, "__call__", lambda self, grid, *arguments: self._launch_by_jit(grid, *arguments)
        )
        return call(x)


def test_plans_are_used(calls, make_x, monkeypatch):
    """Else every other test here would compare the JIT with itself."""
    x = make_x((8, K), torch.bfloat16).cuda()
    for call in calls.values():
        call(x)
    monkeypatch.setattr(launch_plan.Launcher, "_launch_by_jit", None)
    for call in calls.values():
        call(x)


@pytest.mark.parametrize("tokens", [1, 8, 33, 600])
def test_the_same_bits(calls, make_x, monkeypatch, tokens):
    x = make_x((tokens, K), torch.bfloat16).cuda()
    for name, call in calls.items():
        want = _through_the_op(call, x, monkeypatch)
        for _ in range(3):
            assert torch.equal(call(x), want), name


def test_addresses_that_are_no_multiples(calls, make_x):
    x = make_x((1, K + 1), torch.bfloat16).cuda()
    odd, even = x[:, 1:], x[:, 1:].clone()
    assert odd.data_ptr() % 16
    for name, call in calls.items():
        for _ in range(2):
            if name == "dense":  # cuBLAS takes another kernel for an odd address, with sums in another order
                torch.testing.assert_close(call(odd), call(even))
            else:
                assert torch.equal(call(odd), call(even)), name


def test_on_two_streams(calls, make_x):
    inputs = [make_x((16, K), torch.bfloat16, seed).cuda() for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for name, call in calls.items():
        if name == "dense":
            continue  # cuBLAS may compute otherwise on another stream
        wanted = [call(x) for x in inputs]
        torch.cuda.synchronize()
        for _ in range(20):
            outputs = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(call(x))
            torch.cuda.synchronize()
            for got, want in zip(outputs, wanted, strict=True):
                assert torch.equal(got, want), name


def test_in_a_graph_and_after_its_capture(calls, make_x):
    x = make_x((8, K), torch.bfloat16).cuda()
    for name, call in calls.items():
        want = call(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(x)
        assert torch.equal(call(x), want), name
        for _ in range(3):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, want), name
            assert torch.equal(call(x), want), name


def test_from_a_second_thread(calls, make_x):
    x = make_x((8, K), torch.bfloat16).cuda()
    wanted = {name: call(x) for name, call in calls.items()}
    torch.cuda.synchronize()
    found, errors = [], []

    def run():
        try:
            for _ in range(10):
                found.append({name: call(x) for name, call in calls.items()})
            torch.cuda.synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for results in found:
        for name, got in results.items():
            assert torch.equal(got, wanted[name]), name


def test_an_idle_device_is_not_the_current_one(calls, make_x):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = make_x((8, K), torch.bfloat16).cuda()
    wanted = {name: call(x) for name, call in calls.items()}
    with torch.cuda.device(1):
        for name, call in calls.items():
            assert torch.equal(call(x), wanted[name]), name


@pytest.mark.parametrize("name", ["chosen", "rows", "low_bit", "hadamard", "two launches", "hadamard_quantize"])
@pytest.mark.parametrize("first_use", [True, False], ids=["cold", "warm"])
def test_reduce_overhead(calls, make_x, monkeypatch, name, first_use):
    """Nothing that lasts may come out of the pool of the graphs, even if it is first needed there."""
    x, call = make_x((8, K), torch.bfloat16).cuda(), calls[name]
    want = call(x)
    torch.cuda.synchronize()
    if first_use:
        monkeypatch.setattr(workspace, "_reserves", {})
        monkeypatch.setattr(workspace, "_by_stream", {})
        monkeypatch.setattr(hadamard_launch, "_plans", launch_plan.PlanCache())
        hadamard_launch.operand.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x) * 2, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x), want * 2)
    assert torch.equal(call(x), want)


def test_prepared_rotations_can_be_captured_at_once(make_x):
    transform = factor_hadamard(1536)
    hadamard_launch.operand.cache_clear()
    hadamard_launch._plans.clear()
    x = make_x((4, 1536), torch.bfloat16).cuda()
    want = hadamard(x, transform)  # compiles: a capture does not
    hadamard_launch.operand.cache_clear()
    hadamard_launch._plans.clear()
    prepare_hadamard(transform, "cuda", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hadamard(x, transform)
    graph.replay()
    assert torch.equal(captured, want)


def test_hooks_of_triton_see_every_launch(calls, make_x):
    runtime = launch_plan._runtime
    if not hasattr(runtime.launch_enter_hook, "add"):
        pytest.skip("this Triton has one hook, not a chain")
    x, seen = make_x((8, K), torch.bfloat16).cuda(), []
    want = calls["warp_k"](x)
    hook = seen.append
    runtime.launch_enter_hook.add(hook)
    try:
        assert torch.equal(calls["warp_k"](x), want)
    finally:
        runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
    calls["warp_k"](x)
    assert len(seen) == 1


def test_profiles_show_the_ops(calls, make_x):
    x = make_x((8, K), torch.bfloat16).cuda()
    calls["chosen"](x)
    with torch.profiler.profile() as profile:
        calls["chosen"](x)
    assert any(event.key == "sliderquant_kernels::weight_only_linear" for event in profile.key_averages())
