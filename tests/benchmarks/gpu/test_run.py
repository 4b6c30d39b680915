"""Phases as processes that crash, hang or run out of time; what a run keeps of them; how seconds are shared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu import conductor
from benchmarks.gpu.phases import PHASES, SUMMARY_SECONDS, Phase, box
from benchmarks.gpu.state import Outcome, State, begun

ROOT = Path(__file__).resolve().parents[3]
FIRST, SECOND, THIRD = (Phase(name, 20, 5, f"the {name} one") for name in ("first", "second", "third"))


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "run")


@pytest.fixture
def conduct(state: State, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """`conduct(programs, seconds)`: phases that are Python programs, by name; the state's folder is their argument."""
    monkeypatch.setattr(conductor, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(conductor.machine, "versions", lambda: {"sliderquant_kernels": "0123"})

    def run(programs: dict[str, str], seconds: float = 100.0, phases: Sequence[Phase] = (FIRST, SECOND, THIRD)) -> bool:
        def command(phase: Phase, state: State, seconds: float, rehearsal: bool) -> list[str]:
            start = "import sys, time, os, json\nfolder = sys.argv[1]\n"
            return [sys.executable, "-c", start + programs.get(phase.name, "pass"), str(state.folder)]

        named = [phase for phase in phases if phase.name in programs]
        return conductor.conduct(named, state, time.monotonic() + seconds, True, os.environ, command=command)

    return run


def statuses(state: State) -> dict[str, str]:
    return {name: outcome.status for name, outcome in state.outcomes().items()}


def test_a_crash_costs_its_phase_alone_and_is_tried_once_more(conduct: Callable[..., bool], state: State) -> None:
    programs = {"first": "pass", "second": "print('last words', flush=True); os.abort()", "third": "pass"}
    assert not conduct(programs)
    assert statuses(state) == {"first": "done", "second": "failed", "third": "done"}
    assert state.outcome("second").detail == "killed by SIGABRT\nlast words"
    assert state.outcome("second").sources == "0123"
    assert not conduct(programs)
    assert {name: outcome.attempts for name, outcome in state.outcomes().items()} == {
        "first": 1,
        "second": 2,
        "third": 1,
    }
    assert not conduct(programs)
    assert state.outcome("second").attempts == 2
    assert state.log.read_text().count("last words") == 2


def test_what_failed_may_succeed_the_second_time(conduct: Callable[..., bool], state: State) -> None:
    conduct({"first": "pass", "second": "1 / 0"})
    assert "ZeroDivisionError" in state.outcome("second").detail
    assert conduct({"first": "pass", "second": "pass"})
    assert statuses(state) == {"first": "done", "second": "done"}


def test_without_the_first_one_nothing_is_begun(conduct: Callable[..., bool], state: State) -> None:
    for _ in range(3):
        assert not conduct({"first": "1 / 0", "second": "pass"})
    assert statuses(state) == {"first": "failed"}
    assert state.outcome("first").attempts == 3
    assert conduct({"first": "pass", "second": "pass"})


def test_what_hangs_is_ended_with_all_that_it_started(
    conduct: Callable[..., bool], state: State, tmp_path: Path
) -> None:
    quick = Phase("first", 1.0, 0.5, "hangs"), Phase("second", 1.0, 0.5, "")
    program = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    conduct({"first": "pass", "second": program}, 8.0 + SUMMARY_SECONDS, quick)
    assert time.monotonic() - start < 30
    assert statuses(state) == {"first": "done", "second": "failed"}
    assert state.outcome("second").detail.startswith("no end within")
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            break  # dead, and nobody has asked for its exit status
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_phase_that_is_not_through_goes_on_where_it_was(conduct: Callable[..., bool], state: State) -> None:
    program = """
from pathlib import Path
path = Path(folder) / "second.jsonl"
done = len(path.read_text().splitlines()) if path.is_file() else 0
path.open("a").write(json.dumps({"key": f"row {done}"}) + "\\n")
print("more is left")
sys.exit(75 if done < 2 else 0)
"""
    assert not conduct({"first": "pass", "second": program})
    assert state.outcome("second") == Outcome("partial", state.outcome("second").seconds, 1, "more is left", "0123")
    assert not conduct({"first": "pass", "second": program})
    assert conduct({"first": "pass", "second": program})
    assert [row["key"] for row in state.rows("second")] == ["row 0", "row 1", "row 2"]
    assert state.outcome("second").attempts == 3


def test_without_time_a_phase_waits(conduct: Callable[..., bool], state: State, capsys: pytest.CaptureFixture) -> None:
    assert not conduct({"first": "pass", "second": "pass", "third": "pass"}, SUMMARY_SECONDS + 2)
    assert statuses(state) == {"first": "waiting", "second": "waiting", "third": "waiting"}
    assert "too few seconds are left" in capsys.readouterr().out
    assert conduct({"first": "pass", "second": "pass", "third": "pass"})


def test_what_takes_the_rest_is_done_when_the_time_is(conduct: Callable[..., bool], state: State) -> None:
    rest = Phase("second", 0.5, 0.2, "", takes_rest=True)
    assert conduct(
        {"first": "pass", "second": "time.sleep(60)"}, 6.0 + SUMMARY_SECONDS, (Phase("first", 1, 0.1, ""), rest)
    )
    assert state.outcome("second").detail == "ended with the time"


def test_a_run_that_is_ended_keeps_what_it_has(tmp_path: Path) -> None:
    """As a machine ends it whose time is up: by SIGTERM to the command alone."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import os, sys, time
from pathlib import Path
from benchmarks.gpu import command as gpu
from benchmarks.gpu import conductor
from benchmarks.gpu.phases import Phase
from benchmarks.gpu.state import State
def command(phase, state, seconds, rehearsal):
    return [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
state = State(Path({str(tmp_path / "run")!r}))
phases = [Phase("first", 50, 5, "")]
with gpu._ended_gently():
    print(conductor.conduct(phases, state, time.monotonic() + 60, True, os.environ, command=command))
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and b"begun" in log.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert printed.splitlines()[-1] == "False"
    assert "interrupted" in printed
    assert State(tmp_path / "run").outcome("first").status == "partial"


def test_rows_survive_a_torn_line(state: State) -> None:
    state.add("first", {"key": "a", "value": 1})
    with (state.folder / "first.jsonl").open("a") as file:
        file.write('{"key": "b", "val')
    state.add("first", {"key": "c", "value": 3})
    state.add("first", {"key": "a", "value": 4})
    assert state.rows("first") == [{"key": "a", "value": 4}, {"key": "c", "value": 3}]
    assert state.rows("second") == []
    assert not begun(state.folder)
    state.keep("first", Outcome())
    assert begun(state.folder)


phases_strategy = st.builds(
    lambda seconds, least, cold: Phase("p", seconds, min(least, seconds), "", cold),
    st.floats(1, 200), st.floats(1, 50), st.sampled_from([0.0, 240.0]),
)  # fmt: skip


@given(phases_strategy, st.lists(phases_strategy, max_size=4), st.floats(-10, 2000), st.booleans())
def test_boxes(phase: Phase, later: list[Phase], left: float, compiled: bool) -> None:
    given_seconds = box(phase, later, left, compiled)
    assert given_seconds == 0 or phase.least <= given_seconds <= left - SUMMARY_SECONDS
    if given_seconds > phase.planned(compiled):
        # What it gets beyond its own share, the others do not need.
        others = sum(other.planned(compiled) for other in later)
        assert left - SUMMARY_SECONDS - given_seconds >= others - 1e-6
    if left - SUMMARY_SECONDS >= phase.least:
        assert given_seconds > 0


def test_the_whole_run_fits_its_budget_with_compiled_kernels() -> None:
    left, begun = 540.0, []
    for index, phase in enumerate(PHASES):
        seconds = box(phase, PHASES[index + 1 :], left, compiled=True)
        begun.append(seconds >= phase.seconds or phase.takes_rest)
        left -= min(seconds, phase.seconds)
    assert all(begun)
    assert left >= SUMMARY_SECONDS
