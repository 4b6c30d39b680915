"""Measure tiles on the GPU at hand, and write the table that goes before the rules of `weight_only.tiles`.

    python -m sliderquant_kernels.tune [--weight 14336x4096 ...] [--bits 4 ...] [--tokens 1 ...] [--out FILE]
                                       [--most 16] [--budget SECONDS] [--log FILE]
    python -m sliderquant_kernels.tune --retime --log FILE [--out FILE]

The candidates of all problems are compiled first, in parallel. Then each problem's candidates are compared with an fp64
product and timed in turns with a cold L2 cache (`tune_measure`). One of them replaces what the rules say only if it is
faster by more than `MARGIN`. The table and the log are written after every problem; a run that was interrupted, or
whose budget was spent, goes on when it is started again. `--retime` measures every choice that won against the rules'
own once more, and puts the rules' choice in its place unless it wins again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.choices import Choice, Device, Problem
from ..weight_only import tiles, tuned
from .tune_candidates import MOST, bare, candidates, estimated_us
from .tune_measure import DeviceLost, Failure, Measurer
from .tune_outcomes import LOST, TIMED, Measured, Outcome, Retimed, append, read_outcomes

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Layers of Llama-3-8B and 70B, single and merged.
WEIGHTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (57344, 8192),
           (8192, 28672))  # fmt: skip
MARGIN = 0.03
# What compiling may take of a budget.
COMPILE_SHARE = 0.5

Clock = Callable[[], float]


def tune(
    problems: Iterable[Problem],
    device: Device,
    measurer: Measurer,
    out: Path,
    *,
    log: Path | None = None,
    most: int = MOST,
    budget: float | None = None,
    clock: Clock = time.monotonic,
    **about: str,
) -> list[Outcome]:
    """Measure the problems that the table does not hold yet, and write table and log after each of them.

    Args:
        out: the table.
        log: where every candidate's time goes. Candidates that lost the GPU before, by this log, are left out.
        most: candidates of a problem.
        budget: seconds from now, compiling included, after which no problem is begun. Compiling takes half of them at
            most; a problem of which something is not compiled then is left for the next run.
        about: with what is measured, for the files.

    Raises:
        DeviceLost: a candidate broke the GPU's state; the log names it.
    """
    start = clock()
    entries = tuned.read(out) if out.is_file() else {}
    lost = _lost(log)
    left = [
        problem
        for problem in dict.fromkeys(problems)
        if all(up_to != problem.m for up_to, _ in entries.get(tuned.key(problem), []))
    ]
    pairs = [
        (problem, choice)
        for problem in left
        for choice in candidates(problem, device, most)
        if (problem, bare(choice)) not in lost
    ]
    compiled = _compile(measurer, pairs, budget)
    outcomes: list[Outcome] = []
    waiting = 0
    for problem in left:
        failures = {choice: failure for (of, choice), failure in compiled.items() if of == problem}
        late = any(failure is not None and failure.late for failure in failures.values())
        if late or (budget is not None and clock() - start >= budget):
            waiting += 1
            continue
        try:
            outcome = _outcome(problem, device, measurer, failures)
        except DeviceLost as error:
            if log is not None:
                failed = (*_lost_of(problem, lost), Measured(bare(error.choice), LOST, str(error)))
                nothing = Outcome(problem, tiles.choose(problem, device), None, None, None, (), failed)
                append(log, nothing, device=device.name, **about)
            raise
        outcome = replace(outcome, failed=(*outcome.failed, *_lost_of(problem, lost)))
        outcomes.append(outcome)
        if log is not None:
            append(log, outcome, device=device.name, **about)
        _report(outcome)
        if outcome.best is not None:
            entries.setdefault(tuned.key(problem), []).append((problem.m, outcome.best))
            tuned.write(out, device, entries, **about)
    if waiting:
        print(f"tune: {waiting} of {len(left)} problems are left; run the same command again to go on")
    return outcomes


def retime(
    outcomes: Iterable[Outcome],
    device: Device,
    measurer: Measurer,
    out: Path,
    *,
    log: Path | None = None,
    budget: float | None = None,
    clock: Clock = time.monotonic,
    **about: str,
) -> list[Retimed]:
    """Measure each choice that won, and that the table still holds, against the rules' own once more.

    One that is not faster by more than `MARGIN` again loses its place in the table to the rules' own choice. What the
    budget leaves no time for stays as it is.
    """
    start = clock()
    entries = tuned.read(out) if out.is_file() else {}
    wins: list[tuple[Problem, Choice, Choice]] = []
    for outcome in outcomes:
        rules, best = outcome.rules_choice, outcome.best
        entry = dict(entries.get(tuned.key(outcome.problem), [])).get(outcome.problem.m)
        if best is not None and entry is not None and bare(best) != bare(rules) and bare(entry) == bare(best):
            wins.append((outcome.problem, rules, best))
    pairs = [(problem, choice) for problem, *choices in wins for choice in choices]
    compiled = _compile(measurer, pairs, budget)
    found: list[Retimed] = []
    for problem, rules, best in wins:
        failures = {choice: compiled[problem, choice] for choice in (rules, best)}
        late = any(failure is not None and failure.late for failure in failures.values())
        if late or (budget is not None and clock() - start >= budget):
            continue
        times = {choice: result.us for choice, result in _measure(problem, device, measurer, failures).items()}
        tuned_us, rules_us = times[best], times[rules]
        ratio = None if tuned_us is None or rules_us is None else tuned_us / rules_us
        result = Retimed(problem, best, tuned_us, rules_us, ratio, ratio is not None and ratio < 1 - MARGIN)
        found.append(result)
        if log is not None:
            append(log, result, device=device.name, **about)
        verdict = "holds" if result.holds else "does not hold: the rules' choice takes its place"
        print(f"{_name(problem)}: {_ratio(ratio)} of the rules' choice again, {verdict}", flush=True)
        if not result.holds:
            key = tuned.key(problem)
            entries[key] = [(up_to, rules if up_to == problem.m else choice) for up_to, choice in entries[key]]
            tuned.write(out, device, entries, **about)
    if len(found) < len(wins):
        print(
            f"tune: {len(wins) - len(found)} of {len(wins)} choices were not measured again; run it with more --budget"
        )
    return found


def fastest(times: dict[Choice, float], default: Choice) -> Choice:
    """The fastest choice, or the rules' own where nothing beats it by more than `MARGIN`."""
    best = min(times, key=lambda choice: times[choice])
    return best if default not in times or times[best] < (1 - MARGIN) * times[default] else default


