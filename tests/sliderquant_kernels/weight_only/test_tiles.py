"""The rules: a choice for every problem that a launch can take, and nothing random about it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels.common import choices
from sliderquant_kernels.common.choices import Choice, Device, Problem
from sliderquant_kernels.weight_only import tiles, tuned
from sliderquant_kernels.weight_only.fragments import block_inputs

_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def _problem(m=1, n=4096, k=4096, bits=4, group_size=128, symmetric=False, dtype=torch.bfloat16):
    return Problem(m, n, k, bits, group_size, symmetric, dtype)


problems = st.builds(
    Problem,
    m=st.integers(1, 10000),
    n=st.integers(1, 40000),
    k=st.integers(1, 40000).map(lambda k: k * 128),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)


@settings(deadline=None, max_examples=300)
@given(problems, st.sampled_from(_ARCHITECTURES))
def test_every_choice_is_launchable_and_explained(problem, arch):
    choice = tiles.choose(problem, Device.typical(arch))
    assert choice.variant in tiles.VARIANTS
    assert choice.reason
    if choice.variant == "dense":
        return
    assert problem.dtype != torch.float32
    for size in (choice.block_m, choice.row_blocks, choice.num_warps):
        assert size & (size - 1) == 0
        assert size >= 1
    assert choice.block_m >= 8
    assert choice.num_stages >= 2
    assert choice.split in (1, 2, 4, 8)
    k_blocks = -(-problem.k // block_inputs(problem.bits))
    if choice.variant == "warp_k":
        assert choice.num_warps * choice.split <= k_blocks
    else:
        # A warp group of sm_90 takes 64 rows.
        assert choice.row_blocks * 16 >= 64
        assert choice.split <= k_blocks


def test_variants_by_number_of_tokens():
    for arch in _ARCHITECTURES:
        device = Device.typical(arch)
        limit = tiles.DENSE_FROM[arch]
        found = [tiles.choose(_problem(m), device).variant for m in (1, 8, 16, 17, 64, limit, limit + 1, 8192)]
        assert found[3:] == ["rows"] * 3 + ["dense"] * 2
        if arch != 90:  # there an estimate decides
            assert found[:3] == ["warp_k"] * 3
        assert tiles.choose(_problem(), device, "warp_k").variant == "warp_k"


def test_small_weights_fill_the_gpu():
    """4096 x 4096 is 64 tiles of 64 rows: fewer than multiprocessors. Lower tiles or a split make up for it."""
    device = Device.typical(90)
    for m in (1, 8, 16, 32, 64):
        choice = tiles.choose(_problem(m), device)
        programs = -(-m // choice.block_m) * -(-4096 // (16 * choice.row_blocks)) * choice.split
        assert programs >= 0.9 * device.sm_count, choice


def test_asked_for_variants():
    device = Device.typical(90)
    for m, variant in itertools.product((1, 16, 64, 4096), tiles.VARIANTS):
        assert tiles.choose(_problem(m), device, variant).variant == variant
    with pytest.raises(ValueError, match=r"variant: expected one of warp_k, rows, dense or None, got 'marlin'"):
        tiles.choose(_problem(), device, "marlin")
    with pytest.raises(ValueError, match="dtype: with float32 activations only variant 'dense'"):
        tiles.choose(_problem(dtype=torch.float32), device, "rows")


@settings(deadline=None, max_examples=100)
@given(problems, st.integers(1, 10000), st.sampled_from(_ARCHITECTURES))
def test_batch_invariant_choices_do_not_depend_on_the_tokens(problem, m, arch):
    if problem.dtype == torch.float32:
        with pytest.raises(ValueError, match="not batch-invariant"):
            tiles.choose(problem, Device.typical(arch), batch_invariant=True)
        return
    other = Problem(m, *(getattr(problem, name) for name in ("n", "k", "bits", "group_size", "symmetric", "dtype")))
    device = Device.typical(arch)
    assert tiles.choose(problem, device, None, True) == tiles.choose(other, device, None, True)
    with pytest.raises(ValueError, match="batch_invariant=True computes with 'rows', got 'dense'"):
        tiles.choose(problem, device, "dense", True)


def test_later_architectures_have_the_rules_of_their_family():
    assert [choices.family(arch) for arch in (75, 80, 87, 90, 103, 121)] == [80, 80, 86, 90, 100, 120]
    assert Device.typical(121).sm_count == Device.typical(120).sm_count


def test_measured_choices_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    device = Device(90, 132, "NVIDIA Test GPU")
    problem = _problem(4)
    rules = tiles.choose(problem, device)
    assert tuned.choose(problem, device) == rules
    measured = Choice("rows", 16, 4, 4, 3, 2)
    tuned.write(tmp_path / tuned.file_name(device.name), device, {tuned.key(problem): [(8, measured)]}, triton="x")
    tuned._table.cache_clear()
    try:
        found = tuned.choose(problem, device)
        assert (found.variant, found.split, found.reason) == ("rows", 2, "measured on NVIDIA Test GPU")
        # Beyond what was measured, for other weights, on other devices and when asked otherwise: the rules.
        assert tuned.choose(_problem(9), device) == tiles.choose(_problem(9), device)
        assert tuned.choose(_problem(4, n=512), device) == tiles.choose(_problem(4, n=512), device)
        assert tuned.choose(problem, Device.typical(90)) == rules
        assert tuned.choose(problem, device, "dense").variant == "dense"
        assert tuned.choose(problem, device, None, True) == tiles.choose(problem, device, None, True)
    finally:
        tuned._table.cache_clear()


def test_a_table_of_another_version_is_refused(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"version": 99, "entries": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"table\.json: expected version 1, got 99; tune again"):
        tuned.read(path)


def test_sm_80_takes_128_tokens_only_where_their_sums_fit():
    def tokens(n, group_size, m=256):
        return tiles.choose(_problem(m, n, group_size=group_size), Device.typical(80)).block_m

    assert (tokens(28672, 128), tokens(28672, None)) == (128, 128)
    assert tokens(28672, 64) == 64
    # 2 x 32 tiles of 128 x 128 for 108 multiprocessors: several programs would share one.
    assert (tokens(4096, 128), tokens(4096, 128, 512)) == (64, 128)


def test_groups_of_32_have_smaller_tiles():
    """Every group of a step has sums and scales of its own in registers."""
    found = tiles.choose(_problem(512, 28672, group_size=32), Device.typical(90))
    assert (found.variant, found.block_m, found.row_blocks, found.num_warps) == ("rows", 64, 8, 8)
    assert tiles.choose(_problem(64, 28672, group_size=32), Device.typical(80)).num_warps == 8
    for arch, bits in ((80, 3), (90, 2), (90, 3)):
        assert tiles.choose(_problem(512, 28672, bits=bits, group_size=32), Device.typical(arch)).row_blocks == 4
    assert tiles.choose(_problem(1, 28672, bits=3, group_size=32), Device.typical(80)).row_blocks == 2
    assert tiles.choose(_problem(1, 28672, bits=3), Device.typical(80)).row_blocks == 4


@pytest.mark.parametrize(
    ("arch", "problem", "newer", "older"),
    [
        (100, _problem(16, bits=2, group_size=32), (16, 2, 4, 3), (16, 2, 4, 2)),
        (80, _problem(1, 28672, group_size=32), (8, 4, 4, 4), (8, 4, 8, 3)),
        (80, _problem(32, 28672, group_size=64, dtype=torch.float16), (32, 8, 4, 4), (32, 8, 8, 4)),
        (100, _problem(32, 28672, group_size=64, dtype=torch.float16), (32, 8, 4, 4), (32, 8, 4, 2)),
        (120, _problem(32, 28672, group_size=64, dtype=torch.float16), (32, 8, 4, 3), (32, 8, 4, 2)),
        (120, _problem(64, 28672, bits=8), (32, 8, 4, 3), (64, 8, 8, 3)),
        (80, _problem(32, k=4100, bits=3, group_size=None), (32, 4, 4, 3), (32, 8, 8, 3)),
    ],
)
def test_tiles_that_an_older_compiler_spills(arch, problem, newer, older, monkeypatch):
    for release, want in (((3, 9), newer), ((3, 6), older)):
        monkeypatch.setattr(tiles, "triton_release", lambda release=release: release)
        found = tiles.choose.__wrapped__(problem, Device.typical(arch))
        assert (found.block_m, found.row_blocks, found.num_warps, found.num_stages) == want
