"""Low-bit activations: the oracle of codes, what providers are held to, what the subsets hold, and the goals."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.kernels.harness import shapes
from benchmarks.kernels.harness.case import Case
from benchmarks.kernels.harness.checking import compare
from benchmarks.kernels.harness.figures import derive
from benchmarks.kernels.harness.shapes import TOKENS, Layer
from benchmarks.kernels.low_bit import linear, quantize
from benchmarks.kernels.low_bit.linear import providers
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.shared import inputs
from benchmarks.kernels.shared.schemes import ActivationScheme, LowBitScheme, fused_before
from sliderquant_kernels import LowBitLayout, reference
from sliderquant_kernels.activations import op as activations
from sliderquant_kernels.common import choices
from sliderquant_kernels.low_bit import tiles as low_bit_tiles

CPU = torch.device("cpu")


def _quantized(scheme, dtype="bf16", m=9, k=200, provider="sliderquant"):
    """Operands, the provider's prepared call, and its result as it is compared."""
    case = Case(quantize.NAME, "test", (k,), m, scheme, dtype)
    given = quantize.operands(case, CPU)
    prepared = quantize.PROVIDERS[provider].prepare(given)
    return given, prepared, prepared.call(given.x, prepared.tensors)


def _verdict(given, prepared, result):
    return compare(prepared.compared(result), quantize.expected(given, given.x, prepared))


def _product(scheme, dtype="bf16", m=5, shape=(96, 256), provider="sliderquant"):
    case = Case(linear.NAME, "test", shape, m, scheme, dtype)
    given = linear.operands(case, CPU)
    prepared = linear.PROVIDERS[provider].prepare(given)
    x = linear.activations(case, given)
    return given, prepared, x, prepared.call(x, tuple(tensor.clone() for tensor in prepared.tensors))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["A4", "A4-sym", "A8", "A8-sym"])
def test_codes_are_those_of_the_reference(scheme, dtype):
    given, *_ = _quantized(scheme, dtype)
    parsed = ActivationScheme.parse(scheme)
    found = inputs.codes(given.x, given.norm_weight, parsed, torch.arange(9))
    codes, scale, zero = reference.quantize_activations(given.x, parsed.bits, parsed.symmetric)
    assert torch.equal(found.steps, codes - zero[:, None])
    assert torch.equal(found.scale, scale[:, None])
    assert torch.equal(found.zero, zero[:, None])
    # What the roundings of fp32 can decide is little.
    assert int(found.steps_off.amax()) <= 1
    assert float(found.steps_off.mean()) < 0.02


