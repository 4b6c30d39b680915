"""Tuning without a GPU: what is measured, what is chosen, and that an interrupted run goes on."""

import pytest
import torch

from sliderquant_kernels import tiles, tune, tuned
from sliderquant_kernels.tiles import Choice, Device, Problem

_DEVICE = Device(90, 132, "NVIDIA Test GPU")


def _problem(m, bits=4, n=4096, k=4096):
    return Problem(m, n, k, bits, 128, False, torch.bfloat16)


@pytest.mark.parametrize("m", [1, 8, 16, 64, 256, 4096])
def test_candidates_hold_the_rules_choice_and_no_other_twice(m):
    found = tune.candidates(_problem(m), _DEVICE)
    assert found[0] == tiles.choose(_problem(m), _DEVICE)
    bare = [tune.replace(choice, reason="") for choice in found]
    assert len(set(bare)) == len(bare)
    variants = {choice.variant for choice in found}
    assert ("warp_k" in variants) == (m <= 16)
    assert "rows" in variants
    assert ("dense" in variants) == (m >= 16)
    for choice in found:
        if choice.variant == "warp_k":
            assert choice.num_warps * choice.split <= 4096 // 128


def test_elsewhere_than_on_sm_90_all_tiles_are_candidates():
    found = tune.candidates(_problem(16), Device(100, 148, "NVIDIA Test GPU"))
    assert len(found) > 100
    assert {choice.variant for choice in found} == set(tiles.VARIANTS)
    assert len(tune.candidates(_problem(16), _DEVICE)) <= tune.MOST_BY_ESTIMATE + 2


def test_only_a_clear_win_replaces_the_rules():
    default, other = Choice("dense", reason="rules"), Choice("rows", 64, 8, 4, 4)
    assert tune.fastest({default: 1.0, other: 0.98}, default) == default
    assert tune.fastest({default: 1.0, other: 0.9}, default) == other
    assert tune.fastest({other: 5.0}, default) == other


def test_tables_are_written_after_every_problem_and_resumed(tmp_path, capsys):
    out = tmp_path / "table.json"
    measured = []

    def measure(problem, choices):
        if problem.m == 16 and len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(problem.m)
        # The last candidate wins; nothing computes the right numbers for 4 tokens.
        return {} if problem.m == 4 else {choice: 1.0 / (i + 1) for i, choice in enumerate(choices)}

    problems = [_problem(m) for m in (1, 4, 16)]
    with pytest.raises(KeyboardInterrupt):
        tune.tune(problems, _DEVICE, measure, out, torch="2", triton="3")
    entries = tuned.read(out)
    assert [(up_to, choice.variant) for up_to, choice in entries[tuned.key(problems[0])]] == [
        (1, tune.candidates(problems[0], _DEVICE)[-1].variant)
    ]
    measured.append(-1)
    tune.tune(problems, _DEVICE, measure, out, torch="2", triton="3")
    assert measured == [1, 4, -1, 4, 16]
    best = dict(tuned.read(out)[tuned.key(problems[0])])
    assert best[16] == tune.replace(tune.candidates(_problem(16), _DEVICE)[-1], reason="measured on NVIDIA Test GPU")
    assert "no candidate computed the right numbers" in capsys.readouterr().err


def test_command_line_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--weight", "4096x4096"]) == 1
    assert "there is no CUDA device here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--weight", "4096"])
    assert "expected NxK, for example 14336x4096" in capsys.readouterr().err
