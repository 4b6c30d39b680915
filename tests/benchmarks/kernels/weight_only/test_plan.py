"""What the subsets of the weight-only linear hold."""

from itertools import product

import pytest

from benchmarks.kernels.harness import shapes
from benchmarks.kernels.harness.shapes import TOKENS
from benchmarks.kernels.shared.schemes import WeightScheme
from benchmarks.kernels.weight_only import BASELINE, PROVIDERS, plan, subsets
from benchmarks.kernels.weight_only.providers.ours import CHOSEN, MOST_TOKENS, name_of
from sliderquant_kernels.weight_only import tiles


def test_tokens_are_the_powers_of_two_to_8192():
    assert TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def test_full_holds_every_shape_for_all_tokens():
    timings = plan("full", "cuda").timings
    wanted = {((layer.n, layer.k), m) for layer, m in product(shapes.every_layer(), TOKENS)}
    for provider in (CHOSEN, "cublas", "torch-int4", "humming", "torchao", "mslk", "conch", "bitsandbytes"):
        found = {
            (task.case.shape, task.case.m)
            for task in timings
            if (task.provider, task.case.scheme, task.case.dtype) == (provider, "W4A16-g128", "bf16")
        }
        assert found == wanted, provider
    assert {task.case.scheme for task in timings} >= {
        "W2A16-g128",
        "W3A16-g128",
        "W8A16-sym",
        "W4A16-g128-sym",
        "W4A16",
    }
    assert {task.case.dtype for task in timings} == {"bf16", "fp16"}


@pytest.mark.parametrize("subset", ["quick", "full"])
def test_checks_reach_every_variant_dtype_width_grouping_and_symmetry(subset):
    checks = plan(subset, "cuda").checks
    found = {(task.provider, task.case.dtype, task.case.scheme) for task in checks}
    schemes = [str(WeightScheme(*each)) for each in product((2, 3, 4, 8), (None, 32, 64, 128), (False, True))]
    wanted = product([name_of(variant) for variant in tiles.VARIANTS], ("bf16", "fp16"), schemes)
    assert found == set(wanted)
    odd = {task.case.shape for task in checks if task.case.shape[0] % 16 or task.case.shape[1] % 128}
    assert odd == {(1000, 1056)}
    assert {task.kind for task in checks} == {"check"}


@pytest.mark.parametrize(
    ("subset", "device"), [*product(["quick"], ["cuda", "cpu"]), ("full", "cuda"), ("tiny", "cpu")]
)
def test_every_case_has_its_baseline_and_no_row_comes_twice(subset, device):
    timings = plan(subset, device).timings
    keys = [(task.case.key, task.provider) for task in timings]
    assert len(keys) == len(set(keys))
    assert {task.case.key for task in timings if task.provider == BASELINE[device]} == {key for key, _ in keys}
    assert all(device in PROVIDERS[task.provider].devices for task in timings)


def test_quick_is_small_and_begins_with_what_the_goals_ask():
    timings = plan("quick", "cuda").timings
    assert len(timings) < 400
    ours = [(task.case.shape, task.case.scheme, task.case.m) for task in timings if task.provider == CHOSEN]
    for shape in ((28672, 4096), (8192, 28672), (14336, 4096), (4096, 4096)):
        for m in (1, 2, 4, 8, 16, 32, 64, 2048, 4096):
            assert (shape, "W4A16-g128", m) in ours
        assert {(shape, "W2A16-g128", 1), (shape, "W3A16-g128", 1)} < set(ours)
    assert {m for _, scheme, m in ours[:20] if scheme == "W4A16-g128"} == {1, 2, 4, 8, 16}


def test_variants_are_measured_by_name_where_they_take_the_tokens():
    timings = plan("decode", "cuda").timings + plan("prefill", "cuda").timings
    for variant in tiles.VARIANTS:
        tokens = {task.case.m for task in timings if task.provider == name_of(variant)}
        assert tokens == {m for m in TOKENS if m <= MOST_TOKENS.get(variant, 8192)}


def test_an_unknown_subset_is_an_error():
    assert "full" not in subsets("cpu")
    with pytest.raises(ValueError, match="expected one of quick, tiny on cpu, got 'full'"):
        plan("full", "cpu")


@pytest.mark.parametrize("name", ["W4A16-g128", "W2A16", "W8A16-sym", "W3A16-g32-sym"])
def test_schemes_are_read_as_they_are_written(name):
    assert str(WeightScheme.parse(name)) == name


@pytest.mark.parametrize("name", ["W5A16", "W4A16-g256", "W4A4", "W4A16-g128-asym"])
def test_other_schemes_are_errors(name):
    with pytest.raises(ValueError, match="scheme: expected"):
        WeightScheme.parse(name)
