"""Compiling what a program will launch, in parallel, before it launches it.

    with recorded_jobs() as jobs:
        model(ids)                      # launches what is compiled, notes what is not
    compile_jobs(jobs, arch=90)         # in other processes, into Triton's cache on disk

`python -m sliderquant_kernels.tools.warming` is one of these processes: pickled jobs, a line each, on standard input,
and one line for each on standard output.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from queue import SimpleQueue
from typing import Any, Protocol

import torch

# A process takes about as long to start as so many kernels to compile.
PER_PROCESS = 6
# What `compile_each` says of a job that there was no time for.
LATE = "not compiled in time"
# Seconds that a process has to start, when all of them read torch from a disk at once.
START = 120.0


class Compilable(Protocol):
    """What can be compiled: picklable, and named for what is said about it."""

    @property
    def name(self) -> str: ...

    def compile(self, arch: int) -> None:
        """Compile for an architecture such as 90. Raises whatever is wrong."""


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
        from ..common.choices import Choice
        from ..common.compiling import POINTERS, Launch, compile_launch

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
    from ..common.launch_plan import recorded

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
    return [error for error in compile_each(jobs, arch, processes, done) if error]


def compile_each(
    jobs: Sequence[Compilable],
    arch: int,
    processes: int | None = None,
    done: Callable[[int, int], None] | None = None,
    timeout: float | None = None,
    seconds: float | None = None,
) -> list[str]:
    """Compile like `compile_jobs`, in the order of the jobs.

    Args:
        timeout: seconds for one job. One that takes longer is ended with its process, and another process goes on.
        seconds: for all of them; what is not compiled then is `LATE`.

    Returns:
        What went wrong with each job, empty where nothing did.
    """
    most = processes or _cores()
    count = max(1, min(most, -(-len(jobs) // PER_PROCESS)))
    if count == 1 and timeout is None and seconds is None:
        return _compile_here(jobs, arch, done)
    crew = _Crew(jobs, arch, timeout, seconds)
    errors = [LATE] * len(jobs)
    threads = [threading.Thread(target=crew.work, name="sliderquant-compile") for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for number in range(1, len(jobs) + 1):
            index, errors[index] = crew.answers.get()
            if done is not None:
                done(number, len(jobs))
    finally:
        crew.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return errors


class _Crew:
    """Threads with a process each that compile what is in one queue."""

    def __init__(self, jobs: Sequence[Compilable], arch: int, timeout: float | None, seconds: float | None) -> None:
        self._left = deque(enumerate(jobs))
        self._arch, self._timeout = arch, timeout
        self._until = None if seconds is None else time.monotonic() + seconds
        self._workers: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self.answers: SimpleQueue[tuple[int, str]] = SimpleQueue()

    def work(self) -> None:
        """Compile until nothing is left, in a process that is replaced when it ends."""
        worker = None
        while True:
            try:
                index, job = self._left.popleft()
            except IndexError:
                break
            try:
                if worker is None and self._rest(START) > 0:
                    worker = self._start()
                error = LATE if worker is None else self._ask(worker, job)
            except Exception as problem:  # a process that cannot be started, a job that cannot be sent
                error = f"{job.name}: {type(problem).__name__}: {problem}"
            if worker is not None and worker.poll() is not None:
                self._end(worker)
                worker = None
            self.answers.put((index, error))
        if worker is not None:
            self._end(worker)

    def stop(self) -> None:
        """End all processes; the threads then have nothing left."""
        self._stopped = True
        self._left.clear()
        for worker in list(self._workers):
            _kill(worker)

    def _rest(self, limit: float | None) -> float:
        """Seconds that something may take, whose own limit is given."""
        rest = float("inf") if limit is None else limit
        return rest if self._until is None else min(rest, self._until - time.monotonic())

    def _start(self) -> subprocess.Popen[str] | None:
        worker = _start(self._arch)
        self._workers.add(worker)
        if self._stopped:  # meanwhile
            _kill(worker)
        # It says when it has imported everything: that is no job's time.
        if _line(worker, self._rest(START)) is None:
            self._end(worker)
            if self._rest(None) <= 0:
                return None
            raise RuntimeError(f"a compiling process ended with exit code {worker.returncode} before its first job")
        return worker

    def _ask(self, worker: subprocess.Popen[str], job: Compilable) -> str:
        assert worker.stdin is not None
        limit = self._rest(self._timeout)
        with suppress(BrokenPipeError):  # its exit code says more
            worker.stdin.write(pickle.dumps(job).hex() + "\n")
            worker.stdin.flush()
        started = time.monotonic()
        answer = _line(worker, limit)
        if answer is not None:
            return answer
        worker.wait()
        if time.monotonic() - started < limit:
            return f"{job.name}: a compiling process ended with exit code {worker.returncode}"
        late = self._timeout is None or limit < self._timeout
        return LATE if late else f"{job.name}: compiling took longer than {self._timeout:g} s"

    def _end(self, worker: subprocess.Popen[str]) -> None:
        self._workers.discard(worker)
        _kill(worker)
        with suppress(BrokenPipeError), worker:  # what it has not read
            pass


def _line(worker: subprocess.Popen[str], limit: float) -> str | None:
    """The next line of a process, which ends if that takes longer than `limit` seconds; None: it has ended."""
    assert worker.stdout is not None
    timer = threading.Timer(max(limit, 0.0), _kill, (worker,)) if limit != float("inf") else None
    if timer is not None:
        timer.start()
    try:
        line = worker.stdout.readline()
    finally:
        if timer is not None:
            timer.cancel()
    return line.strip() if line.endswith("\n") else None


def _kill(worker: subprocess.Popen[str]) -> None:
    """End a process with those that it has started: the assembler is one, and may be what hangs."""
    if worker.poll() is not None:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile_here(jobs: Sequence[Compilable], arch: int, done: Callable[[int, int], None] | None) -> list[str]:
    errors = []
    for number, job in enumerate(jobs, 1):
        errors.append(_attempt(job, arch))
        if done is not None:
            done(number, len(jobs))
    return errors


def _start(arch: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # No GPU: compiling needs none, and a context takes half a gigabyte of it.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, "-m", "sliderquant_kernels.tools.warming", str(arch)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def _attempt(job: Compilable, arch: int) -> str:
    try:
        job.compile(arch)
    except Exception as error:  # what cannot be compiled says so when it is launched
        return f"{job.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def main() -> None:
    """Compile the jobs that standard input has, and print a line for each: empty, or what went wrong. The first line
    is empty too, and says that jobs may come."""
    # Compilers print, and their lines are no answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_module("sliderquant_kernels.weight_only.launch")
    print(flush=True, file=answers)
    for line in sys.stdin:
        try:
            job = pickle.loads(bytes.fromhex(line))
        except Exception as error:
            answer = f"a job: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            answer = _attempt(job, int(sys.argv[1]))
        print(answer, flush=True, file=answers)


if __name__ == "__main__":
    main()
