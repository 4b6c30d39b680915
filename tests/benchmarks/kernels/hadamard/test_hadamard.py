"""Rotations as they are measured: the oracle, what providers are held to, what the subsets hold, and the goals."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import hadamard as op
from benchmarks.kernels.hadamard.operands import ROTATE, scheme_of
from benchmarks.kernels.hadamard.providers import accepts_powers, prepare_unfused
from benchmarks.kernels.harness.case import Case, Unsupported
from benchmarks.kernels.harness.checking import compare
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.shared.rotations import rotated
from sliderquant_kernels import factor_hadamard, reference

CPU = torch.device("cpu")


def _call(scheme=ROTATE, n=96, m=9, dtype="bf16", provider="sliderquant"):
    case = Case(op.NAME, "test", (n,), m, scheme, dtype)
    given = op.operands(case, CPU)
    prepared = op.PROVIDERS[provider].prepare(given)
    return given, prepared, prepared.call(given.x, prepared.tensors)


def _verdict(given, prepared, result):
    return compare(prepared.compared(result), op.expected(given, given.x, prepared))


@pytest.mark.parametrize("n", [1, 8, 12, 96, 172, 188, 1040])
def test_the_oracle_is_the_dense_matrix(n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = factor_hadamard(n)
    torch.testing.assert_close(rotated(x, transform), reference.hadamard(x, transform), rtol=0, atol=1e-12)
    back = reference.hadamard(x, transform, inverse=True)
    torch.testing.assert_close(rotated(x, transform, inverse=True), back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("n", [96, 188, 1536])
@pytest.mark.parametrize("scheme", [ROTATE, "A4", "A8", "A4-sym", "A8-sym", "A4+silu_mul", "A8-sym+silu_mul"])
def test_providers_are_correct(scheme, n, dtype):
    for provider in ("copy", "sliderquant", "sliderquant-unfused"):
        if op.PROVIDERS[provider].accepts(Case(op.NAME, "", (n,), 1, scheme, dtype)) is None:
            assert _verdict(*_call(scheme, n, dtype=dtype, provider=provider)).correct, provider


def test_what_is_wrong_is_found():
    given, prepared, result = _call()
    assert not _verdict(given, prepared, result.roll(1, -1)).correct
    assert not _verdict(given, prepared, given.x).correct  # not rotated
    other = replace(given, transform=replace(given.transform, orders=(8, 12)))
    assert not _verdict(other, prepared, result).correct
    result[4, 7] += 0.05
    assert not _verdict(given, prepared, result).correct

    given, prepared, result = _call("A4+silu_mul")
    other = op.PROVIDERS["sliderquant"].prepare(replace(given, x=given.x.flip(0)))  # gate and up
    assert not _verdict(given, prepared, other.call(given.x, other.tensors)).correct
    for scheme in ("A8", "A8-sym"):
        given, prepared, result = _call(scheme)
        assert _verdict(given, prepared, result).correct
        assert not _verdict(given, prepared, result._replace(token_sum=result.token_sum + 1)).correct
        assert not _verdict(given, prepared, result._replace(scale=result.scale * 1.001)).correct
        codes = result.codes.clone()
        codes[2, 3] += 2 if codes[2, 3] < 100 else -2
        assert not _verdict(given, prepared, result._replace(codes=codes)).correct
    given, prepared, result = _call(provider="copy")
    assert not _verdict(given, prepared, result * 1.01).correct


def test_few_codes_may_be_either():
    given, prepared, _ = _call("A8", n=1536, m=64)
    found = op.expected(given, given.x, prepared)
    assert float((found.deviation[:, :1536] > 0).double().mean()) < 0.03


@pytest.mark.parametrize("name", ["A3", "W4A4", "A4-packed", "A4+rms_norm", "rotated"])
def test_other_schemes_are_errors(name):
    with pytest.raises(ValueError, match="scheme: expected"):
        scheme_of(name)


def test_rotating_alone_is_not_unfused():
    with pytest.raises(Unsupported, match="nothing is fused"):
        prepare_unfused(_call()[0])


def test_peers_rotate_powers_of_two():
    assert accepts_powers(Case(op.NAME, "", (4096,), 1, ROTATE, "bf16")) is None
    assert "another one" in accepts_powers(Case(op.NAME, "", (14336,), 1, ROTATE, "bf16"))
    assert "does not quantize" in accepts_powers(Case(op.NAME, "", (4096,), 1, "A4", "bf16"))


def test_bytes():
    def size(scheme, provider="sliderquant"):
        prepared = _call(scheme, m=16, provider=provider)[1]
        return op.work(Case(op.NAME, "", (96,), 16, scheme, "bf16"), prepared).bytes

    assert size(ROTATE) == size(ROTATE, "copy") == 16 * 96 * 4
    assert size("A4") == 16 * (96 * 3 + 12)
    assert size("A8-sym") == 16 * (96 * 3 + 8)
    assert size("A4+silu_mul") == 16 * (96 * 5 + 12)
    assert size("A4+silu_mul", "copy") == 16 * 96 * 8


@pytest.mark.parametrize(("subset", "device"), [("quick", "cuda"), ("full", "cuda"), ("quick", "cpu"), ("tiny", "cpu")])
def test_every_case_has_its_baseline_and_no_row_comes_twice(subset, device):
    plan = OPS[op.NAME].plan(subset, device)
    for tasks in plan:
        keys = [(task.case.key, task.provider) for task in tasks]
        assert len(keys) == len(set(keys))
        assert all(device in op.PROVIDERS[task.provider].devices for task in tasks)
    cases = {task.case.key for task in plan.timings}
    assert {task.case.key for task in plan.timings if task.provider == "copy"} == cases
    with pytest.raises(ValueError, match="expected one of quick, tiny on cpu, got 'full'"):
        op.plan("full", "cpu")


def test_what_the_subsets_hold():
    quick = op.plan("quick", "cuda").timings
    assert len(quick) < 80
    assert {task.case.m for task in quick[: len(quick) // 3]} == {2048}
    assert {task.provider for task in quick} == set(op.PROVIDERS)
    full = {(task.case.shape[0], task.case.scheme) for task in op.plan("full", "cuda").timings}
    for n in (4096, 8192, 11008, 13824, 14336, 18944, 28672):
        assert {(n, ROTATE), (n, "A4"), (n, "A4+silu_mul")} <= full
    assert (128, ROTATE) in full


def test_goals():
    base = {"op": op.NAME, "m": 2048, "dtype": "bf16", "run": 0, "status": "ok", "kind": "time"}

    def row(provider, shape, scheme, time, size):
        return {**base, "provider": provider, "shape": shape, "scheme": scheme, "q50_us": time, "bytes": size}

    rows = [
        row("copy", "4096", "A4", 100.0, 400), row("sliderquant", "4096", "A4", 90.0, 300),
        row("copy", "8192", "A4", 200.0, 800), row("sliderquant", "8192", "A4", 165.0, 600),
        row("copy", "11008", "A4", 100.0, 400), row("sliderquant", "11008", "A4", 1000.0, 300),
        row("copy", "4096", ROTATE, 100.0, 400), row("sliderquant", "4096", ROTATE, 130.0, 400),
    ]  # fmt: skip
    quantized, alone = op.goals(rows, {0: {"device": "cuda"}})
    assert quantized.measured == pytest.approx(1.2)
    assert alone.measured == pytest.approx(1.3)
    assert not alone.passed
    assert [goal.measured for goal in op.goals(rows, {0: {"device": "cpu"}})] == [None, None]
