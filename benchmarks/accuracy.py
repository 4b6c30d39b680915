"""Perplexity of the methods on small trained models, with the seconds each run took.

Needs a folder with `data/` and `models/` (--material): WikiText-2 and TinyStories text and the models demo-llama-5m and
stories260K. Settings: the published ramps, windows, rank and rates with 10 epochs on 64 samples of 256 tokens, seed 2;
where a scheme has settings of its own (`own`), they are used in place of these, and the result file holds them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import sliderquant
from benchmarks import results
from sliderquant.errors import InputError
from sliderquant.methods import METHODS, Settings, check_scheme
from sliderquant.schemes import Scheme

RUNS: dict[str, dict[str, Any]] = {
    "demo-llama-5m": {
        "calibration": "data/wikitext2/wiki.valid.txt",
        "evaluation": "data/wikitext2/wiki.test.raw[:400000]",
        "settings": {},
        "goals": {"W4A16": 40.80, "W3A16": 42.59, "W2A16": 60.26},
    },
    "stories260K": {
        "calibration": "data/tinystories/tinystories.txt[:1677721]",
        "evaluation": "data/tinystories/tinystories.txt[-400000:]",
        "settings": {"windows": {"shallow": 2, "deep": 2}},
        "goals": {"W4A16": round(6.37 * 1.03, 2), "W2A16": 46.8},
        # 64 channels leave a low-rank term of 4 and a clipping little room at 4 bits: full rank, one window over the
        # whole model, and more text, so that full rank does not overfit.
        "own": {
            "W4A16": {
                "samples": 256,
                "settings": {
                    "rank": 64,
                    "gamma": 1,
                    "windows": {"shallow": 0, "deep": 0, "size": 5, "stride": 1},
                    "learning_rates": {"low_rank": 5e-3},
                },
            }
        },
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--material", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--models", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--schemes", nargs="*", help="only these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.material / "data").is_dir():
        raise SystemExit(f"--material {arguments.material}: expected a folder with data/ and models/")
    rows = []
    for model in arguments.models:
        rows += _model_rows(model, arguments)
        path = results.write("accuracy", rows, arguments.out)
    print(results.markdown(rows, ["model", "scheme", "method", "perplexity", "goal", "seconds"]))
    print(f"written to {path}")


def _model_rows(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    spec = RUNS[model]
    folder = arguments.material / "models" / model
    evaluation = str(arguments.material / spec["evaluation"])
    original = sliderquant.evaluate(folder, evaluation, seqlen=256)
    row = {"model": model, "scheme": "16 bits", "method": "-", "perplexity": original.value, "goal": "", "seconds": ""}
    rows: list[dict[str, Any]] = [{**row, "protocol": {**original.as_dict(), "dataset": spec["evaluation"]}}]
    print(row, flush=True)
    for scheme, goal in spec["goals"].items():
        if arguments.schemes and scheme not in arguments.schemes:
            continue
        for method in arguments.methods:
            if not _go_together(method, scheme):
                continue
            own = spec.get("own", {}).get(scheme, {})
            chosen = {"epochs": arguments.epochs, **own.get("settings", spec["settings"])}
            settings = chosen if isinstance(METHODS[method].settings, Settings) else None
            samples = own.get("samples", 64)
            with tempfile.TemporaryDirectory() as out:
                start = time.perf_counter()
                result = sliderquant.quantize(
                    folder,
                    Path(out) / "checkpoint",
                    scheme=scheme,
                    method=method,
                    settings=settings,
                    calibration=str(arguments.material / spec["calibration"]),
                    samples=samples,
                    seqlen=256,
                    seed=2,
                )
                seconds = time.perf_counter() - start
                value = sliderquant.evaluate(result.path, evaluation, seqlen=256).value
            row = {
                "model": model,
                "scheme": scheme,
                "method": method,
                "perplexity": value,
                "goal": goal if method == "sliderquant" else "",
                "seconds": round(seconds, 1),
            }
            print(row, flush=True)
            rows.append({**row, "settings": result.report["settings"], "samples": samples, "seed": 2})
    return rows


def _go_together(method: str, scheme: str) -> bool:
    try:
        check_scheme(METHODS[method], Scheme.parse(scheme))
    except InputError:
        return False
    return True
