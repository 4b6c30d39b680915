"""Kernels against their physical floors and the best public kernels, every row checked before it is timed.

On a GPU: checks of all variants first, then times with cold caches, then the goals against what was measured. Without
one it measures the CPU routes against torch's 16-bit matmul. Started again, it measures what is missing.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from sliderquant_kernels.tools.timing import Settings

from .harness import figures, machine
from .harness.case import Goal, Op, Plan, Provider, Task
from .harness.floors import Floors
from .harness.store import Store
from .harness.workers import Failure, Workers
from .measure import setup
from .ops import OPS

# How much of a budget may go by before timing begins: checks, and compiling what will be timed.
CHECK_SHARE, WARM_SHARE = 0.4, 0.6
# Each holds a CUDA context, a weight, and what packing it takes.
MOST_HELPERS, HELPER_BYTES = 14, 5e9
# How often the file itself is written; between, rows are in the journal.
WRITE_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subset", default="quick", help="quick (default), decode, prefill, schemes, full")
    parser.add_argument("--op", choices=OPS, nargs="*", default=list(OPS), help="only these ops")
    parser.add_argument("--providers", nargs="*", help="only these, the baseline aside")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    parser.add_argument("--budget", type=float, help="seconds after which no row is begun (quick on a GPU: 225)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one row, with its compilation")
    parser.add_argument("--helpers", type=int, help="processes that check and compile in parallel on a GPU")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--skip", metavar="OP:BITS", action="append", default=[], type=_op_and_bits,
                        help="no rows of an op at a width of weights; repeatable")  # fmt: skip


def _op_and_bits(text: str) -> tuple[str, int]:
    op, _, bits = text.partition(":")
    if op not in OPS or not bits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected OP:BITS, such as weight_only_linear:3")
    return op, int(bits)


def run(arguments: argparse.Namespace) -> None:
    measure(arguments)


def measure(arguments: argparse.Namespace) -> int:
    """What the command does; returns the number of rows for which there was no time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    budget = arguments.budget or (225.0 if arguments.subset == "quick" and device == "cuda" else None)
    ends = {share: started + share * budget if budget else None for share in (CHECK_SHARE, WARM_SHARE, 1)}
    path = (arguments.out or results.FOLDER) / results.device_name() / f"kernels-{arguments.subset}.json"
    plan = make_plan(arguments.op, arguments.subset, device, arguments.providers, arguments.skip)
    store = Store(path, fresh=arguments.fresh)
    progress = Progress(len(plan.checks) + len(plan.timings))
    print(f"{len(plan.checks)} checks and {len(plan.timings)} times on {results.device_name()}, to {path}", flush=True)
    if device == "cpu":
        print("no GPU: CPU routes against torch's bf16 matmul, in turns; the machine's other work is in the times")

    setting = settings(device, arguments.subset)
    with Workers(1, setup, (device, setting)) as timer:
        known = known_machine(timer, arguments)
        versions = machine.versions()
        run_facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device, "subset": arguments.subset, "versions": versions, **known,
        }  # fmt: skip
        store.begin(run_facts)
        timer.arguments = (device, setting, Floors(**known["floors"]))
        recorder = Recorder(store, versions, progress)
        store.forget(recorder.is_outdated)
        absent = recorder.absent_providers(plan)
        checks = [task for task in plan.checks if task.provider not in absent and not recorder.has(task)]
        timings = [task for task in plan.timings if task.provider not in absent and not recorder.has(task)]
        try:
            if device == "cuda" and (checks or timings):
                count = arguments.helpers or helpers_that_fit(known["machine"])
                with Workers(count, setup, (device, setting)) as helpers:
                    recorder.record(helpers.run(checks, arguments.timeout, ends[CHECK_SHARE]))
                    warm_up(helpers, timings, arguments.timeout, ends[WARM_SHARE], progress)
            else:
                recorder.record(timer.run(checks, arguments.timeout, ends[CHECK_SHARE]))
            recorder.record(timer.run(timings, arguments.timeout, ends[1]))
            # Once more: when they were measured first, what ran before may not have left the device yet.
            again = timer.ask("floors", arguments.timeout)
            if isinstance(again, Floors):
                store.update(floors=Floors(**known["floors"]).better(again).as_dict())
        except KeyboardInterrupt:
            progress.say("interrupted: what was measured is kept")
        finally:
            store.update(clocks_after=machine.clocks(), seconds=round(time.monotonic() - started, 1))
            goals = finish(store)
    summary(store, goals, recorder, path)
    return len(recorder.skipped)


def helpers_that_fit(found: dict[str, Any]) -> int:
    """Processes for checking and compiling: as many as CPU and GPU memory carry."""
    return max(1, min(MOST_HELPERS, found["cores"] - 2, int(found["memory_bytes"] / HELPER_BYTES)))


