"""Processes that answer tasks one at a time, and whose end is one task's misfortune only.

A kernel that reads out of bounds takes the CUDA context with it, a deadlock never returns, a compiler may crash: the
task's row says so, and a new process goes on with the next one.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Failure", "Fatal", "Workers"]

# Until a process has imported torch and seen the device.
START_SECONDS = 180.0
# What a task may still take when no further one is begun.
GRACE_SECONDS = 10.0


class Fatal(Exception):
    """Raised by a worker that has an answer and can give no other: the device is lost to its process."""

    def __init__(self, answer: Any) -> None:
        super().__init__("the device is lost to this process")
        self.answer = answer


@dataclass(frozen=True)
class Failure:
    """A task that got no answer, and why."""

    error: str


@dataclass
class _Worker:
    process: Any
    connection: Connection
    deadline: float
    ready: bool = False
    task: Any = None


class Workers:
    """Up to `count` processes, each with the callable that `setup(*arguments)` returns in it.

    `arguments` may be changed: processes that start later get the new ones.
    """

    def __init__(self, count: int, setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self._count, self._setup = count, setup
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            _end(worker)
        self._workers = []

    def ask(self, task: Any, timeout: float) -> Any:
        """The answer to one task, or a Failure."""
        return next(answer for _, answer in self.run([task], timeout))

    def run(
        self, tasks: Iterable[Any], timeout: float, until: float | None = None
    ) -> Iterator[tuple[Any, Any | Failure | None]]:
        """(task, answer) as they come; a Failure for a task without one after `timeout` seconds or whose process died.

        After `until`, a time of time.monotonic, no task is begun, and those that do not end soon are given up: these
        come with None.
        """
        waiting = list(reversed(list(tasks)))
        while waiting or self._busy():
            if until is not None and time.monotonic() > until:
                while waiting:
                    yield waiting.pop(), None
                if not self._busy():
                    return
            while len(self._workers) < min(self._count, len(waiting) + self._busy()):
                self._workers.append(self._start())
            for worker in [worker for worker in self._workers if worker.ready and worker.task is None]:
                if waiting:
                    self._hand(worker, waiting, timeout, until)
            yield from self._collect(waiting, until)

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._setup, self.arguments)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic() + START_SECONDS)

    def _hand(self, worker: _Worker, waiting: list[Any], timeout: float, until: float | None) -> None:
        try:
            worker.connection.send(waiting[-1])
        except OSError:  # It died while it had nothing to do.
            self._remove(worker)
            return
        worker.task = waiting.pop()
        worker.deadline = time.monotonic() + timeout
        if until is not None:
            worker.deadline = min(worker.deadline, until + GRACE_SECONDS)

    def _collect(self, waiting: list[Any], until: float | None) -> Iterator[tuple[Any, Any]]:
        """Wait until a process has something to say or has run out of time."""
        active = [worker for worker in self._workers if worker.task is not None or not worker.ready]
        if not active:
            return
        ends = [worker.deadline for worker in active] + ([until] if until is not None and waiting else [])
        timeout = max(0.0, min(ends) - time.monotonic())
        speaking = wait([worker.connection for worker in active], timeout=timeout)
        for worker in active:
            if worker.connection in speaking:
                yield from self._receive(worker, waiting)
            elif time.monotonic() >= worker.deadline:
                late = until is not None and time.monotonic() > until
                failure = None if late else Failure("no answer in time; the process was ended")
                yield from self._give_up(worker, failure, waiting)

    def _receive(self, worker: _Worker, waiting: list[Any]) -> Iterator[tuple[Any, Any]]:
        try:
            kind, answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            yield from self._give_up(worker, Failure(f"the process died (exit code {code})"), waiting)
            return
        if kind == "ready":
            worker.ready = True
            return
        task, worker.task = worker.task, None
        if kind == "fatal":
            self._remove(worker)
        yield task, answer

    def _give_up(self, worker: _Worker, failure: Failure | None, waiting: list[Any]) -> Iterator[tuple[Any, Any]]:
        self._remove(worker)
        if worker.task is not None:
            yield worker.task, failure
        elif waiting:
            # It did not even start, and the next one may not either: every start costs a task, so that this ends.
            yield waiting.pop(), None if failure is None else Failure(f"while starting: {failure.error}")

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker)


def _serve(connection: Connection, setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    """What a process does until its connection closes. Ctrl-C is for the parent, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = setup(*arguments)
    connection.send(("ready", None))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            reply = ("answer", answer(task))
        except Fatal as error:
            reply = ("fatal", error.answer)
        connection.send(reply)


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join(5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(5)