@pytest.mark.parametrize("provider", ["sliderquant", "sliderquant-unfused", "copy"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "scheme", ["A4", "A4-packed", "A8-sym", "A4+rms_norm", "A8+silu_mul", "A4-sym-packed+rms_norm"]
)
def test_quantizing_is_right(scheme, dtype, provider):
    if quantize.PROVIDERS[provider].accepts(Case(quantize.NAME, "", (200,), 1, scheme, dtype)) is not None:
        assert "+" not in scheme
        return
    assert _verdict(*_quantized(scheme, dtype, provider=provider)).correct


def test_a_norm_that_is_rounded_once_passes_only_unfused():
    given, fused, _ = _quantized("A8+rms_norm", m=64)
    unfused = quantize.PROVIDERS["sliderquant-unfused"].prepare(given)
    scheme, rows = given.scheme, torch.arange(64)
    once = inputs.prepared_fp64(given.x, given.norm_weight, scheme, rows).bfloat16()
    result = activations.quantize_activations(once, 8, False)
    assert _verdict(given, unfused, result).correct
    assert not _verdict(given, fused, result).correct


def _off_by_one(result):
    codes = result.codes.clone()
    codes[3, 5] += 1 if codes[3, 5] < 0 else -1
    return result._replace(codes=codes, token_sum=codes.sum(-1).int())


def _wrong_sum(result):
    return result._replace(token_sum=result.token_sum + (torch.arange(9) == 4))


def _wrong_scale(result):
    return result._replace(scale=result.scale * (1 + 1e-5))


def _wrong_zero_point(result):
    return result._replace(zero_point=result.zero_point + (torch.arange(9) == 2).int())


def _not_a_number(result):
    scale = result.scale.clone()
    scale[1] = float("nan")
    return result._replace(scale=scale)


@pytest.mark.parametrize("mistake", [_off_by_one, _wrong_sum, _wrong_scale, _wrong_zero_point, _not_a_number])
@pytest.mark.parametrize("scheme", ["A4", "A8+rms_norm", "A4+silu_mul"])
def test_mistakes_of_quantizing_are_found(scheme, mistake):
    given, prepared, result = _quantized(scheme)
    assert _verdict(given, prepared, result).correct
    assert not _verdict(given, prepared, mistake(result)).correct


def test_other_mistakes_of_quantizing_are_found():
    given, prepared, result = _quantized("A4-packed+silu_mul")
    swapped = result.codes << 4 | result.codes >> 4
    assert not _verdict(given, prepared, result._replace(codes=swapped)).correct
    other = quantize.PROVIDERS["sliderquant"].prepare(replace(given, x=given.x.flip(0)))  # gate and up
    assert not _verdict(given, prepared, other.call(given.x, other.tensors)).correct
    given, prepared, result = _quantized("A4+rms_norm")
    assert not _verdict(given, prepared, prepared.call(given.x, (given.x, torch.ones_like(given.norm_weight)))).correct
    given, prepared, result = _quantized("A4-sym")
    truncated = torch.trunc(given.x.float() / result.scale[:, None]).to(torch.int8)
    result = result._replace(codes=truncated, token_sum=truncated.sum(-1).int())
    assert not _verdict(given, prepared, result).correct
    given, prepared, result = _quantized("A4", provider="copy")
    assert not _verdict(given, prepared, result * 1.01).correct


@pytest.mark.parametrize("provider", ["onednn", "sliderquant", "sliderquant-unfused"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "scheme", ["W4A4", "W4A8-sym-act-sym", "W8A8", "W2A8", "W4A4-g128", "W4A4+rms_norm", "W4A8+silu_mul"]
)
def test_products_are_right(scheme, dtype, provider):
    given, prepared, x, y = _product(scheme, dtype, provider=provider)
    assert y.dtype == x.dtype
    assert compare(y, linear.expected(given, x, prepared)).correct


@pytest.mark.parametrize("provider", ["onednn", "sliderquant", "sliderquant-unfused"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("k", [256, 224, 376])  # a Sylvester matrix, one that is not symmetric, blocks
@pytest.mark.parametrize(
    "scheme",
    [
        "W4A4+silu_mul+hadamard",
        "W8A8+silu_mul+hadamard+residual",
        "W4A8-sym-act-sym+hadamard",
        "W4A4+rms_norm+residual",
    ],
)
def test_whole_layers_are_right(scheme, k, dtype, provider):
    given, prepared, x, y = _product(scheme, dtype, shape=(96, k), provider=provider)
    assert y.dtype == x.dtype
    assert (given.residual is None) == ("residual" not in scheme)
    assert compare(y, linear.expected(given, x, prepared)).correct


def test_mistakes_of_whole_layers_are_found():
    given, prepared, x, y = _product("W4A4+silu_mul+hadamard+residual", shape=(96, 224))
    expected = linear.expected(given, x, prepared)
    assert compare(y, expected).correct
    mistakes = [
        replace(given, transform=None),
        replace(given, transform=replace(given.transform, orders=given.transform.orders[::-1])),
        replace(given, residual=None),
        replace(given, residual=given.residual.flip(0)),
        replace(given, residual=2 * given.residual),
    ]
    for wrong in mistakes:
        other = linear.PROVIDERS["sliderquant"].prepare(wrong)
        assert not compare(other.call(x, other.tensors), expected).correct
    assert not compare(prepared.call(x.flip(0), prepared.tensors), expected).correct  # gate and up
    # The 16-bit baseline has the rotation in its weight, and quantizes nothing.
    dense = linear.PROVIDERS["onednn"].prepare(given)
    y = dense.call(x, dense.tensors)
    assert compare(y, linear.expected(given, x, dense)).correct
    assert not compare(y, expected).correct
    stored = given.weight.weight(given.weight.dtype)
    assert not compare(dense.call(x, (stored,)), linear.expected(given, x, dense)).correct


@pytest.mark.parametrize("scheme", ["W4A4", "W4A4+rms_norm", "W4A4+silu_mul"])
def test_mistakes_of_products_are_found(scheme):
    given, prepared, x, y = _product(scheme)
    expected = linear.expected(given, x, prepared)
    assert compare(y, expected).correct
    _, _, _, dense = _product(scheme, provider="onednn")
    assert not compare(dense, expected).correct  # not quantized
    more = ActivationScheme(8, fused=given.scheme.activations.fused)
    finer = linear.PROVIDERS["sliderquant"].prepare(replace(given, scheme=replace(given.scheme, activations=more)))
    assert not compare(finer.call(x, finer.tensors), expected).correct
    weight, scale, constants, *norm = prepared.tensors
    wrong = prepared.call(x, (weight, scale, constants + 1, *norm))
    assert not compare(wrong, expected).correct
    swapped = y.clone()
    swapped[:, [0, 1]] = y[:, [1, 0]]
    assert not compare(swapped, expected).correct


@pytest.mark.parametrize("scheme", ["W4A4", "W4A4+rms_norm", "W4A8-sym-act-sym", "W8A8+silu_mul", "W2A8"])
def test_humming(modules, unpack_words, pack_words, scheme):
    """On a stand-in that reads what humming documents."""

    class Schema:
        def __init__(self, **fields):
            self.__dict__ |= fields

    def transform(tensors, n, k, weight, activations, torch_dtype, device):
        assert set(tensors) == {"weight", "weight_scale"}
        assert weight.weight_scale_group_size == 0
        return (int(weight.b_dtype[-1]), int(activations.a_dtype[-1])), tensors

    def humming_forward(config, x, weight, weight_scale, locks, tuning_config):
        bits, x_bits = config
        largest = 2 ** (x_bits - 1) - 1
        scale = x.float().abs().amax(-1, keepdim=True) / largest
        codes = (x.float() * (1 / scale)).round().clamp(-largest - 1, largest)
        total = codes.double() @ (unpack_words(weight, bits) - 2 ** (bits - 1)).double().t()
        return (total * scale).to(x.dtype) * weight_scale.t()

    modules("humming.schema", HummingWeightSchema=Schema, HummingInputSchema=Schema)
    modules("humming.ops", pack_weight=pack_words)
    modules("humming.transform", prepare_and_transform_humming_tensors=transform)
    modules("humming.tune", get_heuristics_config=lambda config, shape_m, device: {"m": shape_m})
    modules("humming.forward", humming_forward=humming_forward)
    given, prepared, x, y = _product(scheme, shape=(64, 256), provider="humming")
    expected = linear.expected(given, x, prepared)
    assert compare(y, expected).correct
    ours = linear.PROVIDERS["sliderquant"].prepare(given)
    assert not compare(ours.call(x, ours.tensors), expected).correct  # another grid


@pytest.mark.parametrize(
    ("scheme", "accepted"),
    [
        ("W4A4", True),
        ("W2A8", True),
        ("W4A8+rms_norm", True),
        ("W8A4", False),
        ("W4A4-g128", False),
        ("W4A4+hadamard", False),
        ("W4A4+residual", False),
    ],
)
def test_what_humming_accepts(scheme, accepted):
    reason = linear.PROVIDERS["humming"].accepts(Case(linear.NAME, "", (128, 128), 1, scheme, "bf16"))
    assert (reason is None) is accepted
    assert accepted or scheme in reason


def test_variants_share_the_packed_weight():
    given, prepared, *_ = _product("W4A4+rms_norm")
    again = linear.PROVIDERS["sliderquant-unfused"].prepare(given)
    assert [tensor.data_ptr() for tensor in again.tensors] == [tensor.data_ptr() for tensor in prepared.tensors]


def test_bytes_that_cannot_be_avoided():
    def moved(scheme, provider):
        _, prepared, _ = _quantized(scheme, m=16, k=1000, provider=provider)
        return quantize.work(Case(quantize.NAME, "", (1000,), 16, scheme, "bf16"), prepared).bytes

    assert moved("A4", "copy") == 16 * 4000
    assert moved("A4+silu_mul", "copy") == 16 * 8000
    assert moved("A4", "sliderquant") == 16 * (2000 + 1000 + 12)
    assert moved("A4-sym-packed", "sliderquant") == 16 * (2000 + 500 + 8)
    assert moved("A8+rms_norm", "sliderquant") == 16 * (2000 + 1000 + 12) + 2000
    assert moved("A8+silu_mul", "sliderquant") == 16 * (4000 + 1000 + 12)
    case = Case(linear.NAME, "", (96, 256), 5, "W4A4+silu_mul", "bf16")
    _, prepared, *_ = _product(case.scheme)
    assert linear.work(case, prepared) == (prepared.bytes() + 5 * 2 * (96 + 512), 2 * 5 * 96 * 256)
    case = replace(case, scheme="W4A4+silu_mul+hadamard+residual")
    _, prepared, *_ = _product(case.scheme)
    assert linear.work(case, prepared) == (prepared.bytes() + 5 * 2 * (2 * 96 + 512), 2 * 5 * 96 * 256)


def test_large_inputs_come_from_memory():
    assert not _quantized("A4", m=4, k=512)[1].cold
    assert _quantized("A4", m=1024, k=512)[1].cold
    assert _quantized("A4", m=1024, k=512, provider="copy")[1].cold


@pytest.mark.parametrize(
    "name",
    [
        "W4A4", "W8A8-sym-act-sym", "W2A8-g64-act-sym", "W4A4-g128-sym+rms_norm", "W4A4+hadamard",
        "W4A8-sym+silu_mul+hadamard+residual", "W8A8+residual",
    ],
)  # fmt: skip
def test_schemes_are_read_as_they_are_written(name):
    assert str(LowBitScheme.parse(name)) == name


@pytest.mark.parametrize("name", ["A4", "A8-sym", "A4-sym-packed+silu_mul", "A8+rms_norm"])
def test_schemes_of_activations_are_read_as_they_are_written(name):
    assert str(ActivationScheme.parse(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "W3A4", "W4A16", "A8-packed", "W4A4+gelu", "A4-packed-sym", "W4A4+rms_norm+hadamard", "W4A4+residual+hadamard",
        "A4+hadamard", "A4+residual",
    ],
)  # fmt: skip
def test_other_schemes_are_errors(name):
    with pytest.raises(ValueError, match="scheme: expected"):
        (LowBitScheme if name.startswith("W") else ActivationScheme).parse(name)


@pytest.mark.parametrize("op", [linear, quantize], ids=lambda op: op.NAME)
@pytest.mark.parametrize(("subset", "device"), [("quick", "cuda"), ("full", "cuda"), ("quick", "cpu"), ("tiny", "cpu")])
def test_every_case_has_its_baseline_and_no_row_comes_twice(op, subset, device):
    plan = op.plan(subset, device)
    for tasks in plan:
        keys = [(task.case.key, task.provider) for task in tasks]
        assert len(keys) == len(set(keys))
        assert all(device in op.PROVIDERS[task.provider].devices for task in tasks)
    cases = {task.case.key for task in plan.timings}
    assert {task.case.key for task in plan.timings if task.provider == op.BASELINE[device]} == cases
    with pytest.raises(ValueError, match="expected one of quick, tiny on cpu, got 'full'"):
        op.plan("full", "cpu")


def test_full_holds_every_shape_for_all_tokens():
    timings = linear.plan("full", "cuda").timings
    found = {(task.provider, task.case.scheme, task.case.shape, task.case.m) for task in timings}
    wanted = {((layer.n, layer.k), m) for layer, m in product(shapes.every_layer(), TOKENS)}
    for provider in ("cublas", "sliderquant", "sliderquant:rows"):
        assert {(*key[2:],) for key in found if key[:2] == (provider, "W4A4")} == wanted
    steps = ("rms_norm", "silu_mul", "silu_mul+hadamard")
    for provider, fused in product(("cublas", "sliderquant", "sliderquant-unfused"), steps):
        tokens = {key[3] for key in found if key[:2] == (provider, f"W4A4+{fused}")}
        assert tokens == set(TOKENS)
    assert {(f"{scheme}+{fused}") for scheme, fused in product(("W4A8", "W8A8"), steps)} <= {key[1] for key in found}
    assert {key[1] for key in found} >= {"W4A8", "W8A8", "W2A8", "W4A4-g128", "W4A4-sym-act-sym"}
    sizes = {task.case.shape[0] for task in quantize.plan("full", "cuda").timings if task.case.scheme == "A4"}
    assert sizes == {layer.k for layer in shapes.every_layer()}


def test_quick_is_small_and_begins_with_what_the_goals_ask():
    timings = linear.plan("quick", "cuda").timings
    assert len(timings) <= 200
    ours = [(task.case.scheme, task.case.shape, task.case.m) for task in timings if task.provider == "sliderquant"]
    layers = ((28672, 4096), (8192, 28672), (14336, 4096), (4096, 4096))
    first = list(product(["W4A4"], layers, (1, 16, 2048, 4096)))
    assert set(ours[: len(first)]) == set(first)
    assert {scheme for scheme, *_ in ours} >= {"W4A4+rms_norm", "W4A4+silu_mul", "W4A8", "W8A8", "W2A8"}
    whole = "+silu_mul+hadamard+residual"
    for layer in ((4096, 14336), (3584, 18944)):
        assert {(f"W4A4{whole}", layer, m) for m in (1, 16, 2048, 4096)} <= set(ours)
    for scheme, m in product(("W4A8", "W8A8"), (1, 2048)):
        assert {(f"{scheme}+rms_norm", (28672, 4096), m), (f"{scheme}{whole}", (4096, 14336), m)} <= set(ours)
    rows = quantize.plan("quick", "cuda").timings
    assert len(rows) < 60
    assert {task.case.m for task in rows[: len(rows) // 3]} == {2048}
    assert {task.case.scheme for task in rows} >= {"A4", "A4+rms_norm", "A4+silu_mul", "A8", "A4-packed"}


def test_checks_reach_every_variant_and_width():
    checks = linear.plan("quick", "cuda").checks
    names = [providers.name_of(variant) for variant in low_bit_tiles.VARIANTS]
    found = {(task.provider, task.case.dtype, task.case.scheme[:4]) for task in checks}
    assert found >= set(product(names, ("bf16", "fp16"), ("W4A4", "W4A8", "W8A8", "W2A8")))
    assert {task.provider for task in checks} == {*names, "sliderquant", "sliderquant-unfused"}
    assert {task.case.shape for task in checks} == {(1024, 2048), (1000, 1056)}
    found = {task.case.scheme for task in quantize.plan("quick", "cuda").checks}
    assert found >= set(map("".join, product(("A4", "A4-sym", "A8", "A8-sym"), ("", "+rms_norm", "+silu_mul"))))


@pytest.mark.parametrize(
    ("name", "fused"),
    [("x o, x q", None), ("x qkv", "rms_norm"), ("x/8 down", "silu_mul"), ("x gate_up", "rms_norm"), ("k", "rms_norm")],
)
def test_what_stands_before_a_layer(name, fused):
    assert fused_before(Layer(name, 1, 1)) == fused


def test_variants_are_told_apart_where_they_compile(monkeypatch):
    monkeypatch.setattr(providers, "current_device", lambda: choices.Device.typical(90))

    def key(m, scheme="W4A4", provider="sliderquant", dtype="bf16"):
        return linear.PROVIDERS[provider].compilation(Case(linear.NAME, "", (4096, 4096), m, scheme, dtype))

    assert key(1024) == key(2048) != key(4096)
    assert key(2) == key(4)
    assert key(4096, "W4A4+rms_norm", "sliderquant-unfused") == key(4096)
    rotated = "W4A4+silu_mul+hadamard"
    assert key(4096, rotated, "sliderquant-unfused") != key(4096, "W4A4+hadamard")
    assert key(4096, f"{rotated}+residual", "sliderquant-unfused") == key(4096, rotated, "sliderquant-unfused")
    assert len({key(4096, scheme) for scheme in ("W4A4", "W4A4+residual", rotated, "W4A4+silu_mul")}) == 4
    assert key(4096, provider="sliderquant:rows") == key(2048)
    different = [key(1), key(2), key(16), key(64), key(2048), key(4096), key(2, "W4A8")]
    assert len({*different, key(2, dtype="fp16"), key(2, "W4A4+rms_norm"), key(2, "W4A4-g128")}) == 10


def test_the_kernel_is_named():
    layout = LowBitLayout("triton_int8", 4, 28672, 4096, None, False)
    for m, variant in ((1, "warp_k"), (64, "rows"), (4096, "tiles")):
        chosen = providers.choice(m, layout, None, choices.Device.typical(90))
        assert providers.describe(chosen).startswith(f"{variant} {chosen.block_m} x ")
        assert providers.describe(chosen).endswith(chosen.reason)


@pytest.mark.parametrize(
    ("variant", "m", "scheme", "accepted"),
    [
        ("warp_k", 16, "W4A4", True),
        ("warp_k", 32, "W4A4", False),
        ("tiles", 32, "W4A4", False),
        ("tiles", 4096, "W4A4+rms_norm", True),
        ("tiles", 4096, "W4A4-g128", False),
        ("rows", 4096, "W4A4-g128", True),
    ],
)
def test_what_variants_accept(variant, m, scheme, accepted):
    reason = linear.PROVIDERS[f"sliderquant:{variant}"].accepts(Case(linear.NAME, "", (64, 128), m, scheme, "bf16"))
    assert (reason is None) is accepted


def _row(timed_row, op, provider, us, **more):
    return {**timed_row(provider, us, **more), "op": op}


def test_goals_of_the_linear(run_facts, timed_row):
    def row(provider, us, m, scheme="W4A4"):
        return _row(timed_row, linear.NAME, provider, us, m=m, scheme=scheme)

    rows = [
        row("cublas", 30.0, 2048), row("sliderquant", 15.0, 2048), row("sliderquant:tiles", 1000.0, 2048),
        row("cublas", 32.0, 2048, "W4A4+rms_norm"), row("sliderquant", 20.0, 2048, "W4A4+rms_norm"),
        row("cublas", 32.0, 2048, "W4A4+silu_mul+hadamard"), row("sliderquant", 20.5, 2048, "W4A4+silu_mul+hadamard"),
        row("cublas", 10.0, 16), row("sliderquant", 5.0, 16),
        row("cublas", 10.0, 16, "W8A8"), row("sliderquant", 50.0, 16, "W8A8"),
        row("cublas", 10.0, 64), row("sliderquant", 50.0, 64),
    ]  # fmt: skip
    runs = {0: run_facts()}
    many, few = linear.goals(derive(rows, runs, OPS), runs)
    assert (many.measured, many.passed, many.target) == (pytest.approx(32 / 20.5), True, 1.5)
    assert (few.measured, few.passed, few.target) == (pytest.approx(2.0), False, 2.5)
    assert few.where == "worst of 1: 4096x4096, M = 16"


def test_goals_of_quantizing(run_facts, timed_row):
    def row(provider, us, moved, m=2048, scheme="A4"):
        made = _row(timed_row, quantize.NAME, provider, us, m=m, scheme=scheme)
        return {**made, "shape": "4096", "bytes": moved, "flops": 0.0}

    rows = [
        row("copy", 10.0, 4e6), row("sliderquant", 8.0, 3e6),  # 7.5 us for as many bytes
        row("copy", 10.0, 4e6, scheme="A4+rms_norm"), row("sliderquant", 12.0, 3e6, scheme="A4+rms_norm"),
        row("copy", 1.0, 4e4, m=16), row("sliderquant", 9.0, 3e4, m=16),
    ]  # fmt: skip
    runs = {0: run_facts()}
    plain, fused = quantize.goals(derive(rows, runs, OPS), runs)
    assert (plain.measured, plain.passed, plain.at_least) == (pytest.approx(8 / 7.5), True, False)
    assert (fused.measured, fused.passed, fused.target) == (pytest.approx(1.6), False, 1.2)


@pytest.mark.parametrize("op", [linear, quantize], ids=lambda op: op.NAME)
def test_goals_without_rows_are_not_measured(op, run_facts, timed_row):
    rows = [_row(timed_row, op.NAME, "sliderquant", 1.0, scheme="W4A4", m=4096)]
    for runs, kept in (({0: run_facts()}, []), ({0: run_facts(device="cpu")}, rows)):
        assert {goal.passed for goal in op.goals(derive(kept, runs, OPS), runs)} == {None}
