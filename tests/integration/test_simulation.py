"""What runs after loading is what was trained, layer by layer: the layers that learning, or a one-shot method, leaves
behind, whose quantizers are simulated in fp32, against those of the loaded checkpoint, on the same inputs. On CPU
kernels, and on the Triton kernels in the interpreter."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import sliderquant
from sliderquant import pipeline
from sliderquant.baselines import walk
from sliderquant.modules import attention, linear, rotated
from sliderquant.modules.merged import MergedLinear
from sliderquant.refine.layer import refined_linears
from sliderquant.schemes import ModelScheme
from sliderquant_kernels import LowBitLayout, QuantizedActivations

ALL = ("R1", "R2", "R3", "R4")
IDS = torch.randint(2, 2000, (2, 13), generator=torch.Generator().manual_seed(5))
# What may be learned without learning every weight.
LOW_RANK = {
    "epochs": 2,
    "rank": 32,
    "clipping_start": "search",
    "scales": {"start": "outliers", "space": "log"},
    "activation_clipping": "auto",
}
RTN = {"rank": 0, "clipping": False, "epochs": 1, "scales": {"use": "never"}}


@pytest.fixture(scope="module")
def original(random_model, tmp_path_factory):
    """Biases on q, k and v, grouped-query attention, tied embeddings, an intermediate size of 3 * 2^5."""
    return random_model(tmp_path_factory.mktemp("simulation") / "model", dtype="float32", model_type="qwen2")


@pytest.fixture
def quantize(original, tmp_path, calibration_file, monkeypatch):
    def run(scheme, rotate=(), method="sliderquant-published", **settings):
        trained = {}

        def kept(plan, decoder, blocks, seed, device, emit, progress):
            def emit_and_keep(index, layer, *rest):
                trained[index] = copy.deepcopy(layer)
                emit(index, layer, *rest)

            return refine_model(plan, decoder, blocks, seed, device, emit_and_keep, progress)

        refine_model = pipeline.refine_model
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "refine_model", kept)
            result = sliderquant.quantize(
                original, tmp_path / "out", scheme, method, settings=settings, rotate=rotate, device="cpu",
                calibration=str(calibration_file), samples=4, seqlen=32, overwrite=True,
            )  # fmt: skip
        return result, [trained[index] for index in sorted(trained)]

    return run


@pytest.fixture
def compensate(original, tmp_path, calibration_file, monkeypatch):
    def run(method, scheme, rotate):
        left = []

        def kept(layer, dense):
            error = advance(layer, dense)
            left.append(layer.module)
            return error

        advance = walk._advance
        monkeypatch.setattr(walk, "_advance", kept)
        result = sliderquant.quantize(
            original, tmp_path / "out", scheme, method, rotate=rotate, device="cpu",
            calibration=str(calibration_file), samples=4, seqlen=32,
        )  # fmt: skip
        return result, left

    return run


@torch.no_grad()
def calls_of(model):
    """What each layer was called with, and its output."""
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, x, keywords, out: calls.append((x[0], keywords, out)), with_kwargs=True)
    model(input_ids=IDS, use_cache=False)
    return calls


@torch.no_grad()
def errors(calls, trained):
    """Of what each loaded layer adds to the residual stream, relative to what the trained one adds to the same."""
    found = []
    for layer, (x, keywords, out) in zip(trained, calls, strict=True):
        want = layer(x, **keywords) - x
        found.append((((out - x) - want).norm() / want.norm()).item())
    return found


SCHEMES = ("W4A16", "W2A16-g32", "W3A16-sym", "W4A16KV4", "W4A8KV8", "W8A8", "W4A4", "W4A4KV4", "W4A4KV4-g32-sym")


# In fp32 some 3e-7, until a value that lies on the middle of two codes is rounded the other way: then about the step of
# one value in a whole layer. (With symmetric activations the largest of every token does: see test_activations.)
@pytest.mark.parametrize("rotate", [(), ALL], ids=["plain", "rotated"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_learned(quantize, scheme, rotate):
    if "KV" not in scheme:
        rotate = tuple(name for name in rotate if name != "R3")
    parsed = ModelScheme.parse(scheme)
    grid = "range" if parsed.quantizes_activations else "free"
    result, trained = quantize(scheme, rotate, **LOW_RANK, grid=grid)
    rounds = parsed.quantizes_activations or parsed.quantizes_attention
    found = errors(calls_of(result.load(device="cpu", dtype="float32")), trained)
    assert max(found) < (5e-3 if rounds or rotate else 1e-6)


@pytest.mark.parametrize("rotate", [(), ALL], ids=["plain", "rotated"])
@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-g32-sym", "W4A4KV4", "W4A16KV4", "W4A8KV8-g32", "W4A4-act-sym"])
def test_every_weight_learned(quantize, scheme, rotate):
    if "KV" not in scheme:
        rotate = tuple(name for name in rotate if name != "R3")
    result, trained = quantize(scheme, rotate, "sliderquant", epochs=2, activation_clipping="always")
    moved = [linear.offset.abs().max() for layer in trained for linear in refined_linears(layer).values()]
    assert min(moved) > 0
    found = errors(calls_of(result.load(device="cpu", dtype="float32")), trained)
    assert max(found) < (1e-6 if scheme.endswith("A16") and not rotate else 5e-3)


@pytest.mark.parametrize("rotate", [(), ("R3",), ALL], ids=["plain", "R3", "rotated"])
@pytest.mark.parametrize(
    ("method", "scheme"),
    [("gptq", "W4A4KV4"), ("smoothquant", "W4A4KV4"), ("awq", "W4A16KV4"), ("gptq", "W3A16KV8-g32-sym")],
)
def test_one_shot(compensate, method, scheme, rotate):
    result, left = compensate(method, scheme, rotate)
    model = result.load(device="cpu", dtype="float32")
    assert (model.model.layers[0].self_attn.rounding.rotation is not None) == ("R3" in rotate)
    assert max(errors(calls_of(model), left)) < 5e-3


@pytest.mark.parametrize("rotate", [(), ALL], ids=["plain", "rotated"])
def test_rounded_to_nearest(quantize, original, tmp_path, rotate):
    result, trained = quantize("W4A4KV4", rotate, **RTN, activation_clipping="never")
    assert max(errors(calls_of(result.load(device="cpu", dtype="float32")), trained)) < 5e-3
    other = sliderquant.quantize(original, tmp_path / "rtn", "W4A4KV4", "rtn", rotate=rotate, device="cpu").path
    first, second = (load_file(path / "model.safetensors") for path in (result.path, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rotate", [(), ALL], ids=["plain", "rotated"])
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W2A8KV8-g32"])
def test_on_the_triton_kernels(quantize, monkeypatch, scheme, rotate):
    pytest.importorskip("triton")
    from sliderquant_kernels.activations import kernels as activations_triton
    from sliderquant_kernels.low_bit import launch as low_bit_launch
    from sliderquant_kernels.rotation import launch as hadamard_launch

    if not low_bit_launch.INTERPRETED:
        pytest.skip("the kernels were imported without TRITON_INTERPRET=1; the GPU tests run them")
    calls = []

    def multiply(x, packed, layout, dtype, bias=None):
        calls.append("linear")
        return low_bit_launch.low_bit_linear(*x, *packed, bias, None, layout, dtype, None)

    def quantize_tokens(x, bits, symmetric, *, clip):
        calls.append("quantize")
        assert clip is not None
        codes, scale, zero, total = activations_triton.quantize_activations(
            x, bits, symmetric, None, 0.0, None, False, clip
        )
        return QuantizedActivations(codes, scale, None if symmetric else zero, total)

    def rotate_and_quantize(x, transform, bits, symmetric, signs, gate, clip):
        calls.append("rotate and quantize")
        assert clip is not None
        assert gate is None
        codes, scale, zero, total = hadamard_launch.hadamard_quantize(x, signs, None, transform, bits, symmetric, clip)
        return QuantizedActivations(codes, scale, None if symmetric else zero, total)

    result, trained = quantize(scheme, rotate, **RTN, activation_clipping="always", activation_clipping_start=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(linear, "choose_low_bit_layout", lambda *shape: LowBitLayout("triton_int8", *shape[:5]))
        patch.setattr(linear, "low_bit_linear", multiply)
        patch.setattr(linear, "quantize_activations", quantize_tokens)
        patch.setattr(attention, "quantize_activations", quantize_tokens)
        patch.setattr(rotated, "hadamard_quantize", rotate_and_quantize)
        model = result.load(device="cpu", dtype="float32")
        assert any(isinstance(module, MergedLinear) for module in model.modules())
        run = calls_of(model)
    assert max(errors(run, trained)) < 5e-3
    # A layer quantizes the inputs of qkv, o, gate and up, and down, and queries, keys and values.
    assert len(calls) == 2 * (4 + 4 + 3)
    assert calls.count("rotate and quantize") == (2 * 3 if rotate else 0)
