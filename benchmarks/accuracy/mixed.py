"""Bits chosen for every linear under a budget, against the first and last layers at more bits at the same size.

Both spend at most --average-bits for a weight on average, by the same methods on the same texts. Of an odd number of
layers at the ends either end has one more: a row each. Needs a folder with `data/` (--material), unless --calibration
and --evaluation name other texts. Every run goes into mixed.json as soon as it is there, the table into mixed.md.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import sliderquant
from benchmarks import results
from benchmarks.accuracy.ablate import add_place, place_of
from benchmarks.accuracy.runs import Case, Place, Row, RunFile, positive, scheme_argument
from benchmarks.accuracy.table import EPOCHS, SAMPLES, usual_epochs
from sliderquant.errors import InputError
from sliderquant.planning.allocation import Allocation
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import Plan

__all__ = ["CHOSEN", "ends", "markdown"]

CHOSEN = "chosen"
ENDS_BITS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--scheme", type=scheme_argument, default="W2A16", help="its bits are the fewest")
    parser.add_argument("--average-bits", type=float, default=2.5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "gptq"])
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="calibration samples")
    parser.add_argument("--epochs", type=positive, help=f"{EPOCHS}, or the method's own where it has efforts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2])
    parser.add_argument("--resume", action="store_true", help="do not repeat what is in the result file")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    file = RunFile("mixed", arguments.out)
    with ExitStack() as stack:
        place = place_of(arguments, stack)
        try:
            for seed in arguments.seeds:
                _run_seed(arguments, place, seed, file)
        except InputError as error:
            raise SystemExit(str(error)) from error
    print(file.beside(".md").read_text(encoding="utf-8"))
    print(f"written to {file.path} and .md")


def _run_seed(arguments: argparse.Namespace, place: Place, seed: int, file: RunFile) -> None:
    common = {"scheme": arguments.scheme, "seed": seed, "samples": arguments.samples, "seqlen": place.seqlen}
    common["calibration"] = place.calibration.source
    start = time.perf_counter()
    plan = sliderquant.plan(place.model, average_bits=arguments.average_bits, method="rtn", **common)
    seconds = round(time.perf_counter() - start, 1)
    assert plan.allocation is not None
    print(f"seed {seed}: chosen in {seconds} s", flush=True)
    for method in arguments.methods:
        for label, allocation in {**ends(plan), CHOSEN: plan.allocation}.items():
            row = _described(arguments, place, method, label, seed) | _sizes(plan, allocation)
            there = next((other for other in file.rows() if row.items() <= other.items()), None)
            if arguments.resume and there is not None:
                continue
            if label == CHOSEN:
                row["choosing_seconds"] = seconds
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                settings = row["settings"]
                result = sliderquant.quantize(
                    place.model, Path(folder) / "out", method=method, settings=settings, allocation=allocation, **common
                )
                row["seconds"] = round(time.perf_counter() - start, 1)
                value = sliderquant.evaluate(result.path, place.evaluation.source, seqlen=place.seqlen)
            row |= {"perplexity": value.value, "blocks": value.blocks, "tokens": value.tokens}
            file.add(row)
            print(f"seed {seed} {method} {label}: {value.value:.2f}", flush=True)
            file.beside(".md").write_text(markdown(file.rows()), encoding="utf-8")


def _described(arguments: argparse.Namespace, place: Place, method: str, label: str, seed: int) -> Row:
    epochs = arguments.epochs or usual_epochs(method)
    case = Case.of(place.name, arguments.scheme, method, {}, epochs, seed=seed, samples=arguments.samples)
    # Rounding to nearest needs no text, but its bits are chosen on one.
    texts = {"calibration": place.calibration.name, "samples": arguments.samples}
    return {**case.described(place), "label": f"{label}, {arguments.average_bits:g} bits", "bits": label, **texts}


def _sizes(plan: Plan, allocation: Allocation) -> Row:
    settled = plan.with_allocation(allocation)
    return {
        "average_bits": plan.average_bits,
        "code_bits": settled.code_bits_per_weight,
        "stored_bits": settled.bits_per_weight,
        "bits_by_kind": settled.as_dict()["bits_by_kind"],
    }


def ends(plan: Plan) -> dict[str, Allocation]:
    """By what they are called, the baselines: the first and last layers at 4 bits, all others at the scheme's, as many
    as the budget allows."""
    source = plan.source
    assert plan.average_bits is not None
    sizes = plan.sizes
    spare = (plan.average_bits - plan.scheme.linear.bits) * sum(sizes.values())
    of_a_layer = (ENDS_BITS - plan.scheme.linear.bits) * sum(sizes[name] for name in source.layers[0].full_linears)
    if of_a_layer <= 0:
        raise InputError(f"scheme {plan.scheme}: expected one of fewer than {ENDS_BITS} bits, which the ends get")
    count = min(int(spare / of_a_layer + 1e-9), source.num_layers)
    found = {}
    for first in sorted({count - count // 2, count // 2}, reverse=True):
        last = count - first
        layers = [*range(first), *range(source.num_layers - last, source.num_layers)]
        more = {name for layer in layers for name in source.layers[layer].full_linears}
        bits = {name: ENDS_BITS if name in more else plan.scheme.linear.bits for name in plan.schemes}
        found[f"first {first} and last {last} layers at {ENDS_BITS}"] = Allocation(plan.average_bits, 0, bits, {})
    return found


COLUMNS = ["method", "bits", "codes", "stored", "perplexity", "spread", "seconds", "seeds"]


def markdown(rows: Iterable[Row]) -> str:
    """A table for each model, scheme and budget, and whether the chosen bits lose less."""
    tables: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["model"], row["scheme"], row["average_bits"], row["samples"]), []).append(row)
    parts = [
        "# Mixed precision",
        "",
        "Perplexity, lower is better: means over the seeds; spread: largest less smallest. Bits of a quantized weight, "
        "on average: of codes, which the budget is of, and stored, with scales and zero-points.",
    ]
    for (model, scheme, average_bits, samples), found in tables.items():
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in found:
            groups.setdefault((row["method"], row["bits"]), []).append(row)
        listed = [_listed(method, bits, group) for (method, bits), group in groups.items()]
        parts += ["", f"## {model}, {scheme}, at most {average_bits:g} bits, {samples} samples", ""]
        parts += [results.markdown(listed, COLUMNS), ""]
        parts += [_sentence(method, groups) for method in dict.fromkeys(method for method, _ in groups)]
    return "\n".join(parts) + "\n"


def _mean(rows: list[Row], name: str) -> float:
    return math.fsum(row[name] for row in rows) / len(rows)


def _listed(method: str, bits: str, rows: list[Row]) -> Row:
    values = [row["perplexity"] for row in rows]
    return {
        "method": method,
        "bits": bits,
        "codes": f"{_mean(rows, 'code_bits'):.3f}",
        "stored": f"{_mean(rows, 'stored_bits'):.3f}",
        "perplexity": f"{_mean(rows, 'perplexity'):.2f}",
        "spread": f"{max(values) - min(values):.2f}" if len(values) > 1 else "",
        "seconds": f"{_mean(rows, 'seconds'):.3g}",
        "seeds": " ".join(str(row["seed"]) for row in rows),
    }


def _sentence(method: str, groups: dict[tuple[str, str], list[Row]]) -> str:
    means = {bits: _mean(rows, "perplexity") for (other, bits), rows in groups.items() if other == method}
    baselines = {bits: value for bits, value in means.items() if bits != CHOSEN}
    if CHOSEN not in means or not baselines:
        return f"- {method}: not all runs are there"
    best = min(baselines, key=baselines.__getitem__)
    verdict = "less" if means[CHOSEN] < baselines[best] else "**not** less"
    change = means[CHOSEN] / baselines[best] - 1
    return f"- {method}: chosen bits lose {verdict} than the best of the others, {best}: {change:+.1%}"
