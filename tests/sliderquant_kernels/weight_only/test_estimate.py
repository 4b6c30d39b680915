"""The estimate that the rules choose by: against what was measured on a GPU, and against counting by hand."""

import json
import math
import re
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels.common.choices import Choice, Device, Problem
from sliderquant_kernels.weight_only import estimate, tiles
from sliderquant_kernels.weight_only.estimate import candidates, fastest

H200 = Device(90, 132, "NVIDIA H200")
FOLDER = Path(__file__).parents[3] / "benchmarks" / "results" / "nvidia-h200"
# The first run had tiles of other rules.
RESULTS = ("kernels-quick-first.json", "kernels-quick.json")
BOTH = ("warp_k", "rows")


def _problem(m=1, n=4096, k=4096, bits=4, group_size=128, symmetric=False):
    return Problem(m, n, k, bits, group_size, symmetric, torch.bfloat16)


def _measured():
    """(problem, tile) -> microseconds of each launch of up to 64 tokens, for each result file."""
    pattern = re.compile(r"(warp_k|rows) (\d+) x (\d+), (\d+) warps, (\d) stages(?:, split (\d))?:")
    for name in RESULTS:
        found = {}
        for row in json.loads((FOLDER / name).read_text(encoding="utf-8"))["rows"]:
            ours = row["op"] == "weight_only_linear" and row["provider"].startswith("sliderquant")
            if not (ours and row["kind"] == "time" and row["status"] == "ok" and row["m"] <= 64):
                continue
            match = pattern.match(row["note"])
            variant, block_m, rows, warps, stages, split = (match[1], *map(int, match.groups("1")[1:]))
            scheme = re.fullmatch(r"W(\d)A16-g(\d+)", row["scheme"])
            n, k = map(int, row["shape"].split("x"))
            problem = _problem(row["m"], n, k, int(scheme[1]), int(scheme[2]))
            choice = Choice(variant, block_m, rows // 16, warps, stages, split)
            if estimate._key(choice) in estimate._resources(problem):  # others spill with the release that it is of
                found[problem, choice] = row["q50_us"]
        yield found


def test_estimates_are_near_what_an_h200_took():
    """`rows` was timed with a loop that has changed since: what it took is compared with the new loop's estimate."""
    for measured, launches in zip(_measured(), (54, 30), strict=True):
        ratios = {key: estimate.estimate(*key, H200).microseconds / took for key, took in measured.items()}
        assert len(ratios) >= launches
        # Nothing was fitted to 8 bits, which stream faster than these constants say.
        fitted = {key: ratio for key, ratio in ratios.items() if key[0].bits != 8}
        assert statistics.fmean(abs(math.log(ratio)) for ratio in fitted.values()) < 0.035
        bounds = {"warp_k": (0.92, 1.08), "rows": (0.88, 1.13)}
        for (problem, choice), ratio in fitted.items():
            low, high = bounds[choice.variant]
            assert low < ratio < high, (problem, choice)
        assert all(1.0 < ratio < 1.26 for key, ratio in ratios.items() if key not in fitted)


def test_of_the_tiles_that_were_measured_it_prefers_one_of_the_fastest():
    took = defaultdict(list)
    for measured in _measured():
        for (problem, choice), microseconds in measured.items():
            took[problem].append((estimate.estimate(problem, choice, H200).microseconds, microseconds))
    compared = [found for found in took.values() if len(found) > 1]
    assert len(compared) >= 19
    for found in compared:
        assert min(found)[1] < 1.025 * min(microseconds for _, microseconds in found)


def test_by_hand():
    """28672 rows in tiles of 64: 448 programs of 4 warps, of which 132 multiprocessors hold 396 with 4 stages."""
    problem, choice = _problem(n=28672), Choice("warp_k", 8, 4, 4, 4)
    got = estimate.estimate(problem, choice, H200)
    assert (got.programs, got.rounds) == (3, 2)
    # Codes of 64 rows, and a scale with its zero-point, 4 bytes, for each 128 of them; of 4 programs at the most.
    streamed = 4 * 64 * 4096 / 2 * (1 + 4 / 64)
    # In the first round the busiest one has 3 programs, in the second 1; each has 3 steps of 4 blocks under way.
    loop = 0.0
    for programs in (3, 1):
        rates = [
            estimate.MEMORY / 132,
            programs * 3 * 4 * 4 * 1024 / estimate.LATENCY,
            # One token of 128 bf16 inputs for 4 blocks of 1 KB.
            estimate.L2 / 132 / (1 + 256 / 4096),
            16 * 32 * 4 * 1900 * estimate.ISSUE / 64.4,
        ]
        inverse = sum(rate**-estimate.SHARPNESS for rate in rates) ** (1 / estimate.SHARPNESS)
        assert 1 < inverse * min(rates) < 4 ** (1 / estimate.SHARPNESS)
        loop += programs * streamed / 4 * inverse
    assert got.microseconds == pytest.approx(estimate.START + 2 * 2.8 + loop, rel=1e-9)
    assert got.bound == "memory"
    # With 3 stages all of them are held at once.
    assert (estimate.estimate(problem, replace(choice, num_stages=3), H200).rounds) == 1


def test_each_limit_binds_where_it_should():
    bounds = {
        "latency": estimate.estimate(_problem(n=14336), Choice("rows", 16, 4, 4, 4), H200),
        "L2": estimate.estimate(_problem(64, n=14336), Choice("rows", 64, 4, 4, 4), H200),
        "issue": estimate.estimate(_problem(bits=2, n=8192, k=28672), Choice("warp_k", 8, 2, 4, 4), H200),
        "memory": estimate.estimate(_problem(n=8192, k=28672), Choice("warp_k", 8, 2, 8, 4), H200),
    }
    assert {name: found.bound for name, found in bounds.items()} == {name: name for name in bounds}


problems = st.builds(
    _problem,
    m=st.integers(1, 64),
    n=st.integers(1, 60000),
    k=st.integers(1, 30000),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(problems, st.sampled_from([78, 114, 132, 144]))
def test_the_least_of_all_candidates_is_taken(problem, sm_count):
    device = Device(90, sm_count)
    rounded = replace(problem, m=1 << (problem.m - 1).bit_length())
    found = candidates(rounded, device)
    assert found
    best = fastest(problem, device, BOTH)

    def ahead(choice):
        return estimate.AHEAD if choice.variant == "rows" and rounded.m <= 8 else 1.0

    least = min(estimate.estimate(rounded, choice, device).microseconds * ahead(choice) for choice in found)
    got = estimate.estimate(rounded, replace(best, reason=""), device)
    assert least <= got.microseconds * ahead(best) <= estimate.TIE * least
    assert best.block_m >= min(problem.m, 64)
    assert f"{got.microseconds:.1f} us, by {got.bound}" in best.reason
    for choice in found:
        of = estimate.estimate(rounded, choice, device)
        assert of.programs >= 1
        assert of.rounds >= 1
        assert 0 < of.microseconds < math.inf


def test_few_tokens_take_what_was_timed_unless_it_is_clearly_slower():
    problem = _problem(1, 28672, bits=2)
    found = {
        variant: min(
            estimate.estimate(problem, choice, H200).microseconds for choice in candidates(problem, H200, (variant,))
        )
        for variant in BOTH
    }
    assert 0.96 < found["rows"] / found["warp_k"] < 1
    assert fastest(problem, H200, BOTH).variant == "warp_k"
    assert fastest(_problem(16, 28672, bits=2), H200, BOTH).variant == "rows"


def test_a_tile_that_spills_when_programs_share_it_has_no_estimate():
    problem = _problem(64, 28672)
    whole, split = (Choice("rows", 64, 16, 8, 5, split) for split in (1, 2))
    assert estimate._resources(problem)[estimate._key(whole)].shared_registers == 0
    assert estimate.estimate(problem, whole, H200).programs == 1
    with pytest.raises(ValueError, match="spills no register"):
        estimate.estimate(problem, split, H200)


def test_more_tokens_than_a_tile_holds_have_no_estimate():
    assert fastest(_problem(65), H200, BOTH) is None
    assert tiles.choose(_problem(65), H200).variant == "rows"


def test_the_rules_of_sm_90_take_it_and_those_of_others_do_not():
    problem = _problem(3, n=14336)
    assert tiles.choose(problem, H200) == fastest(problem, H200, BOTH)
    assert tiles.choose(problem, H200, "warp_k") == fastest(problem, H200, ("warp_k",))
    assert "estimate" not in tiles.choose(problem, Device.typical(100)).reason
    assert "estimate" not in tiles.choose(problem, H200, batch_invariant=True).reason


@pytest.mark.parametrize(("n", "k"), [(8192, 28672), (28672, 4096), (14336, 4096), (4096, 4096)])
def test_fewer_bits_are_faster_for_one_token(n, k):
    """Fewer bytes, although a code of 2 or 3 bits takes about as many instructions as one of 4."""
    two, three, four = (
        estimate.estimate(problem, fastest(problem, H200, BOTH), H200).microseconds
        for problem in (_problem(1, n, k, bits) for bits in (2, 3, 4))
    )
    assert two < three < four
