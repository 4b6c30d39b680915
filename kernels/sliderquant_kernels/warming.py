"""Compiling what a program will launch, in parallel, before it launches it.

    with recorded_jobs() as jobs:
        model(ids)                      # launches what is compiled, notes what is not
    compile_jobs(jobs, arch=90)         # in other processes, into Triton's cache on disk

`python -m sliderquant_kernels.warming` is one of these processes: pickled jobs on standard input, one line for each on
standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

# A process takes about as long to start as so many kernels to compile.
PER_PROCESS = 6


@dataclass(frozen=True)
class Job:
    """One kernel to compile, by where it is: what a launch comes down to.

    Attributes:
        dtypes: of the tensors, the first arguments; None: there is none.
        numbers: the arguments after them.
    """

    module: str
    name: str
    dtypes: tuple[torch.dtype | None, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def compile(self, arch: int) -> None:
        """Compile for an architecture such as 90, as the launch would. Raises what the compiler raises."""
        from .launches import POINTERS, Launch, compile_launch
        from .tiles import Choice

        kernel = getattr(import_module(self.module), self.name)
        names = list(kernel.arg_names)
        types = {name: POINTERS[dtype] for name, dtype in zip(names, self.dtypes, strict=False) if dtype is not None}
        sizes = {}
        for name, number in zip(names[len(self.dtypes) :], self.numbers, strict=False):
            if isinstance(number, float):
                types[name] = "fp32"
            elif number is not None:
                sizes[name] = number
        compile_launch(Launch(Choice("recorded"), kernel, types, sizes, self.constants, self.options), arch)


@contextmanager
def recorded_jobs() -> Iterator[list[Job]]:
    """The kernels that are launched meanwhile and are not compiled yet: each once, none of them launched."""
    from .launch_plan import recorded

    launchers: set[Any] = set()
    found: list[Job] = []

    def note(launcher: Any, dtypes: Any, numbers: tuple[Any, ...]) -> None:
        # A launcher is one compiled kernel, whatever the numbers that it is not specialized for.
        if launcher not in launchers:
            launchers.add(launcher)
            function, constants, options = launcher.kernel.fn, launcher.constants, launcher.options
            found.append(Job(function.__module__, function.__name__, dtypes, numbers, constants, options))

    with recorded(note):
        yield found


def compile_jobs(
    jobs: Sequence[Job], arch: int, processes: int | None = None, done: Callable[[int, int], None] | None = None
) -> list[str]:
    """Compile into Triton's cache on disk, where launches of this process find it.

    Args:
        arch: of the GPU, 90 for compute capability 9.0.
        processes: at most; None: one for every core, fewer for few jobs.
        done: called with the number of jobs that are done, and of all.

    Returns:
        What went wrong, a line for each job that could not be compiled.
    """
    most = processes or _cores()
    count = max(1, min(most, -(-len(jobs) // PER_PROCESS)))
    if count == 1:
        return _compile_here(jobs, arch, done)
    shares = [jobs[start::count] for start in range(count)]
    workers = [_start(share, arch) for share in shares]
    errors, finished = [], 0
    try:
        for worker in workers:
            assert worker.stdout is not None
            for line in worker.stdout:
                finished += 1
                if line.strip():
                    errors.append(line.strip())
                if done is not None:
                    done(finished, len(jobs))
            if worker.wait() != 0:
                errors.append(f"a compiling process ended with exit code {worker.returncode}")
    finally:
        for worker in workers:
            with worker:
                worker.kill()
    return errors


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile_here(jobs: Sequence[Job], arch: int, done: Callable[[int, int], None] | None) -> list[str]:
    errors = []
    for number, job in enumerate(jobs, 1):
        errors += [error] if (error := _attempt(job, arch)) else []
        if done is not None:
            done(number, len(jobs))
    return errors


def _start(jobs: Sequence[Job], arch: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # No GPU: compiling needs none, and a context takes half a gigabyte of it.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [sys.executable, "-m", "sliderquant_kernels.warming", str(arch)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # its exit code says more
        process.stdin.write(pickle.dumps(list(jobs)).hex())
        process.stdin.close()
    return process


def _attempt(job: Job, arch: int) -> str:
    try:
        job.compile(arch)
    except Exception as error:  # what cannot be compiled says so when it is launched
        return f"{job.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def main() -> None:
    """Compile the jobs that standard input has, and print a line for each: empty, or what went wrong."""
    for job in pickle.loads(bytes.fromhex(sys.stdin.read())):
        print(_attempt(job, int(sys.argv[1])), flush=True)


if __name__ == "__main__":
    main()
