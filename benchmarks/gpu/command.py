"""Prove the package on a GPU: one command, a fixed number of seconds, and result files to send.

Phases follow one another, each in a process of its own: what crashes or hangs costs its phase alone, and a kernel
family that fails `smoke` is left out of what comes after. Every row is kept as soon as it is measured. When the time
is up, the same command with --resume goes on where this one ended. --rehearse does all of it without a GPU, with
Triton's interpreter and stub clocks: it shows that the run itself works, and measures nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from benchmarks import results

from . import faults
from .cache import archive as cache
from .conductor import conduct
from .phases import PHASES, SUMMARY_SECONDS, Phase
from .smoke import may_be_tried
from .state import State, begun
from .summary import FILES, last_lines, problems, write_files

__all__ = ["add_arguments", "run"]

BUDGET = 540.0
# The first phase, the summary, and what this process has imported before.
LEAST_BUDGET = PHASES[0].least + SUMMARY_SECONDS + 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default {BUDGET:.0f})")
    parser.add_argument(
        "--state", type=Path, help="folder of the run, for --resume (default: gpu-run, or gpu-rehearsal)"
    )
    parser.add_argument("--out", type=Path, help="folder for the result files (default: results of this GPU)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --state")
    parser.add_argument("--cache", type=Path, help="file of `gpu-cache build`, with compiled kernels")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="only these phases, and env")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: interpreter and stub clocks")
    help_faults = "in a rehearsal, break something: crash:PHASE, hang:KERNEL or wrong:KERNEL; repeatable"
    parser.add_argument(
        "--fault", action="append", default=[], metavar="WHAT:NAME", type=faults.parse, help=help_faults
    )


def run(arguments: argparse.Namespace) -> None:
    """Exits with 1 when something is wrong, with 3 when the time was too short for all of it."""
    started = time.monotonic()
    arguments.state = arguments.state or Path("gpu-rehearsal" if arguments.rehearse else "gpu-run")
    phases = _checked(arguments)
    environment = {**os.environ, **_environment(arguments)}
    out = arguments.out or _default_out(arguments.rehearse, arguments.state)
    for name, folder in (("--state", arguments.state), ("--out", out)):
        _check_writable(name, folder)
    state = State(arguments.state)
    with _alone(arguments.state), _ended_gently():
        _begin(arguments, state, out)
        whole = False
        try:
            whole = conduct(
                phases, state, started + arguments.budget, arguments.rehearse, environment,
                lambda: write_files(state, out),
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept")
        write_files(state, out)
        print(last_lines(state, phases, out, _resume_line(arguments)), flush=True)
    if problems(state):
        raise SystemExit(1)
    if not whole:
        raise SystemExit(3)


def _checked(arguments: argparse.Namespace) -> list[Phase]:
    """The phases to run. Raises SystemExit for arguments that cannot be meant, before anything is begun."""
    known = [phase.name for phase in PHASES]
    unknown = set(arguments.only or ()) - set(known)
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if not LEAST_BUDGET <= arguments.budget < math.inf:
        raise SystemExit(f"--budget {arguments.budget:g}: expected seconds, at least {LEAST_BUDGET:g}")
    if arguments.fault and not arguments.rehearse:
        raise SystemExit("--fault is for rehearsals: give --rehearse too, or leave it out")
    if arguments.cache is not None and not arguments.cache.is_file():
        raise SystemExit(f"--cache {arguments.cache}: there is no such file; `make gpu-cache` builds it")
    if arguments.resume and not begun(arguments.state):
        raise SystemExit(f"--state {arguments.state} holds no run to go on with; leave --resume out for a new one")
    if not arguments.rehearse:
        _check_gpu()
    if begun(arguments.state):
        if not arguments.resume:
            raise SystemExit(
                f"--state {arguments.state} holds a run: --resume goes on with it; name another folder for a new one"
            )
        device = State(arguments.state).device
        if device != _device(arguments):
            raise SystemExit(
                f"--state {arguments.state} holds a run on {device}, this is {_device(arguments)}: name another folder"
            )
    return [phase for phase in PHASES if not arguments.only or phase.name in {"env", *arguments.only}]


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            f"gpu needs a CUDA GPU, and torch finds none (torch {torch.__version__}, CUDA "
            f"{torch.version.cuda or 'not built in: install a CUDA build of torch'}); --rehearse runs it without one"
        )
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability < (8, 0):
        raise SystemExit(
            f"gpu needs an NVIDIA GPU of compute capability 8.0 or newer; {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}; choose another one with CUDA_VISIBLE_DEVICES"
        )


def _device(arguments: argparse.Namespace) -> str:
    return "a rehearsal" if arguments.rehearse else results.device_name()


def _check_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f"{name} {folder}: nothing can be written there ({error.strerror}); name another folder"
        ) from None


def _begin(arguments: argparse.Namespace, state: State, out: Path) -> None:
    """Note what the run is on, and take away the files of an earlier one; have `smoke` try again what failed once."""
    if not begun(arguments.state):
        state.device = _device(arguments)
        for path in [out / name for name in FILES] + list(out.glob("tuned-*.json")) + list(out.glob("kernels-*.json")):
            path.unlink(missing_ok=True)
    elif any(may_be_tried(row) for row in state.rows("smoke")):
        state.keep("smoke", replace(state.outcome("smoke"), status="partial", detail="what failed is tried once more"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run at a time in a folder. Raises SystemExit while there is another."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"--state {folder}: another run is going on there; wait, or name another folder") from None
        yield


@contextmanager
def _ended_gently() -> Iterator[None]:
    """Whoever ends this command, as a machine does whose time is up, gets the summary of what there is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Once: what comes now is the summary.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """What the processes of the phases find besides this process's own environment."""
    root = Path(__file__).resolve().parent.parent.parent
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1" if arguments.rehearse else "0",
    }
    if arguments.fault:
        found[faults.VARIABLE] = " ".join(arguments.fault)
    if arguments.cache is not None:
        try:
            manifest = cache.manifest(arguments.cache)
            reason = cache.mismatch(manifest)
            if reason is None:
                found |= cache.environment(cache.unpack(arguments.cache))
        except cache.CacheError as error:
            raise SystemExit(f"--cache {error}") from error
        found["SLIDERQUANT_GPU_CACHE"] = f"{arguments.cache}, {manifest.kernels} kernels: " + _hit(manifest, reason)
    return found


def _hit(manifest: cache.Manifest, reason: str | None) -> str:
    """`hit`, or why kernels have to be compiled all the same."""
    if reason is not None:
        return f"miss: {reason}"
    names = cache.changed(manifest)
    return f"in part: changed since it was built: {', '.join(sorted(names))}" if names else "hit"


def _default_out(rehearsal: bool, state: Path) -> Path:
    return state / "out" if rehearsal else results.FOLDER / results.device_name() / "run"


def _resume_line(arguments: argparse.Namespace) -> str:
    given = ["--state", str(arguments.state)]
    given += ["--out", str(arguments.out)] if arguments.out else []
    given += ["--cache", str(arguments.cache)] if arguments.cache else []
    given += ["--rehearse"] if arguments.rehearse else []
    given += ["--only", *arguments.only] if arguments.only else []
    return f"python -m benchmarks gpu --resume --budget {arguments.budget:g} {shlex.join(given)}"
