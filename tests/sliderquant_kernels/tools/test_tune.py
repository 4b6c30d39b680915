"""Tuning without a GPU: what is measured, what is chosen, and that an interrupted run goes on."""

import json
from dataclasses import replace

import pytest
import torch

from sliderquant_kernels.common.choices import Choice, Device, Problem
from sliderquant_kernels.tools import tune, warming
from sliderquant_kernels.tools.tune_candidates import SPLITS, bare, candidates, estimated_us
from sliderquant_kernels.tools.tune_measure import DeviceLost, Failure
from sliderquant_kernels.tools.tune_outcomes import read_outcomes
from sliderquant_kernels.weight_only import tiles, tuned

_DEVICE = Device(90, 132, "NVIDIA Test GPU")
_ALL = 10_000


def _problem(m, bits=4, n=4096, k=4096):
    return Problem(m, n, k, bits, 128, False, torch.bfloat16)


@pytest.mark.parametrize("m", [1, 8, 16, 64, 256, 4096])
@pytest.mark.parametrize("most", [1, 16, _ALL])
def test_candidates_hold_the_rules_choice_and_no_other_twice(m, most):
    found = candidates(_problem(m), _DEVICE, most)
    assert found[0] == tiles.choose(_problem(m), _DEVICE)
    assert len({bare(choice) for choice in found}) == len(found) <= most
    for choice in found:
        if choice.variant == "warp_k":
            assert choice.num_warps * choice.split <= 4096 // 128
    if most == _ALL:
        variants = {choice.variant for choice in found}
        assert ("warp_k" in variants) == (m <= 16)
        assert "rows" in variants
        assert ("dense" in variants) == (m >= 16)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(
    ("m", "tile"),
    [
        (1, Choice("warp_k", 8, 8, 4, 3)),
        (8, Choice("warp_k", 8, 8, 4, 3)),
        (8, Choice("rows", 16, 16, 8, 6)),
        (16, Choice("rows", 16, 16, 8, 6)),
        (16, Choice("warp_k", 16, 8, 4, 3)),
        (32, Choice("rows", 32, 16, 8, 5)),
        (64, Choice("rows", 64, 16, 8, 5)),
    ],
)
def test_wide_tiles_are_candidates_with_every_split(m, tile, arch):
    problem = _problem(m, n=4096, k=14336)
    found = {bare(choice) for choice in candidates(problem, Device(arch, 132), _ALL)}
    assert {replace(tile, split=split) for split in SPLITS} <= found
    # A tile of more tokens than are needed reads what is not there.
    assert not any(choice.variant == tile.variant and choice.block_m > max(16, m) for choice in found if m <= 16)


@pytest.mark.parametrize(("bits", "programs"), [(2, 3), (3, 2)])
def test_decode_tiles_with_several_programs_on_a_multiprocessor_are_candidates(bits, programs):
    from sliderquant_kernels.weight_only import estimate

    problem = _problem(1, bits=bits, n=28672)
    tile = Choice("warp_k", 8, 4, 4, 3)
    assert tile in candidates(problem, _DEVICE, _ALL)
    assert estimate.estimate(problem, tile, _DEVICE).programs == programs


def test_the_fastest_by_the_estimate_come_first():
    problem = _problem(16)
    first, *others = candidates(problem, _DEVICE, _ALL)
    expected = [estimated_us(problem, choice, _DEVICE) for choice in others]
    known = [us for us in expected if us is not None]
    assert known == sorted(known)
    assert known[0] == pytest.approx(estimated_us(problem, first, _DEVICE), rel=0.1)
    # What has no estimate comes after that: dense first.
    assert expected[: len(known)] == known
    assert others[len(known)].variant == "dense"
    assert candidates(problem, _DEVICE, 5) == [first, *others[:4]]


def test_what_does_not_fit_has_no_estimate():
    tile = Choice("warp_k", 8, 8, 8, 2)
    assert estimated_us(_problem(1), tile, _DEVICE) > 0
    assert estimated_us(_problem(1), replace(tile, num_stages=8), _DEVICE) is None
    assert estimated_us(_problem(1), Choice("warp_k", 8, 3, 4, 3), _DEVICE) is None
    assert estimated_us(_problem(65), Choice("rows", 64, 8, 4, 3), _DEVICE) is None


