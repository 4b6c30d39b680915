"""The compiled rotations on a GPU. Run by itself on a machine with one."""

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels import factor_hadamard, hadamard, hadamard_quantize, quantize_activations, reference
from sliderquant_kernels.rotation import launch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]

_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
_SIZES = [1, 2, 6, 12, 64, 96, 128, 172, 188, 192, 256, 300, 592, 768, 1040, 1536, 2304, 4096, 4864]
_LARGE = [5120, 8192, 11008, 12288, 13824, 14336, 16384, 18944, 27648, 28672, 29568, 32768]


def _signs(n, dtype):
    return (torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(5)) * 2 - 1).to(dtype)


def _launches(x, transform):
    choice = launch.choose_hadamard(transform.orders, launch.device_of(x), x.dtype)
    return 2 if choice.leading > 1 else 1


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("n", _SIZES)
def test_equals_the_dense_matrix(n, dtype, make_x, assert_rotation_close):
    transform, signs = factor_hadamard(n), _signs(n, dtype)
    for m, sign, inverse in (
        (1, None, False),
        (3, signs, False),
        (300, None, True),
        (17, signs, True),
        (0, None, False),
    ):
        x = make_x((m, n), dtype)
        y = hadamard(x.cuda(), transform, None if sign is None else sign.cuda(), inverse=inverse)
        want = reference.hadamard(x, transform, sign, inverse)
        assert_rotation_close(y.cpu(), x, want, launches=_launches(y, transform))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("n", _LARGE)
def test_large_sizes_equal_the_cpu(n, dtype, make_x, assert_rotation_close):
    transform, signs = factor_hadamard(n), _signs(n, dtype)
    x = make_x((33, n), dtype)
    for inverse in (False, True):
        want = hadamard(x.float(), transform, signs.float(), inverse=inverse).double()
        y = hadamard(x.cuda(), transform, signs.cuda(), inverse=inverse)
        assert_rotation_close(y.cpu(), x, want, launches=_launches(y, transform))
        assert_rotation_close(hadamard(x.cuda(), transform).cpu(), x, hadamard(x.float(), transform).double(),
                              launches=_launches(y, transform))  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("n", _SIZES + _LARGE)
def test_fused_equals_unfused(n, dtype, symmetric, make_x):
    """Codes are within half a step, and a little for what precedes, of the rotated values that quantize in fp32."""
    transform = factor_hadamard(n)
    x, gate, signs = make_x((9, n), dtype), make_x((9, n), dtype, seed=2), _signs(n, dtype)
    gated = torch.nn.functional.silu(gate.float()).to(dtype) * x
    for given, options in ((x, {}), (gated * signs, {"gate": gate.cuda(), "signs": signs.cuda()})):
        want = hadamard(given.float(), transform).double()
        size = given.double().square().mean(-1).sqrt()
        choice = launch.choose_hadamard(transform.orders, launch.device_of(x.cuda()), dtype)
        rounded = choice.variant == "matmul" or choice.leading > 1 or transform.blocks > 1 or options
        lost = size * (2.0**-13 if not rounded or dtype == torch.float32 else 2.0**-4)
        for bits in (4, 8):
            got = hadamard_quantize(x.cuda(), transform, bits, symmetric, **options)
            scale = got.scale.cpu().double()
            codes, zero = got.codes.cpu().double(), torch.zeros(9, dtype=torch.float64)
            assert torch.equal(got.token_sum.cpu().long(), got.codes.cpu().long().sum(-1))
            if not symmetric:
                zero = got.zero_point.cpu().double()
            _, wanted_scale, _ = reference.quantize_activations(want, bits, symmetric)
            steps = (2**bits - 1) / 2 if symmetric else 2**bits - 1
            assert ((scale - wanted_scale).abs() <= 2 * lost / steps + 2.0**-20 * wanted_scale).all()
            quotient = (want / scale[:, None] + zero[:, None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            assert ((codes - quotient).abs() <= 0.5 + (lost / scale)[:, None] + 1e-3).all()


@pytest.mark.parametrize("n", [64, 1536, 14336, 18944])
def test_scales_are_those_of_quantizing_afterwards(n, make_x):
    """fp32: the same bits, with zero-points, but for ties."""
    transform, x = factor_hadamard(n), make_x((50, n), torch.float32).cuda()
    for symmetric in (True, False):
        for clip in (None, (0.93, 0.41)):
            fused = hadamard_quantize(x, transform, 8, symmetric, clip=clip)
            unfused = quantize_activations(hadamard(x, transform), 8, symmetric, clip=clip)
            assert torch.equal(fused.scale, unfused.scale)
            different = (fused.codes != unfused.codes).double().mean().item()
            assert different <= 1e-3 + (1 / n if symmetric else 0)


@pytest.mark.parametrize("n", [128, 4096, 14336, 28672])
def test_runs_and_batches_are_bitwise_equal(n, make_x):
    transform, x = factor_hadamard(n), make_x((3000, n), torch.bfloat16).cuda()
    whole = hadamard_quantize(x, transform, 8, False)
    for _ in range(5):
        again = hadamard_quantize(x, transform, 8, False)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rows in (slice(0, 1), slice(7, 20), slice(2000, 3000)):
        alone = hadamard_quantize(x[rows], transform, 8, False)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("n", [64, 768, 14336, 28672])
def test_cuda_graphs(n, make_x):
    transform, x = factor_hadamard(n), make_x((16, n), torch.bfloat16).cuda()
    want = hadamard(x, transform), hadamard_quantize(x, transform, 4, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = hadamard(x, transform), hadamard_quantize(x, transform, 4, False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_a_capture_before_the_first_call_is_refused(make_x):
    x = make_x((2, 1280), torch.float16).cuda()
    transform = factor_hadamard(1280)
    launch.operand.cache_clear()
    message = r"hadamard: the first rotation .* before capturing"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        hadamard(x, transform)


def test_gradient(make_x):
    transform, signs = factor_hadamard(14336), _signs(14336, torch.float32)
    x, gradient = make_x((4, 14336), torch.float32), make_x((4, 14336), torch.float32, seed=2)
    leaf = x.cuda().requires_grad_()
    hadamard(leaf, transform, signs.cuda()).backward(gradient.cuda())
    want = hadamard(gradient, transform, signs, inverse=True)
    torch.testing.assert_close(leaf.grad.cpu(), want, rtol=0, atol=2e-5)


def test_compiles_without_graph_breaks(make_x):
    transform = factor_hadamard(1536)
    compiled = torch.compile(lambda x: torch.relu(hadamard(x * 2, transform)), fullgraph=True)
    for m in (1, 5):
        x = make_x((m, 1536), torch.bfloat16).cuda()
        assert torch.equal(compiled(x), torch.relu(hadamard(x * 2, transform)))


def test_opcheck(make_x):
    x = make_x((3, 768), torch.bfloat16).cuda().requires_grad_()
    orders = factor_hadamard(768).orders
    torch.library.opcheck(torch.ops.sliderquant_kernels.hadamard.default, (x, None, 768, orders, False))
    arguments = (x.detach(), None, None, 768, orders, 4, False)
    torch.library.opcheck(torch.ops.sliderquant_kernels.hadamard_quantize.default, arguments)


def test_64_bit_offsets():
    """More than 2^31 values: 160,000 rows of 14336."""
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    transform = factor_hadamard(14336)
    x = torch.randn(160000, 14336, dtype=torch.bfloat16, device="cuda")
    y = hadamard(x, transform)
    assert torch.equal(y[-3:], hadamard(x[-3:], transform))
