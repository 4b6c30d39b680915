"""The last lines of a run, and its files: what is wrong comes first, and nothing is too long for those who cut."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu import summary
from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.state import Outcome, State

RESUME = "python -m benchmarks gpu --resume --budget 540 --state gpu-run"


@pytest.fixture
def state(tmp_path: Path) -> State:
    found = State(tmp_path / "run")
    versions = dict.fromkeys(("torch", "triton", "transformers"), "1")
    found.add("env", {"key": "machine", "gpu": "NVIDIA Test", "cpu": "", "python": "3.12", "versions": versions,
                      "clocks": {"clocks.sm": "1980 MHz", "temperature.gpu": "40"}, "sources": "0123"})  # fmt: skip
    found.add("env", {"key": "cache", "hit": True, "text": "cache.tar.xz: hit"})
    found.add("env", {"key": "p", "shape": "8192x28672", "scheme": "W4A16-g128", "m": 1, "us": 40.0})
    found.add("smoke", {"key": "a", "status": "ok"})
    return found


def lines(state: State) -> list[str]:
    return summary.last_lines(state, PHASES, Path("out"), RESUME).splitlines()


def finish(state: State, *but: str) -> None:
    for phase in PHASES:
        if phase.name not in but:
            state.keep(phase.name, Outcome("done", 1.0, 1))


def test_a_run_in_which_nothing_is_wrong(state: State) -> None:
    finish(state)
    found = lines(state)
    assert found[1] == "=== NVIDIA Test, python 3.12, torch 1, triton 1, transformers 1, sources 0123"
    assert "1980 MHz" in found[2]
    assert "nothing is wrong" in found
    assert found[-1] == "all phases are through"
    assert summary.problems(state) == []


def test_what_is_wrong_comes_first_and_what_is_left_last(state: State) -> None:
    finish(state, "retime", "decode", "sanitizer")
    state.add(
        "smoke",
        {
            "key": "elementwise rotary",
            "family": "elementwise",
            "bits": None,
            "status": "error",
            "error": "no answer in time",
        },
    )
    state.add("tests", {"key": "tests/a.py::test_b", "outcome": "failed", "seconds": 1, "text": "x"})
    state.add("tests", {"key": "tests/a.py::test_c", "outcome": "passed", "seconds": 1})
    state.add("sanitizer", {"key": "racecheck", "status": "bad", "hazards": 2})
    state.keep("decode", Outcome("failed", 9.0, 1, "killed by SIGABRT\nfirst\nlast"))
    state.keep("retime", Outcome("skipped", detail="nothing was tuned"))
    found = lines(state)
    start = found.index("WRONG: 4")
    assert found[start + 1 : start + 5] == [
        "  smoke: elementwise rotary: error: no answer in time",
        "  test: tests/a.py::test_b",
        "  sanitizer: 2 hazards",
        "  phase decode, 1 times: killed by SIGABRT",
    ]
    assert "  decode: last" in found
    assert "tests: 1 passed, 1 failed, 0 skipped" in found
    assert "skipped: retime: nothing was tuned" in found
    assert found[-2:] == ["left: decode, sanitizer. To go on:", f"  {RESUME}"]


def test_what_right_results_do_not_say(state: State) -> None:
    finish(state)
    state.device = "nvidia-test"
    wrong = {"family": "weight_only_linear", "bits": 4, "status": "wrong", "error": "far off", "tries": 2}
    state.add("smoke", {"key": "weight_only_linear rows W4", **wrong})
    state.add("sanitizer", {"key": "racecheck", "status": "compute-sanitizer is not installed", "hazards": None})
    goal = {"text": "of copy", "target": 0.75, "measured": 0.7, "at_least": True, "where": "here", "passed": False}
    goals = [goal] * 16 + [{**goal, "measured": 0.8, "passed": True}, {**goal, "measured": None, "passed": None}]
    folder = state.folder / "goals" / "nvidia-test"
    folder.mkdir(parents=True)
    (folder / "kernels-quick.json").write_text(json.dumps({"rows": [], "goals": goals}))
    found = lines(state)
    start = found.index("WRONG: 1")
    assert found[start + 2 : start + 5] == [
        "but: 16 of 17 goals are missed",
        "but: goals left out weight_only_linear of 4 bits, which failed smoke",
        "but: the sanitizer gave no answer, see below",
    ]
    assert "  ... and 3 more in the file" in found
    assert "  goals with nothing measured yet: 1" in found
    summary.write_files(state, state.folder / "out")
    written = json.loads((state.folder / "out" / "summary.json").read_text())
    assert (written["device"], len(written["cautions"])) == ("nvidia-test", 3)


def test_some_of_the_phases_only(state: State) -> None:
    finish(state)
    text = summary.last_lines(state, PHASES[:2], Path("out"), RESUME)
    assert text.splitlines()[-1] == "env, smoke: through"


def test_a_test_that_the_time_cut_off_is_no_failure_while_its_turn_comes_again(
    state: State,
) -> None:
    finish(state, "tests")
    state.add("tests", {"key": "tests/a.py::test_b", "outcome": "begun", "seconds": 0.0})
    state.keep("tests", Outcome("partial", 1.0, 1))
    assert summary.problems(state) == []
    state.keep("tests", Outcome("done", 1.0, 2))
    assert summary.problems(state) == ["test: tests/a.py::test_b: it began, and did not end"]


def test_figures(state: State) -> None:
    finish(state)
    state.add("roofline", {"key": "floors", "copy_gbps": 4000.0, "read_gbps": 4200.0, "matmul_tflops": 800.0,
                           "empty_kernel_us": 1.5})  # fmt: skip
    folder = state.folder / "goals" / "nvidia-test"
    folder.mkdir(parents=True)
    times = {"kind": "time", "status": "ok", "op": "weight_only_linear"}
    rows = [{**times, "shape": "8192x28672", "scheme": "W4A16-g128", "m": 1, "provider": "sliderquant", "q50_us": 42.0},
            {"kind": "check", "status": "error", "shape": "1x1", "scheme": "W2A16", "m": 3, "provider": "sliderquant",
             "error": "wrong"},
            {"kind": "time", "status": "error", "shape": "1x1", "scheme": "W2A16", "m": 3, "provider": "conch",
             "error": "a peer's"}]  # fmt: skip
    goal = {"text": "of copy", "target": 0.75, "measured": 0.7, "at_least": True, "where": "here", "passed": False}
    (folder / "kernels-quick.json").write_text(json.dumps({"rows": rows, "goals": [goal, {**goal, "measured": None}]}))
    for key, ratio in (("M=1", 0.9), ("M=2", 0.99)):
        state.add("tune", {"key": key, "ratio": ratio, "best": "warp_k 8 x 64"})
    state.add("retime", {"key": "M=1", "ratio": 0.92})
    for turn, ms in ((0, 9.0), (1, 2.0), (2, 3.0), (3, 4.0)):
        state.add(
            "decode", {"key": str(turn), "batch": 1, "turn": turn, "warm": turn > 0, "ms": {"quantized, graphs": ms}}
        )
    found = lines(state)
    for line in (
        "  goals: 1x1 M=3 W2A16 sliderquant: wrong",
        "roofs: copy 4000, read 4200 GB/s, bf16 800 TFLOP/s, empty kernel 1.50 us",
        "  MISS  of copy: 0.700 (at least 0.75; here)",
        "  estimates: 1 of 1 within 10%; took / foreseen from 1.05 to 1.05",
        "tune: 1 of 2 problems gain more than 3% over the rules",
        "  M=1: 0.90, once more 0.92: warp_k 8 x 64",
        "decode, batch 1, ms a token: quantized, graphs 3.000",
    ):
        assert line in found, line
    assert not any("a peer's" in line for line in found)


def test_the_end_survives_a_thousand_failures(state: State) -> None:
    for number in range(1000):
        state.add("tests", {"key": f"tests/{number}.py::{'x' * 300}", "outcome": "failed", "seconds": 1, "text": ""})
    text = summary.last_lines(state, PHASES, Path("out"), RESUME)
    assert len(text) <= summary.LONGEST
    assert "WRONG: 1000" in text
    assert text.endswith(f"To go on:\n  {RESUME}")


def test_files(state: State, tmp_path: Path) -> None:
    finish(state)
    state.add(
        "tests", {"key": "tests/a.py::test_b[<\x1b>]", "outcome": "failed", "seconds": 1.5, "text": "no \x1b[31m & <"}
    )
    state.add("tests", {"key": "tests/a.py::test_c", "outcome": "skipped", "seconds": 0, "text": "why"})
    for phase in ("roofline", "tune", "retime", "decode"):
        state.add(phase, {"key": "x"})
    for name in ("goals/nvidia-test/kernels-quick.json", "tune/nvidia-test.json", "log.txt"):
        path = state.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    summary.write_files(state, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["decode.json", "env.json", "junit.xml", "kernels-quick.json", "log.txt", "smoke.json",
                       "summary.json", "tuned-nvidia-test.json"]  # fmt: skip
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "1", "1")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["problems"] == summary.problems(state)