@pytest.mark.parametrize("m", [256, 4096])
def test_without_an_estimate_the_nearest_to_the_rules_come_first(m):
    rules, *others = candidates(_problem(m), _DEVICE, _ALL)
    if rules.variant == "dense":
        anchor = tiles.choose(_problem(m), _DEVICE, "rows")
        assert bare(others[0]) == bare(anchor)
    else:
        anchor = rules
        assert others.pop(0).variant == "dense"
    for name in ("block_m", "row_blocks", "num_warps", "num_stages", "split"):
        assert sum(getattr(choice, name) == getattr(anchor, name) for choice in others[:6]) >= 3
    changed = [
        sum(getattr(choice, name) != getattr(anchor, name) for name in ("block_m", "row_blocks", "num_warps"))
        for choice in others
    ]
    assert changed[:3] != [3, 3, 3]
    assert sum(changed[:10]) < sum(changed[-10:])


def test_elsewhere_than_on_sm_90_all_tiles_are_candidates():
    found = candidates(_problem(16), Device(100, 148, "NVIDIA Test GPU"), _ALL)
    assert len(found) > 100
    assert {choice.variant for choice in found} == set(tiles.VARIANTS)


def test_only_a_clear_win_replaces_the_rules():
    default, other = Choice("dense", reason="rules"), Choice("rows", 64, 8, 4, 4)
    assert tune.fastest({default: 1.0, other: 0.98}, default) == default
    assert tune.fastest({default: 1.0, other: 0.9}, default) == other
    assert tune.fastest({other: 5.0}, default) == other


class FakeGpu:
    """Compiles and times by the clock `now`.

    us: of a problem and a choice: microseconds, a `Failure`, or an exception.
    """

    def __init__(self, us, compiling=0.0, timing=1.0):
        self.us, self.compiling, self.timing = us, compiling, timing
        self.now, self.failures, self.compiled, self.seconds, self.timed = 100.0, {}, [], [], []

    def clock(self):
        return self.now

    def compile(self, pairs, seconds):
        self.compiled.append(list(pairs))
        self.seconds.append(seconds)
        self.now += self.compiling
        return [self.failures.get(pair) for pair in pairs]

    def time(self, problem, choices):
        self.timed.append((problem, list(choices)))
        self.now += self.timing
        found = []
        for choice in choices:
            us = self.us(problem, choice)
            if isinstance(us, BaseException):
                raise us
            found.append(us if isinstance(us, Failure) else [us - 1.0, us, us + 3.0])
        return found

    def tokens(self):
        return [problem.m for problem, _ in self.timed]


def _second_wins(problem, choice):
    return 8.0 if choice == candidates(problem, _DEVICE)[1] else 10.0


def _tune(gpu, problems, out, **options):
    return tune.tune(problems, _DEVICE, gpu, out, clock=gpu.clock, torch="2", triton="3", **options)


def test_outcomes_say_what_was_measured_and_what_failed(tmp_path):
    problem = _problem(16)
    rules, fast, wrong, spills = candidates(problem, _DEVICE, 4)
    gpu = FakeGpu(lambda _, choice: {rules: 10.0, fast: 8.0, wrong: Failure("wrong numbers", "all of them")}[choice])
    gpu.failures[problem, spills] = Failure("not compiled", "spills 8 bytes")
    (outcome,) = _tune(gpu, [problem], tmp_path / "table.json", log=tmp_path / "log.jsonl", most=4)
    assert gpu.timed == [(problem, [rules, fast, wrong])]
    assert (outcome.rules_choice, outcome.rules_us) == (rules, 10.0)
    assert (outcome.best, outcome.best_us, outcome.ratio) == (fast, 8.0, 0.8)
    assert [(each.choice, each.us, each.low_us, each.high_us) for each in outcome.measured] == [
        (fast, 8.0, 7.5, 9.5),
        (rules, 10.0, 9.5, 11.5),
    ]
    assert outcome.measured[0].estimate_us == estimated_us(problem, fast, _DEVICE) > 0
    assert {(each.choice, each.status, each.detail) for each in outcome.failed} == {
        (wrong, "wrong numbers", "all of them"),
        (spills, "not compiled", "spills 8 bytes"),
    }
    assert read_outcomes(tmp_path / "log.jsonl") == [outcome]
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["ratio"], line["device"], line["torch"]) == (0.8, "NVIDIA Test GPU", "2")


