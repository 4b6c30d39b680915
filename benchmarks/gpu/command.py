"""Prove the package on a GPU: one command, a fixed number of seconds, and result files to send.

Phases follow one another, each in a process of its own: what crashes or hangs costs its phase alone, and a kernel
family that fails `smoke` is left out of what comes after. Every row is kept as soon as it is measured. When the time
is up, the same command with --resume goes on where this one ended. --rehearse does all of it without a GPU, with
Triton's interpreter and stub clocks: it shows that the run itself works, and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from . import cache, faults
from .conductor import conduct
from .phases import PHASES, SUMMARY_SECONDS, Phase
from .state import State, begun
from .summary import last_lines, problems, write_files

__all__ = ["add_arguments", "run"]

BUDGET = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default {BUDGET:.0f})")
    parser.add_argument("--state", type=Path, default=Path("gpu-run"), help="folder of the run, for --resume")
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
    phases = _checked(arguments)
    environment = {**os.environ, **_environment(arguments)}
    state = State(arguments.state)
    out = arguments.out or _default_out(arguments.rehearse, arguments.state)
    whole = conduct(
        phases, state, started + arguments.budget, arguments.rehearse, environment, lambda: write_files(state, out)
    )
    write_files(state, out)
    print(last_lines(state, phases, out, _resume_line(arguments)))
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
    if arguments.budget < PHASES[0].least + SUMMARY_SECONDS:
        raise SystemExit(
            f"--budget {arguments.budget:g}: expected at least {PHASES[0].least + SUMMARY_SECONDS:g} seconds"
        )
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            "gpu needs a CUDA GPU, and torch finds none (torch "
            f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}); --rehearse runs it without one"
        )
    if arguments.fault and not arguments.rehearse:
        raise SystemExit("--fault is for rehearsals: give --rehearse too, or leave it out")
    if arguments.cache is not None and not arguments.cache.is_file():
        raise SystemExit(
            f"--cache {arguments.cache}: there is no such file; `python -m benchmarks gpu-cache build` makes it"
        )
    for name, folder in (("--state", arguments.state), ("--out", arguments.out)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise SystemExit(f"{name} {folder}: a file is in the way; name a folder")
    if begun(arguments.state) and not arguments.resume:
        raise SystemExit(
            f"--state {arguments.state} holds a run: --resume goes on with it; name another folder for a new one"
        )
    return [phase for phase in PHASES if not arguments.only or phase.name in {"env", *arguments.only}]


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
            reason = cache.mismatch(cache.manifest(arguments.cache))
            if reason is None:
                found |= cache.environment(cache.unpack(arguments.cache))
        except cache.CacheError as error:
            raise SystemExit(f"--cache {error}") from error
        found["SLIDERQUANT_GPU_CACHE"] = f"{arguments.cache}: " + ("hit" if reason is None else f"miss: {reason}")
    return found


def _default_out(rehearsal: bool, state: Path) -> Path:
    from benchmarks import results

    return state / "out" if rehearsal else results.FOLDER / results.device_name() / "run"


def _resume_line(arguments: argparse.Namespace) -> str:
    given = [f"--state {arguments.state}"]
    given += [f"--out {arguments.out}"] if arguments.out else []
    given += [f"--cache {arguments.cache}"] if arguments.cache else []
    given += ["--rehearse"] if arguments.rehearse else []
    return f"python -m benchmarks gpu --resume --budget {arguments.budget:g} {' '.join(given)}"
