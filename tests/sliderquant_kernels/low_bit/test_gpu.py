"""Low-bit linears and the quantization of activations on a GPU: the int8 instructions and the PTX themselves."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import QuantizedActivations, choose_low_bit_layout, low_bit_linear, quantize_activations
from sliderquant_kernels.low_bit import launch
from sliderquant_kernels.low_bit.tiles import VARIANTS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]

_SCHEMES = [
    (bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product((2, 4, 8), (None, 32, 128), (True, False))
    if bits != 8 or group_size is None or symmetric
]


def _on(device, weight, n, k, group_size, symmetric):
    layout = choose_low_bit_layout(weight.bits, n, k, group_size, symmetric, device)
    return layout, layout.pack(*(None if part is None else part.to(device) for part in weight[:3]))


def _moved(activations, device):
    return QuantizedActivations(*(None if part is None else part.to(device) for part in activations))


@pytest.mark.parametrize("x_symmetric", [True, False], ids=["x-sym", "x-asym"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), _SCHEMES)
def test_equals_the_cpu(bits, group_size, symmetric, x_symmetric, make_weight, make_x):
    """Per channel to the last bit, since sums are exact and the rest is the same fp32; in groups but for its order."""
    for (n, k), m in itertools.product(((256, 1024), (200, 384)), (1, 3, 16, 17, 64, 65, 300)):
        weight = make_weight(bits, n, k, group_size, symmetric, torch.float32)
        x = quantize_activations(make_x((m, k), torch.float16) + 0.2, 8, x_symmetric)
        layout, packed = _on("cpu", weight, n, k, group_size, symmetric)
        want = low_bit_linear(x, packed, layout, torch.float32)
        layout, packed = _on("cuda", weight, n, k, group_size, symmetric)
        for variant in VARIANTS if group_size is None else VARIANTS[:2]:
            got = low_bit_linear(_moved(x, "cuda"), packed, layout, torch.float32, variant=variant).cpu()
            if group_size is None:
                assert torch.equal(got, want), (m, n, k, variant)
            else:
                assert ((got - want).norm() <= 1e-5 * want.norm()).item()


def test_no_sum_overflows_at_the_documented_bound(make_x):
    from sliderquant_kernels.low_bit import fragments as int8_fragments

    k = int8_fragments.MAX_K[8] // 32 * 32
    codes = torch.full((64, k), 255, dtype=torch.uint8)
    zero = torch.zeros(64, 1, dtype=torch.uint8)
    layout = choose_low_bit_layout(8, 64, k, None, False, "cuda")
    packed = layout.pack(codes.cuda(), torch.ones(64, 1, device="cuda"), zero.cuda())
    x = QuantizedActivations(
        torch.full((2, k), 127, dtype=torch.int8, device="cuda"),
        torch.ones(2, device="cuda"),
        torch.full((2,), -128, dtype=torch.int32, device="cuda"),
        torch.full((2,), 127 * k, dtype=torch.int32, device="cuda"),
    )
    for variant in VARIANTS:
        y = low_bit_linear(x, packed, layout, torch.float32, variant=variant)
        assert (y == torch.tensor(float(255 * 255 * k))).all(), variant


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantized_activations_equal_the_cpu(dtype, bits, symmetric, make_x):
    for k in (64, 77, 4096, 28672):
        x = make_x((5, k), dtype) * 2
        for kwargs in ({}, {"norm_weight": make_x((k,), dtype, 2)}, {"gate": make_x((5, k), dtype, 3)}):
            clip = (0.93, 0.41) if k % 2 else None
            want = quantize_activations(x, bits, symmetric, clip=clip, **kwargs)
            moved = {name: tensor.cuda() for name, tensor in kwargs.items()}
            got = _moved(quantize_activations(x.cuda(), bits, symmetric, clip=clip, **moved), "cpu")
            # The fused steps may round one value in many to its neighbour in `dtype`: of few values, one.
            different = got.codes != want.codes
            assert different.sum() <= (max(1, different.numel() // 1000) if kwargs else 0)
            assert (got.codes.int() - want.codes.int()).abs().max() <= 1
            assert ((got.scale - want.scale).abs() <= want.scale * (0 if not kwargs else 2.0**-7)).all()
            assert torch.equal(got.token_sum, got.codes.int().sum(-1).int())


def test_cuda_graph_and_compile(make_weight, make_x):
    weight = make_weight(4, 256, 1024, None, True, torch.float32)
    layout, packed = _on("cuda", weight, 256, 1024, None, True)

    def function(x):
        return low_bit_linear(quantize_activations(x, 4, clip=(0.9, 0.8)), packed, layout, x.dtype)

    x = make_x((5, 1024), torch.bfloat16).cuda()
    want = function(x)
    assert torch.equal(torch.compile(function, fullgraph=True)(x), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(x)
    graph.replay()
    assert torch.equal(got, want)
