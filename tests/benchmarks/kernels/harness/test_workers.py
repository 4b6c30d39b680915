"""Processes that die, hang or lose their device cost one task each. The tasks are expressions, evaluated over there."""

import time
from functools import partial

import pytest

from benchmarks.kernels.harness.workers import Failure, Workers

LOST = "(_ for _ in ()).throw(__import__('benchmarks.kernels.harness.workers').kernels.harness.workers.Fatal('lost'))"
DIE = "__import__('os')._exit(3)"
SLEEP = "__import__('time').sleep(60)"
PROCESS = "__import__('os').getpid()"


@pytest.fixture
def workers():
    """`workers(count)`: processes that evaluate expressions."""
    made = []

    def make(count=1, setup=partial, arguments=(eval,)):
        made.append(Workers(count, setup, arguments))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


def test_answers_come_from_one_process_that_stays(workers):
    pool = workers()
    answers = dict(pool.run(["6 * 7", PROCESS], 60))
    assert answers["6 * 7"] == 42
    assert pool.ask(PROCESS, 60) == answers[PROCESS]


def test_a_dead_process_costs_its_task_only(workers):
    pool = workers()
    answers = list(pool.run([PROCESS, DIE, PROCESS + "+ 0"], 60))
    assert answers[1] == (DIE, Failure("the process died (exit code 3)"))
    assert isinstance(answers[0][1], int)
    assert isinstance(answers[2][1], int)
    assert answers[0][1] != answers[2][1]


def test_an_exception_that_nobody_caught_is_a_dead_process(workers):
    assert workers().ask("1 / 0", 60) == Failure("the process died (exit code 1)")


def test_a_task_without_end_is_given_up(workers):
    pool = workers()
    assert pool.ask("1", 60) == 1
    start = time.monotonic()
    assert list(pool.run([SLEEP, "2"], 1)) == [(SLEEP, Failure("no answer in time; the process was ended")), ("2", 2)]
    assert time.monotonic() - start < 50


def test_a_lost_device_is_an_answer_and_the_end_of_its_process(workers):
    pool = workers()
    before = pool.ask(PROCESS, 60)
    assert list(pool.run([LOST, PROCESS], 60)) == [(LOST, "lost"), (PROCESS, pytest.approx(before, abs=1e6))]
    assert pool.ask(PROCESS, 60) != before


def test_no_task_is_begun_after_the_time_is_up(workers):
    pool = workers()
    pool.ask("0", 60)
    tasks = ["__import__('time').sleep(0.6) or 1", "2", "3"]
    assert list(pool.run(tasks, 60, until=time.monotonic() + 0.3)) == [("2", None), ("3", None), (tasks[0], 1)]
    assert list(pool.run(["4"], 60, until=time.monotonic() - 1)) == [("4", None)]


def test_a_setup_that_fails_ends(workers):
    answers = list(workers(setup=divmod, arguments=(1, 0)).run(["1", "2"], 60))
    assert [answer for _, answer in answers] == [Failure("while starting: the process died (exit code 1)")] * 2


def test_later_processes_get_the_new_arguments(workers):
    pool = workers()
    assert pool.ask("1", 60) == 1
    pool.arguments = (len,)
    pool.ask(DIE, 60)
    assert pool.ask("abc", 60) == 3


def test_several_processes_share_the_tasks(workers):
    found = set()
    for _, process in workers(2).run([f"__import__('time').sleep(0.3 + 0 * {i}) or {PROCESS}" for i in range(200)], 60):
        found.add(process)
        if len(found) == 2:
            return
    pytest.fail("one process did it all")