def _lost(log: Path | None) -> dict[tuple[Problem, Choice], Measured]:
    outcomes = read_outcomes(log) if log is not None and log.is_file() else []
    return {(of.problem, bare(each.choice)): each for of in outcomes for each in of.failed if each.status == LOST}


def _lost_of(problem: Problem, lost: dict[tuple[Problem, Choice], Measured]) -> list[Measured]:
    return [each for (of, _), each in lost.items() if of == problem]


def _compile(
    measurer: Measurer, pairs: Sequence[tuple[Problem, Choice]], budget: float | None
) -> dict[tuple[Problem, Choice], Failure | None]:
    failures = measurer.compile(pairs, None if budget is None else COMPILE_SHARE * budget)
    return dict(zip(pairs, failures, strict=True))


def _outcome(problem: Problem, device: Device, measurer: Measurer, failures: dict[Choice, Failure | None]) -> Outcome:
    found = _measure(problem, device, measurer, failures)
    times = {choice: result.us for choice, result in found.items() if result.us is not None}
    rules = tiles.choose(problem, device)
    best = fastest(times, rules) if times else None
    measured = sorted((found[choice] for choice in times), key=lambda result: times[result.choice])
    failed = [result for result in found.values() if result.us is None]
    best_us = None if best is None else times[best]
    return Outcome(problem, rules, times.get(rules), best, best_us, tuple(measured), tuple(failed))