def test_tables_are_written_after_every_problem_and_resumed(tmp_path, capsys):
    out, log = tmp_path / "table.json", tmp_path / "log.jsonl"

    def us(problem, choice):
        if problem.m == 4:
            return Failure("wrong numbers", "")
        return KeyboardInterrupt() if problem.m == 16 else _second_wins(problem, choice)

    problems = [_problem(m) for m in (1, 4, 16)]
    gpu = FakeGpu(us)
    with pytest.raises(KeyboardInterrupt):
        _tune(gpu, problems, out, log=log)
    key = tuned.key(problems[0])
    assert [(m, bare(choice)) for m, choice in tuned.read(out)[key]] == [(1, candidates(problems[0], _DEVICE)[1])]
    assert [(outcome.problem.m, outcome.best is None) for outcome in read_outcomes(log)] == [(1, False), (4, True)]
    again = FakeGpu(_second_wins)
    assert [outcome.problem.m for outcome in _tune(again, problems, out, log=log)] == [4, 16]
    assert (gpu.tokens(), again.tokens()) == ([1, 4, 16], [4, 16])
    assert {problem.m for problem, _ in again.compiled[0]} == {4, 16}
    best = dict(tuned.read(out)[key])
    assert best[16] == replace(candidates(_problem(16), _DEVICE)[1], reason="measured on NVIDIA Test GPU")
    assert "no candidate computed the right numbers" in capsys.readouterr().err


def test_no_problem_is_begun_after_the_budget(tmp_path, capsys):
    problems = [_problem(m) for m in (1, 8, 16, 32, 64)]
    gpu = FakeGpu(_second_wins, compiling=4.0, timing=3.0)
    _tune(gpu, problems, tmp_path / "table.json", budget=10.0)
    # Compiled until 4 s, begun at 4 and 7 s; at 10 s nothing is begun.
    assert gpu.tokens() == [1, 8]
    assert gpu.seconds == [5.0]
    assert len(tuned.read(tmp_path / "table.json")[tuned.key(problems[0])]) == 2
    assert "3 of 5 problems are left; run the same command again" in capsys.readouterr().out
    _tune(gpu, problems, tmp_path / "table.json")
    assert gpu.tokens() == [1, 8, 16, 32, 64]
    assert gpu.seconds == [5.0, None]


def test_a_problem_that_is_not_compiled_in_time_is_left_for_the_next_run(tmp_path):
    gpu = FakeGpu(_second_wins)
    gpu.failures[_problem(8), candidates(_problem(8), _DEVICE)[3]] = Failure("not compiled", warming.LATE)
    problems = [_problem(m) for m in (1, 8, 16)]
    assert [of.problem.m for of in _tune(gpu, problems, tmp_path / "table.json", budget=9.0)] == [1, 16]
    gpu.failures.clear()
    assert [of.problem.m for of in _tune(gpu, problems, tmp_path / "table.json")] == [8]


def test_a_tile_that_loses_the_gpu_is_left_out_of_later_runs(tmp_path):
    out, log, problem = tmp_path / "table.json", tmp_path / "log.jsonl", _problem(16)
    rules, *others = candidates(problem, _DEVICE)
    broken = set(others[2:4])

    def us(problem, choice):
        return DeviceLost(choice, RuntimeError("illegal address")) if choice in broken else 10.0

    for lost in (1, 2):
        gpu = FakeGpu(us)
        with pytest.raises(DeviceLost, match="illegal address"):
            _tune(gpu, [problem], out, log=log)
        assert len(read_outcomes(log)[0].failed) == lost
    gpu = FakeGpu(us)
    (outcome,) = _tune(gpu, [problem], out, log=log)
    assert outcome.best == rules
    assert not broken & set(gpu.timed[0][1])
    assert {each.choice for each in outcome.failed} == broken
    assert {each.status for each in read_outcomes(log)[0].failed} == {"lost the GPU"}