def settings(device: str, subset: str) -> Settings:
    """How long each row is measured."""
    if subset == "tiny":
        return Settings(budget_us=5000.0, fewest_samples=5, most_samples=20)
    if device == "cuda":
        return Settings(budget_us=60_000.0)
    return Settings(budget_us=400_000.0, fewest_samples=7, most_samples=60)


def make_plan(
    ops: Iterable[str],
    subset: str,
    device: str,
    providers: list[str] | None,
    skipped: Iterable[tuple[str, int]] = (),
) -> Plan:
    """The rows of the ops' subsets, without those of providers that were not asked for and of `skipped` (op, bits)."""
    unwanted = tuple(skipped)
    asked = [OPS[name] for name in ops]
    known = list(dict.fromkeys(name for op in asked for name in op.PROVIDERS))
    unknown = set(providers or ()) - set(known)
    if unknown:
        raise SystemExit(f"--providers {' '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    plans = []
    for op in asked:
        try:
            plan = op.plan(subset, device)
        except ValueError as error:
            raise SystemExit(f"--subset: {error}") from error
        wanted = set(op.PROVIDERS)
        if providers:
            wanted &= set(providers)
            wanted |= {op.BASELINE[device]} if wanted else set()
        plans.append(
            Plan(
                *(
                    [task for task in tasks if task.provider in wanted and not _has_width(task, unwanted)]
                    for tasks in plan
                )
            )
        )
    return Plan(interleave([plan.checks for plan in plans]), interleave([plan.timings for plan in plans]))


def _has_width(task: Task, unwanted: Iterable[tuple[str, int]]) -> bool:
    """Whether a task is of one of these ops at this width: of the weight, or of activations alone."""
    return any(task.case.op == op and re.match(rf"[WA]{bits}(\D|$)", task.case.scheme) for op, bits in unwanted)


def interleave(plans: Iterable[list[Task]]) -> list[Task]:
    """The ops' tasks in turns, so that what a budget cuts off is the least important of each op.

    Tasks that share operands stay together; each op's groups are spread evenly over the whole.
    """
    placed: list[tuple[float, list[Task]]] = []
    for tasks in plans:
        groups = [list(group) for _, group in groupby(tasks, lambda task: OPS[task.case.op].operands_key(task.case))]
        before = 0
        for group in groups:
            placed.append(((before + len(group) / 2) / len(tasks), group))
            before += len(group)
    placed.sort(key=lambda each: each[0])
    return [task for _, group in placed for task in group]


def known_machine(timer: Workers, arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, its floors and its clocks right after they were measured."""
    found = {}
    for word in ("machine", "floors"):
        found[word] = timer.ask(word, arguments.timeout)
        if isinstance(found[word], Failure):
            raise SystemExit(f"the device does not answer ({word}): {found[word].error}")
    return {"machine": found["machine"], "floors": found["floors"].as_dict(), "clocks": machine.clocks()}


def warm_up(helpers: Workers, timings: list[Task], timeout: float, until: float | None, progress: Progress) -> None:
    """Compile in parallel what will be timed, into the compilers' caches on disk. Failures show when it is timed."""
    compiled: dict[Any, Task] = {}
    for task in timings:
        compilation = OPS[task.case.op].PROVIDERS[task.provider].compilation
        if compilation is not None:
            compiled.setdefault((task.case.op, compilation(task.case)), task._replace(kind="warm"))
    if compiled:
        progress.say(f"compiling {len(compiled)} kernels for {len(timings)} rows")
        for _ in helpers.run(compiled.values(), timeout, until):
            pass


class Progress:
    """A line for every row."""

    def __init__(self, total: int) -> None:
        self._started, self._total, self._done = time.monotonic(), total, 0

    def say(self, text: str) -> None:
        """Print a line with the seconds so far."""
        print(f"{time.monotonic() - self._started:7.1f} s  {text}", flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """Print what a row says."""
        self._done += 1
        name = (
            f"[{self._done}/{self._total}] {row['shape']} M={row['m']} {row['scheme']} {row['dtype']} {row['provider']}"
        )
        if row["status"] != "ok":
            self.say(f"{name}: {row['status']}: {row['error']}")
        elif "q50_us" in row:
            self.say(f"{name}: {row['q50_us']:.2f} us")
        else:
            self.say(f"{name}: error {row['relative_error']:.1e} of {row['tolerance']:.1e}")

    def skip(self, count: int) -> None:
        """Rows that need not be made."""
        self._done += count


class Recorder:
    """Puts answers into the store."""

    def __init__(self, store: Store, versions: dict[str, str], progress: Progress) -> None:
        self._store, self._versions, self._progress = store, versions, progress
        self.skipped: list[Task] = []
        self._written = time.monotonic()

    def version(self, provider: Provider) -> str:
        """What a row of this provider depends on: the same again would be the same row."""
        own = provider.distribution.partition("==")[0] if provider.distribution else None
        parts = [f"{own} {machine.installed(own)}"] if own else []
        mine = own is None and not provider.peer
        names = [name for name in self._versions if mine or name != "sliderquant_kernels"]
        return ", ".join(parts + [f"{name} {self._versions[name]}" for name in names])

    def is_outdated(self, row: dict[str, Any]) -> bool:
        """Whether a row is of other versions than those installed now, or says that a package is absent."""
        provider = OPS[row["op"]].PROVIDERS.get(row["provider"])
        return row["kind"] == "provider" or provider is None or row["version"] != self.version(provider)

    def has(self, task: Task) -> bool:
        """Whether an earlier run has measured this."""
        provider = OPS[task.case.op].PROVIDERS[task.provider]
        key = figures.row_key({**task.case.columns(), "provider": task.provider, "kind": task.kind})
        found = self._store.has(key, self.version(provider))
        if found:
            self._progress.skip(1)
        return found

    def absent_providers(self, plan: Plan) -> set[str]:
        """The providers that are not installed, with one error row each instead of one per case."""
        absent = set()
        for op, name in dict.fromkeys((task.case.op, task.provider) for task in [*plan.checks, *plan.timings]):
            provider = OPS[op].PROVIDERS[name]
            if provider.distribution is None or machine.installed(provider.distribution) is not None:
                continue
            error = f"not installed: pip install {provider.distribution}"
            row = {"op": op, "provider": name, "kind": "provider", "status": "error", "error": error}
            self._store.add(row, self.version(provider))
            self._progress.say(f"{name}: {error}")
            absent.add(name)
        return absent

    def record(self, answers: Iterable[tuple[Task, Any]]) -> None:
        """Keep what comes; None is a task that was out of time, and stays to be done."""
        for task, answer in answers:
            if answer is None:
                self.skipped.append(task)
                continue
            if isinstance(answer, Failure):
                columns = {"provider": task.provider, "kind": task.kind, "status": "error", "error": answer.error}
                answer = {**task.case.columns(), **columns}
            provider = OPS[task.case.op].PROVIDERS[task.provider]
            self._progress.row(self._store.add(answer, self.version(provider)))
            if time.monotonic() - self._written > WRITE_SECONDS:
                finish(self._store)
                self._written = time.monotonic()


def finish(store: Store) -> list[Goal]:
    """Complete the rows, compare with the goals, and replace the file."""
    runs = {known["id"]: known for known in store.runs}
    rows = figures.derive(store.rows, runs, OPS)
    goals = [goal for op in present_ops(rows) for goal in op.goals([row for row in rows if row["op"] == op.NAME], runs)]
    store.write([{**goal._asdict(), "passed": goal.passed} for goal in goals], rows)
    return goals


def present_ops(rows: Iterable[dict[str, Any]]) -> list[Op]:
    """The ops that rows are of."""
    return [OPS[name] for name in dict.fromkeys(row["op"] for row in rows)]


def summary(store: Store, goals: list[Goal], recorder: Recorder, path: Path) -> None:
    """What a reader wants to know first, last."""
    rows = store.rows
    checks = [row for row in rows if row["kind"] == "check"]
    wrong = [row for row in rows if row["status"] == "error" and row["kind"] != "provider"]
    counts = Counter(row["status"] for row in rows if row["kind"] == "time")
    floors = Floors(**store.runs[-1]["floors"])
    print(f"\nwritten to {path}")
    print(f"floors: copy {floors.copy_gbps:.0f} GB/s, read {floors.read_gbps:.0f} GB/s, "
          f"bf16 matmul {floors.matmul_tflops:.3g} TFLOP/s, "
          f"an empty kernel {floors.empty_kernel_us:.2f} us")  # fmt: skip
    for row in [row for row in rows if row["kind"] == "provider"]:
        print(f"absent: {row['provider']}: {row['error']}")
    for row in wrong[:20]:
        print(f"error: {row['shape']} M={row['m']} {row['scheme']} {row['dtype']} {row['provider']}: {row['error']}")
    if len(wrong) > 20:
        print(f"... and {len(wrong) - 20} more errors in the file")
    good = sum(row["status"] == "ok" for row in checks)
    print(f"checks: {good} of {len(checks)} right. times: {dict(counts)}. out of time: {len(recorder.skipped)} rows, "
          "which the same command measures next")  # fmt: skip
    if not any(row["kind"] == "time" and row["run"] == run["id"] and run["device"] == "cuda"
               for run in store.runs for row in rows):  # fmt: skip
        print("goals: they are for a GPU, and nothing was timed on one")
        return
    for goal in goals:
        print(describe_goal(goal))


def describe_goal(goal: Goal) -> str:
    """pass, miss or not measured, with the figures."""
    bound = "at least" if goal.at_least else "at most"
    if goal.measured is None:
        return f"----  {goal.text}: {goal.where} ({bound} {goal.target:g})"
    word = "pass" if goal.passed else "MISS"
    return f"{word}  {goal.text}: {goal.measured:.3f} ({bound} {goal.target:g}; {goal.where})"
