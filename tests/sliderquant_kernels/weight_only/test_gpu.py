"""The compiled kernels on a GPU, PTX included: what the interpreter cannot run. Run by itself on a machine with one."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import WeightLayout, choose_layout, dequantize, reference, weight_only_linear
from sliderquant_kernels.common import launching
from sliderquant_kernels.weight_only import launch
from sliderquant_kernels.weight_only.tiles import VARIANTS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(launching.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]

_SCHEMES = list(itertools.product((2, 3, 4, 8), (32, 64, 128, None), (True, False)))
_TOKENS = (1, 3, 8, 16, 17, 33, 64, 65, 200)


def _cuda(weight, group_size):
    layout = choose_layout(
        weight.bits, *weight.codes.shape, group_size, weight.zero_point is None, "cuda", weight.scale.dtype
    )
    parts = (None if part is None else part.cuda() for part in weight[:3])
    return layout, layout.pack(*parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), _SCHEMES)
def test_every_variant(bits, group_size, symmetric, dtype, make_weight, make_x, assert_matmul_close):
    for n, k in ((256, 1024), (200, 384), (72, 640)):
        weight = make_weight(bits, n, k, group_size, symmetric, dtype)
        layout, packed = _cuda(weight, group_size)
        for m, variant in itertools.product(_TOKENS, VARIANTS):
            x = make_x((m, k), dtype)
            bias, residual = make_x((n,), dtype, seed=2), make_x((m, n), dtype, seed=3)
            y = weight_only_linear(x.cuda(), packed, layout, bias.cuda(), residual.cuda(), variant=variant).cpu()
            assert_matmul_close(y, x, weight, bias, residual, weights_rounded=variant == "dense")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), _SCHEMES)
def test_dequantize(bits, group_size, symmetric, dtype, make_weight):
    weight = make_weight(bits, 200, 384, group_size, symmetric, dtype)
    layout, packed = _cuda(weight, group_size)
    want = reference.dequantize(*weight)
    assert torch.equal(dequantize(packed, layout, dtype).cpu(), want.to(dtype))
    # Through the identity, every code and zero-point of the matmul kernels is seen by itself, exactly.
    if dtype != torch.float32:
        identity = torch.eye(384, dtype=dtype, device="cuda")
        for variant in ("warp_k", "rows"):
            got = weight_only_linear(identity, packed, layout, variant=variant).cpu().t()
            assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 77), (33, 100)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shapes_that_fill_no_tile(bits, n, k, make_weight, make_x, assert_matmul_close):
    weight = make_weight(bits, n, k, None, False, torch.float16)
    layout, packed = _cuda(weight, None)
    for m, variant in itertools.product((0, 1, 17), VARIANTS):
        x = make_x((m, k), torch.float16)
        y = weight_only_linear(x.cuda(), packed, layout, variant=variant).cpu()
        assert_matmul_close(y, x, weight, weights_rounded=variant == "dense")


@pytest.mark.parametrize("variant", ["warp_k", "rows"])
def test_runs_are_bitwise_equal(variant, make_weight, make_x):
    """Small N and large K: split over programs."""
    weight = make_weight(4, 256, 8192, 128, False, torch.bfloat16)
    layout, packed = _cuda(weight, 128)
    x = make_x((16, 8192), torch.bfloat16).cuda()
    assert launch.choose(launch.problem_of(layout, 16, x.dtype), launching.device_of(x), variant).split > 1
    first = weight_only_linear(x, packed, layout, variant=variant)
    for _ in range(20):
        assert torch.equal(first, weight_only_linear(x, packed, layout, variant=variant))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_batch_invariance(bits, make_weight, make_x):
    weight = make_weight(bits, 512, 4096, 128, False, torch.bfloat16)
    layout, packed = _cuda(weight, 128)
    x = make_x((300, 4096), torch.bfloat16).cuda()
    whole = weight_only_linear(x, packed, layout, batch_invariant=True)
    for rows in (slice(0, 1), slice(7, 20), slice(100, 300)):
        assert torch.equal(weight_only_linear(x[rows], packed, layout, batch_invariant=True), whole[rows])


@pytest.mark.parametrize("variant", [None, "warp_k", "rows", "dense"])
def test_cuda_graphs_on_two_streams(variant, make_weight, make_x):
    """Graphs captured on one stream and replayed at the same time on two: no counter is shared."""
    weight = make_weight(4, 256, 8192, 128, False, torch.bfloat16)
    layout, packed = _cuda(weight, 128)
    inputs = [make_x((16, 8192), torch.bfloat16, seed).cuda() for seed in (1, 2)]
    wanted = [weight_only_linear(x, packed, layout, variant=variant) for x in inputs]
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(weight_only_linear(x, packed, layout, variant=variant))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(outputs, wanted, strict=True):
        assert torch.equal(got, want)


def test_compiles_without_graph_breaks(make_weight, make_x):
    weight = make_weight(4, 256, 1024, 128, False, torch.bfloat16)
    layout, packed = _cuda(weight, 128)
    compiled = torch.compile(lambda x: torch.relu(weight_only_linear(x * 2, packed, layout)), fullgraph=True)
    for m in (1, 5):
        x = make_x((m, 1024), torch.bfloat16).cuda()
        assert torch.equal(compiled(x), torch.relu(weight_only_linear(x * 2, packed, layout)))


def test_opcheck(make_weight, make_x):
    weight = make_weight(4, 64, 128, 32, False, torch.bfloat16)
    layout, packed = _cuda(weight, 32)
    fields = (layout.kind, layout.bits, layout.n, layout.k, layout.group_size or 0, layout.symmetric)
    x = make_x((3, 128), torch.bfloat16).cuda()
    operands = (x, *packed, None, None)
    torch.library.opcheck(torch.ops.sliderquant_kernels.weight_only_linear.default, (*operands, *fields, "", False))


def test_64_bit_offsets(make_weight):
    """More than 2^31 elements of y: 70,000 tokens times 32,768 outputs."""
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    weight = make_weight(4, 32768, 64, 32, True, torch.bfloat16)
    layout, packed = _cuda(weight, 32)
    x = torch.randn(70000, 64, dtype=torch.bfloat16, device="cuda")
    y = weight_only_linear(x, packed, layout, variant="rows")
    want = weight_only_linear(x[-3:], packed, layout, variant="rows")
    assert torch.equal(y[-3:], want)


def test_layouts_pack_on_the_device(make_weight):
    weight = make_weight(3, 100, 160, 32, False, torch.float16)
    layout, packed = _cuda(weight, 32)
    assert all(part is None or part.is_cuda for part in packed)
    host = WeightLayout("triton", 3, 100, 160, 32, False).pack(*weight[:3])
    assert torch.equal(packed.weight.cpu(), host.weight)
    assert torch.equal(packed.scale.cpu(), host.scale)
    for got, want in zip(layout.unpack(packed), weight[:3], strict=True):
        assert torch.equal(got.cpu(), want)
