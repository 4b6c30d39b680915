"""Smoke: what it finds in a kernel that is wrong, and what is left out of a run afterwards."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import failures, smoke
from benchmarks.gpu.context import Context, OutOfTime
from benchmarks.gpu.pytest_plugin import LEFT_OUT, STATE, widths_of
from benchmarks.gpu.smoke import Smoke
from benchmarks.gpu.smoke_cases import CASES, Case, Check
from benchmarks.gpu.state import Outcome, State
from benchmarks.kernels.harness.workers import Failure

ROOT = Path(__file__).resolve().parents[3]
WANT = torch.linspace(1, 2, 64, dtype=torch.float64).view(8, 8)


@pytest.fixture
def row(monkeypatch):
    """`row(call)`: what smoke says of a kernel that must return WANT."""

    def of(call):
        def make(device):
            return Check(call, lambda y: y, WANT, 0.01)

        monkeypatch.setitem(CASES, "fake", Case("fake", "", None, make))
        return Smoke("cpu", 4)("fake")

    return of


def test_what_is_right(row):
    found = row(lambda: (WANT * 1.001).bfloat16())
    assert (found["status"], found["repeats"]) == ("ok", 4)
    assert 0 < found["relative_error"] < 0.01


def test_what_is_wrong(row):
    calls = iter(range(100))

    def sometimes():
        return WANT * (1 + (next(calls) == 3) * 1e-6)

    def raises():
        raise RuntimeError("illegal memory access\nand more")

    def needs_a_gpu():
        raise NotImplementedError("graphs are of a GPU")

    hole = WANT.clone()
    hole[3, 3] = float("nan")
    for call, status, error in (
        (lambda: WANT * 1.02, "wrong", "relative error 2.00e-02, at most 1.00e-02 is rounding"),
        (lambda: hole, "wrong", "some elements are not finite: not written, or overflowed"),
        (lambda: WANT[:4], "wrong", "shape [4, 8], expected [8, 8]"),
        (sometimes, "wrong", "other bits at call 4 of 4"),
        (raises, "error", "RuntimeError: illegal memory access (raises:"),
        (needs_a_gpu, "unsupported", "graphs are of a GPU"),
    ):
        found = row(call)
        assert found["status"] == status
        assert found["error"].startswith(error)


def test_every_family_and_width_has_a_case():
    found = {(case.family, case.bits) for case in CASES.values()}
    assert {("weight_only_linear", bits) for bits in (2, 3, 4, 8)} < found
    assert {("low_bit_linear", bits) for bits in (2, 4, 8)} < found
    assert {(family, None) for family in ("hadamard", "elementwise", "decode_attention", "graphs")} < found
    named = {family for families in failures.TEST_FILES.values() for family in families}
    assert named == {case.family for case in CASES.values()} - {"torch.compile"}
    for name in failures.TEST_FILES:
        file, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / file).read_text()


def test_tests_that_need_a_gpu_are_all_in_the_list():
    """A test file that skips without one, and that no run would ever reach, proves nothing."""
    needs = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "needs a CUDA GPU" in (text := path.read_text()) and "skipif(not torch.cuda.is_available()" in text
    }
    assert needs - {str(Path(__file__).relative_to(ROOT))} <= {name.partition("::")[0] for name in failures.TEST_FILES}


class FakeWorkers:
    """Answers `ok`, but for one case that hangs; after `count` answers the time is up."""

    def __init__(self, count, setup, arguments):
        self.processes, self.arguments = count, arguments

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, tasks, timeout, until):
        for index, task in enumerate(tasks):
            hangs = task == "elementwise rotary"
            yield task, (
                None if index >= self.most
                else Failure("no answer in time; the process was ended") if hangs
                else {"status": "ok"}
            )  # fmt: skip


def test_resuming_runs_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "Workers", FakeWorkers)
    FakeWorkers.most = 10
    state = State(tmp_path)
    with pytest.raises(OutOfTime, match=f"{len(CASES) - 10} of {len(CASES)} cases are left"):
        smoke.run(Context("smoke", state, time.monotonic() + 60, True))
    assert len(state.rows("smoke")) == 10
    FakeWorkers.most = 1000
    smoke.run(Context("smoke", state, time.monotonic() + 60, True))
    assert [row["key"] for row in state.rows("smoke")] == list(CASES)
    bad = [row for row in state.rows("smoke") if row["status"] != "ok"]
    assert [(row["family"], row["error"], row["tries"]) for row in bad] == [
        ("elementwise", "no answer in time; the process was ended", 1)
    ]
    # Once more, and then no more.
    for tries in (2, 2):
        smoke.run(Context("smoke", state, time.monotonic() + 60, True))
        assert [row["tries"] for row in state.rows("smoke") if row["status"] != "ok"] == [tries]


def fail(state, *keys):
    for key in keys:
        case = CASES[key]
        state.add("smoke", {"key": key, "family": case.family, "bits": case.bits, "status": "wrong", "error": ""})


def test_what_follows_from_a_family_that_failed(tmp_path):
    state = State(tmp_path / "three")
    fail(state, "weight_only_linear rows W3")
    assert failures.skipped_ops(state) == {"weight_only_linear": [3]}
    assert [failures.reason_to_skip(name, state) for name in ("tune", "decode", "goals", "tests")] == [None] * 4

    state = State(tmp_path / "four")
    fail(state, "weight_only_linear warp_k W4", "hadamard row")
    assert failures.skipped_ops(state) == {"weight_only_linear": [4]}  # the rotation is not timed there
    reasons = {
        name: failures.reason_to_skip(name, state) for name in ("tune", "retime", "decode", "sanitizer", "goals")
    }
    assert reasons.pop("goals") is None
    assert set(reasons.values()) == {"weight_only_linear at 4 bits failed smoke"}

    state = State(tmp_path / "attention")
    fail(state, "decode_attention shares")
    assert failures.reason_to_skip("decode", state) == "decode_attention failed smoke"
    assert failures.reason_to_skip("tune", state) is None
    state.keep("tune", Outcome("skipped"))
    assert failures.reason_to_skip("retime", state) == "nothing was tuned"


def test_cases_that_need_a_gpu_are_no_failures(tmp_path):
    state = State(tmp_path)
    state.add("smoke", {"key": "x", "family": "graphs", "bits": None, "status": "unsupported", "error": ""})
    assert failures.failed(state) == {}


def test_widths_of_parameters():
    assert widths_of({"bits": 3, "group_size": 4, "symmetric": True}) == {3}
    assert widths_of({"scheme": "W4A16-g128", "dtype": torch.float16}) == {4}
    assert widths_of({"m": 2, "name": "rows"}) == set()


def run_pytest(folder, state, *more):
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.gpu.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment[STATE] = str(state.folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_plugin_keeps_outcomes_and_leaves_out_what_has_no_use(tmp_path):
    for name, body in {
        "weight_only/test_gpu.py": """
            import pytest
            @pytest.mark.parametrize("bits", [2, 3, 4])
            def test_width(bits):
                assert bits != 4, "four"
            def test_plain():
                pass
            def test_skipped():
                pytest.skip("no reason")
        """,
        "rotation/test_gpu.py": "def test_rotation():\n    raise SystemExit('must not run')\n",
    }.items():
        path = tmp_path / "tests" / "sliderquant_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 12) for line in body.strip("\n").splitlines()) + "\n")
    state = State(tmp_path / "run")
    fail(state, "weight_only_linear rows W3", "hadamard row")
    done = run_pytest(tmp_path, state)
    assert done.returncode == 1, done.stdout
    rows = {row["key"].partition("::")[2]: row for row in state.rows("tests") if "outcome" in row}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_width[2]": "passed", "test_width[4]": "failed", "test_plain": "passed", "test_skipped": "skipped",
    }  # fmt: skip
    assert "four" in rows["test_width[4]"]["text"]
    assert "no reason" in rows["test_skipped"]["text"]
    # What has ended is not repeated, as the phase says before it starts pytest.
    (state.folder / LEFT_OUT).write_text(
        json.dumps([row["key"] for row in rows.values() if row["outcome"] != "failed"])
    )
    assert "1 failed, 5 deselected" in run_pytest(tmp_path, state).stdout
    assert json.loads((state.folder / "tests.jsonl").read_text().splitlines()[-1])["outcome"] == "failed"


def test_a_test_that_kills_its_process_costs_itself_alone(tmp_path):
    """xdist starts another process in its place, which must find the same tests."""
    path = tmp_path / "tests" / "test_a.py"
    path.parent.mkdir()
    path.write_text(
        "import os, pytest\n@pytest.mark.parametrize('i', range(12))\ndef test_a(i):\n    i == 5 and os.abort()\n"
    )
    state = State(tmp_path / "run")
    run_pytest(tmp_path, state, "-n", "2", "--dist", "worksteal")
    found = {row["key"].partition("[")[2]: row["outcome"] for row in state.rows("tests")}
    assert found == {f"{i}]": "failed" if i == 5 else "passed" for i in range(12)}
