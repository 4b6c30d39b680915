"""`python -m benchmarks gpu`: what it refuses, and rehearsals of whole runs without a GPU."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import command
from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.state import Outcome, State, begun

ROOT = Path(__file__).resolve().parents[3]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "gpu needs a CUDA GPU, and torch finds none"),
        (("--rehearse", "--only", "tune", "speed"), "--only speed: expected some of env, smoke"),
        (("--rehearse", "--budget", "5"), "--budget 5: expected seconds, at least 20"),
        (("--rehearse", "--budget", "nan"), "--budget nan: expected seconds"),
        (("--rehearse", "--cache", "nowhere.tar.xz"), "--cache nowhere.tar.xz: there is no such file"),
        (("--rehearse", "--cache", "{file}"), "it is not whole or no archive"),
        (("--rehearse", "--state", "{begun}"), "holds a run: --resume goes on with it"),
        (("--rehearse", "--out", "{file}"), "--out .*file: nothing can be written there"),
        (("--rehearse", "--state", "{file}"), "--state .*file: nothing can be written there"),
        (("--rehearse", "--resume"), "holds no run to go on with; leave --resume out"),
        (("--cache", "nowhere.tar.xz"), "--cache nowhere.tar.xz: there is no such file"),
        (("--fault", "crash:env"), "--fault is for rehearsals"),
        (("--rehearse", "--state", "{begun}", "--resume"), "holds a run on nvidia-test, this is a rehearsal"),
    ],
)
def test_what_it_refuses_before_anything_is_begun(
    words: tuple[str, ...], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("no archive")
    State(tmp_path / "begun").keep("env", Outcome("done"))
    State(tmp_path / "begun").device = "nvidia-test"
    places = {"file": tmp_path / "file", "begun": tmp_path / "begun"}
    given = [word.format(**places) for word in words]
    given += [] if "--state" in given else ["--state", str(tmp_path / "state")]
    with pytest.raises(SystemExit, match=error):
        command.run(parse(*given))
    assert not begun(tmp_path / "state")


@pytest.mark.parametrize("fault", ["crash:everything", "hang:", "stop:env", "wrong:elementwise"])
def test_faults_that_there_are_not(fault: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--rehearse", "--fault", fault)
    assert f"{fault!r}: expected" in capsys.readouterr().err


def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(SystemExit, match=r"compute capability 8.0 or newer; Tesla T4 has 7.5"):
        command.run(parse("--state", str(tmp_path / "state")))
    assert not begun(tmp_path / "state")


def test_what_the_cache_of_compiled_kernels_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.cache, "changed", lambda _: ["b.kernel", "a.kernel"])
    assert command._hit(None, "built for another") == "miss: built for another"
    assert command._hit(None, None) == "in part: changed since it was built: a.kernel, b.kernel"
    monkeypatch.setattr(command.cache, "changed", lambda _: [])
    assert command._hit(None, None) == "hit"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    other = "another run is going on there"
    with command._alone(tmp_path), pytest.raises(SystemExit, match=other), command._alone(tmp_path):
        pass
    with command._alone(tmp_path):
        pass


def test_a_new_run_takes_away_the_files_of_an_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("decode.json", "kernels-quick.json", "tuned-nvidia-test.json", "mine.txt"):
        (out / name).write_text("old")
    command._begin(parse("--rehearse", "--state", str(tmp_path / "state")), State(tmp_path / "state"), out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert State(tmp_path / "state").device == "a rehearsal"


def test_what_failed_in_smoke_is_tried_once_more(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.keep("smoke", Outcome("done", 1.0, 1))
    for tries, status in ((1, "partial"), (2, "done")):
        state.add(
            "smoke", {"key": "x", "family": "graphs", "bits": None, "status": "wrong", "error": "", "tries": tries}
        )
        state.keep("smoke", Outcome("done", 1.0, 1))
        command._begin(parse("--rehearse", "--resume", "--state", str(tmp_path)), state, tmp_path / "out")
        assert state.outcome("smoke").status == status


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`rehearse(*words)`: the command as a user runs it, in the folder of the test."""

    def run(*words: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--budget", "1500", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_rehearsal_from_nothing(rehearse: Callable[..., subprocess.CompletedProcess], tmp_path: Path) -> None:
    done = rehearse()
    assert done.returncode == 0, done.stdout + done.stderr
    state = State(tmp_path / "gpu-rehearsal")
    assert {name: outcome.status for name, outcome in state.outcomes().items()} == {
        phase.name: "done" for phase in PHASES
    }
    assert "nothing is wrong" in done.stdout
    assert done.stdout.splitlines()[-1] == "all phases are through"
    files = {path.name for path in (tmp_path / "gpu-rehearsal" / "out").iterdir()}
    assert {path.removesuffix(".json") for path in files} >= {"env", "smoke", "kernels-tiny", "decode", "summary"}
    assert {"junit.xml", "log.txt"} < files
    assert len(files) <= 8
    decode = json.loads((tmp_path / "gpu-rehearsal" / "out" / "decode.json").read_text())
    ways = {"quantized, graphs", "quantized, no graphs", "original, graphs", "original, no graphs"}
    assert {row["batch"]: set(row["ms"]) for row in decode if "turn" in row} == {1: ways, 2: ways}
    assert all(row["status"] in ("ok", "unsupported") for row in state.rows("smoke"))
    # Once more: there is nothing left to do.
    again = rehearse("--resume")
    assert again.returncode == 0
    assert "all phases are through" in again.stdout
    assert all(outcome.attempts == 1 for outcome in state.outcomes().values())


@pytest.mark.slow
def test_a_rehearsal_in_which_much_goes_wrong(
    rehearse: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    faults = ("--fault", "crash:roofline", "--fault", "hang:elementwise+rotary", "--fault",
              "wrong:weight_only_linear+rows+W4")  # fmt: skip
    phases = ("--only", "smoke", "roofline", "tune", "decode", "sanitizer")
    done = rehearse(*phases, *faults)
    assert done.returncode == 1, done.stdout + done.stderr
    state = State(tmp_path / "gpu-rehearsal")
    reason = "weight_only_linear at 4 bits failed smoke"
    assert {name: (outcome.status, outcome.detail) for name, outcome in state.outcomes().items()} == {
        "env": ("done", ""), "smoke": ("done", ""), "roofline": ("failed", "killed by SIGABRT"),
        **dict.fromkeys(("tune", "decode", "sanitizer"), ("skipped", reason)),
    }  # fmt: skip
    bad = {row["key"]: row["status"] for row in state.rows("smoke") if row["status"] not in ("ok", "unsupported")}
    assert bad == {"elementwise rotary": "error", "weight_only_linear rows W4": "wrong"}
    assert "no answer in time; the process was ended" in done.stdout
    assert "left: roofline. To go on:" in done.stdout
    # Mended: what crashed goes on after the row that it had, what failed is tried again, and nothing is skipped now.
    again = rehearse("--resume", *phases)
    assert again.returncode == 0, again.stdout
    assert {name: outcome.status for name, outcome in state.outcomes().items()} == dict.fromkeys(
        ("env", "smoke", "roofline", "tune", "decode", "sanitizer"), "done"
    )
    assert [row["key"] for row in state.rows("roofline")] == ["floors", "L2", "int8", "host"]
    assert again.stdout.splitlines()[-1] == "env, smoke, roofline, decode, tune, sanitizer: through"