def test_a_log_survives_the_end_of_a_process(tmp_path):
    log = tmp_path / "log.jsonl"
    (first,) = _tune(FakeGpu(_second_wins), [_problem(1)], tmp_path / "a.json", log=log)
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:100])
    assert read_outcomes(log) == [first]
    (second,) = _tune(FakeGpu(_second_wins), [_problem(8)], tmp_path / "a.json", log=log)
    assert read_outcomes(log) == [first, second]
    log.write_text('{"kind": "tuned"}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: expected an outcome of `tune`, got KeyError: 'problem'"):
        read_outcomes(log)


def test_wins_that_do_not_hold_again_leave_the_table(tmp_path):
    out, log = tmp_path / "table.json", tmp_path / "log.jsonl"
    problems = [_problem(m) for m in (1, 8, 16, 32, 64)]
    outcomes = _tune(
        FakeGpu(lambda problem, choice: 10.0 if problem.m == 32 else _second_wins(problem, choice)),
        problems,
        out,
        log=log,
    )
    second = {1: 8.0, 8: 9.9, 16: Failure("failed", "out of memory"), 64: 8.0}
    gpu = FakeGpu(lambda problem, choice: 10.0 if choice.reason else second[problem.m])
    found = tune.retime(outcomes, _DEVICE, gpu, out, log=log, clock=gpu.clock)
    assert [(each.problem.m, each.ratio, each.holds) for each in found] == [
        (1, 0.8, True),
        (8, 0.99, False),
        (16, None, False),
        (64, 0.8, True),
    ]
    assert [len(choices) for _, choices in gpu.timed] == [2] * 4
    table = {m: bare(choice) for m, choice in tuned.read(out)[tuned.key(problems[0])]}
    for outcome in outcomes:
        m = outcome.problem.m
        assert table[m] == bare(outcome.best if m in (1, 64) else outcome.rules_choice)
    kinds = [json.loads(line)["kind"] for line in log.read_text().splitlines()]
    assert kinds == ["tuned"] * 5 + ["retimed"] * 4
    # From the log it is the same; what left the table is not measured again.
    again = FakeGpu(lambda problem, choice: 10.0)
    assert read_outcomes(log) == outcomes
    assert [each.problem.m for each in tune.retime(read_outcomes(log), _DEVICE, again, out)] == [1, 64]


def test_a_budget_ends_measuring_again(tmp_path, capsys):
    out = tmp_path / "table.json"
    outcomes = _tune(FakeGpu(_second_wins), [_problem(m) for m in (1, 8, 16)], out)
    before = out.read_bytes()
    gpu = FakeGpu(_second_wins, compiling=1.0, timing=2.0)
    assert len(tune.retime(outcomes, _DEVICE, gpu, out, budget=3.0, clock=gpu.clock)) == 1
    assert "2 of 3 choices were not measured again" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_command_line_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--weight", "4096x4096"]) == 1
    assert "there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--weight", "4096"], "expected NxK, for example 14336x4096"),
        (["--most", "0"], "'0': expected a whole number of 1 or more"),
        (["--budget", "-1"], "'-1': expected seconds, more than 0"),
        (["--budget", "nan"], "'nan': expected seconds, more than 0"),
        (["--retime"], "--retime: expected --log with the file that a run of tune has written"),
        (["--retime", "--log", "nowhere"], "--retime: expected --log with the file that a run of tune has written"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert error in capsys.readouterr().err


def test_command_line_with_a_gpu(tmp_path, monkeypatch, capsys):
    """What it makes of its arguments, with a device that is made up."""
    from sliderquant_kernels.common import launching
    from sliderquant_kernels.tools import tune_measure

    gpu = FakeGpu(_second_wins)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"L2_cache_size": 1}))
    monkeypatch.setattr(launching, "device_of", lambda _: _DEVICE)
    monkeypatch.setattr(tune_measure, "GpuMeasurer", lambda *_, **__: gpu)
    out, log = tmp_path / "table.json", tmp_path / "log.jsonl"
    files = ["--out", str(out), "--log", str(log), "--budget", "60"]
    assert tune.main(["--weight", "4096x4096", "--tokens", "8", "--tokens", "1", "--most", "3", *files]) == 0
    assert gpu.tokens() == [1, 8]
    assert [len(choices) for _, choices in gpu.timed] == [3, 3]
    assert 0 < gpu.seconds[0] <= 30
    assert tune.main(["--retime", *files]) == 0
    assert [len(choices) for _, choices in gpu.timed[2:]] == [2, 2]
    assert f"written to {out}" in capsys.readouterr().out
    gpu.us = lambda problem, choice: DeviceLost(choice, RuntimeError("illegal address"))
    assert tune.main(["--weight", "4096x4096", "--tokens", "16", *files]) == 1
    assert "broke the GPU's state: RuntimeError: illegal address; run the same command again" in capsys.readouterr().err