def _measure(
    problem: Problem, device: Device, measurer: Measurer, failures: dict[Choice, Failure | None]
) -> dict[Choice, Measured]:
    """What came of each choice, those that were not compiled included."""
    choices = [choice for choice, failure in failures.items() if failure is None]
    results: dict[Choice, list[float] | Failure] = {
        c: failure for c, failure in failures.items() if failure is not None
    }
    results |= zip(choices, measurer.time(problem, choices) if choices else [], strict=True)
    found = {}
    for choice in failures:
        result, expected = results[choice], estimated_us(problem, choice, device)
        if isinstance(result, Failure):
            found[choice] = Measured(choice, result.status, result.detail, estimate_us=expected)
        else:
            low, middle, high = _quartiles(result)
            found[choice] = Measured(choice, TIMED, "", middle, low, high, expected)
    return found


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def _report(outcome: Outcome) -> None:
    name = _name(outcome.problem)
    for result in outcome.failed:
        print(f"{name}: {bare(result.choice)}: {result.status}: {result.detail}", file=sys.stderr)
    if outcome.best is None or outcome.best_us is None:
        print(f"{name}: no candidate computed the right numbers", file=sys.stderr)
        return
    print(f"{name}: {outcome.best} {outcome.best_us:.2f} us, {_ratio(outcome.ratio)} of the rules' choice", flush=True)


def _name(problem: Problem) -> str:
    return f"{problem.n}x{problem.k} W{problem.bits} M={problem.m}"


def _ratio(ratio: float | None) -> str:
    return "an unknown part" if ratio is None else f"{ratio:.2f}"


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NxK, for example 14336x4096") from None
    return n, k


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sliderquant_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--weight", type=_shape, action="append", help="outputs x inputs; repeatable")
    parser.add_argument("--bits", type=int, action="append", choices=(2, 3, 4, 8), help="repeatable; default: 4")
    parser.add_argument("--group-size", type=int, default=128, choices=(0, 32, 64, 128), help="0: per channel")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, action="append", help="repeatable; default: powers of two up to 2048")
    parser.add_argument("--out", type=Path, help="default: the table of this GPU inside the package")
    parser.add_argument("--most", type=_positive, default=MOST, help=f"candidates of a problem; default: {MOST}")
    parser.add_argument("--budget", type=_seconds, help="seconds after which no problem is begun; default: no limit")
    parser.add_argument("--log", type=Path, help="every candidate's time, a line of JSON for each problem")
    parser.add_argument("--processes", type=_positive, help="that compile at a time; default: one for every core")
    parser.add_argument("--retime", action="store_true", help="measure the wins of --log again; losers leave the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.retime and (options.log is None or not options.log.is_file()):
        parser.error("--retime: expected --log with the file that a run of tune has written")
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here, and tiles are measured, not guessed", file=sys.stderr)
        return 1
    import triton

    from ..common.launching import device_of
    from .tune_measure import GpuMeasurer

    device = device_of(torch.empty(1, device="cuda"))
    measurer = GpuMeasurer(device, torch.cuda.get_device_properties(0).L2_cache_size, processes=options.processes)
    out = options.out or tuned.FOLDER / tuned.file_name(device.name)
    budget = options.budget and max(options.budget - (time.monotonic() - start), 0.0)
    about: dict[str, Any] = {"log": options.log, "budget": budget}
    about |= {"torch": torch.__version__, "triton": triton.__version__}
    try:
        if options.retime:
            retime(read_outcomes(options.log), device, measurer, out, **about)
        else:
            tune(_problems(options), device, measurer, out, most=options.most, **about)
    except DeviceLost as error:
        advice = "run the same command again" if options.log else "run it again with --log, which leaves this tile out"
        print(f"tune: {error.choice} broke the GPU's state: {error}; {advice}", file=sys.stderr)
        return 1
    print(f"written to {out}")
    return 0


def _problems(options: argparse.Namespace) -> list[Problem]:
    dtype = getattr(torch, options.dtype)
    return [
        Problem(m, n, k, bits, options.group_size or None, options.symmetric, dtype)
        for bits in options.bits or (4,)
        for n, k in options.weight or WEIGHTS
        for m in sorted(options.tokens or TOKENS)
    ]


if __name__ == "__main__":
    sys.exit(main())
