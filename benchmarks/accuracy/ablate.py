"""What each ingredient of a method brings: its settings with one thing changed at a time, over several seeds.

NAME is one of the ablations in `ablations.py`, or `all`. Needs a folder with `data/` (--material), unless
--calibration and --evaluation name other texts. Every run goes into ablations.json as soon as it is there, the table
into ablations.md and at the end, drawn, into ablations-METHOD.png; what two ablations have in common is run once.
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import results
from benchmarks.accuracy.ablation_plot import ablation_figures
from benchmarks.accuracy.ablations import ABLATIONS, BASE, based_on, tables_of
from benchmarks.accuracy.command import (
    MODELS,
    PURPOSES,
    SEQLEN,
    elsewhere_text,
    material_texts,
    model_argument,
    model_folder,
    shorter_ramps,
)
from benchmarks.accuracy.runs import (
    DEMO,
    Case,
    Place,
    Row,
    RunFile,
    Text,
    kept_text,
    named_text,
    outlier_model,
    positive,
    run_all,
    scheme_argument,
    summarize,
)
from benchmarks.accuracy.table import EPOCHS, SAMPLES, usual_epochs
from sliderquant.errors import InputError
from sliderquant.planning.overrides import merged

__all__ = ["add_place", "markdown", "place_of", "plan"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*ABLATIONS, "all"], help="what to vary")
    add_place(parser)
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="calibration samples")
    parser.add_argument("--scheme", type=scheme_argument, help="in place of the ablation's own")
    parser.add_argument("--epochs", type=positive, help=f"{EPOCHS}, or the method's own where it has efforts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2])
    parser.add_argument("--resume", action="store_true", help="do not repeat what is in the result file")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def add_place(parser: argparse.ArgumentParser) -> None:
    """The arguments that `place_of` reads."""
    parser.add_argument("--model", default=DEMO.name, help=f"{', '.join(MODELS)}, NAME=FOLDER; or any folder or hub id")
    parser.add_argument("--material", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--calibration", help="text, in place of the model's; wikitext2 for others")
    parser.add_argument("--evaluation", help="text, in place of the model's; wikitext2 for others")
    parser.add_argument("--seqlen", type=positive, help=f"tokens of a sample and block; {SEQLEN}, for others 2048")


def run(arguments: argparse.Namespace) -> None:
    file = RunFile("ablations", arguments.out)
    with ExitStack() as stack:
        place = place_of(arguments, stack)
        names = list(ABLATIONS) if arguments.name == "all" else [arguments.name]
        try:
            cases = plan(place.name, names, arguments.scheme, arguments.epochs, arguments.samples, arguments.seeds)
        except InputError as error:
            raise SystemExit(str(error)) from error
        run_all(cases, {place.name: place}, file, arguments.resume, lambda: _write(file))
    _write(file, picture=True)
    print(file.beside(".md").read_text(encoding="utf-8"))
    print(f"written to {file.path}, .md and a picture for each method")


def plan(
    model: str, names: Sequence[str], scheme: str | None, epochs: int | None, samples: int, seeds: Sequence[int]
) -> list[Case]:
    """The runs in their order: the model as it is, then of each ablation the method as it is and every row."""
    spec = MODELS.get(model)
    cases = [Case.original(model)]
    for name in names:
        ablation = ABLATIONS[name]
        method, chosen = ablation.method, scheme or ablation.scheme
        base = merged(ablation.base, {} if spec is None else shorter_ramps(method, chosen, spec, ablation.base))
        own = epochs or usual_epochs(method)
        budget = Case.of(model, chosen, method, base, own).epochs
        for label, changes in {BASE: {}, **ablation.rows}.items():
            settings = merged(base, changes)
            if label in ablation.longer:
                settings["epochs"] = round(ablation.longer[label] * budget)
            cases += [
                Case.of(
                    model, chosen, method, settings, own, seed=seed, samples=samples, label=label, ablation=name,
                    budget=budget,
                )
                for seed in seeds
            ]  # fmt: skip
    return cases


def place_of(arguments: argparse.Namespace, stack: ExitStack) -> Place:
    """Where the model and the texts of the arguments are; a model with outliers, and texts that take long to put
    together, are there until the stack is left."""
    name, named_folder = arguments.model, None
    if name.partition("=")[0] in MODELS:
        try:
            name, named_folder = model_argument(name)
        except argparse.ArgumentTypeError as error:
            raise SystemExit(f"--model: {error}") from error
    spec = MODELS.get(name)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    given = (arguments.calibration, arguments.evaluation)
    if spec is None:
        path = Path(arguments.model).expanduser()
        name = path.resolve().name if path.is_dir() else arguments.model
        model, seqlen = arguments.model, arguments.seqlen
        texts = [named_text(text or "wikitext2", arguments.material) for text in given]
    else:
        seqlen = arguments.seqlen or SEQLEN
        model = named_folder or model_folder(spec, arguments.material)
        if spec.outliers:
            model = stack.enter_context(outlier_model(model))
        texts = [
            named_text(text, arguments.material) if text else material_texts([own], arguments.material)[0]
            for text, own in zip(given, spec.texts, strict=True)
        ]
    kept: list[Text] = [kept_text(text, purpose, folder) for text, purpose in zip(texts, PURPOSES, strict=True)]
    others = [] if spec is None else [elsewhere_text(text, arguments.material, folder) for text in spec.elsewhere]
    return Place(name, model, *kept, seqlen=seqlen, elsewhere=tuple(others))


def _write(file: RunFile, picture: bool = False) -> None:
    rows = file.rows()
    file.beside(".md").write_text(markdown(rows), encoding="utf-8")
    if picture:
        for method, figure in ablation_figures(summarize(rows)).items():
            figure.savefig(file.path.with_name(f"{file.path.stem}-{method}.png"), dpi=100)


COLUMNS = ["row", "perplexity", "spread", "against as it is", "elsewhere", "seconds", "seeds"]


def markdown(rows: Iterable[Row]) -> str:
    """A table for each ablation, model, scheme and budget."""
    summary = summarize(rows)
    originals = {row["model"]: row for row in summary if "ablation" not in row and "perplexity" in row}
    parts = [
        "# Ablations",
        "",
        "A method with one thing changed. Perplexity, lower is better, and seconds of quantizing: means over the "
        "seeds; spread: largest less smallest. Elsewhere: on a text of another domain.",
    ]
    for (name, model, scheme, epochs, samples), found in tables_of(summary).items():
        question = f": {ABLATIONS[name].question}" if name in ABLATIONS else ""
        parts += [
            "",
            f"## {name}{question}",
            "",
            f"`{found[0]['method']}`{based_on(name)}, {model}, {scheme}, {epochs} epochs, {samples} samples"
            + (f" (16 bits: {originals[model]['perplexity']:.2f})" if model in originals else ""),
            "",
            results.markdown(
                _listed(found), [name for name in COLUMNS if name != "elsewhere" or _has_elsewhere(found)]
            ),
        ]
    return "\n".join(parts) + "\n"


def _has_elsewhere(found: list[Row]) -> bool:
    return any(row.get("elsewhere") for row in found)


def _listed(found: list[Row]) -> list[Row]:
    base = next((row["perplexity"] for row in found if row["label"] == BASE and "perplexity" in row), None)
    listed = []
    for row in found:
        shown = {"row": row["label"], "seeds": " ".join(map(str, row["seeds"]))}
        if "perplexity" in row:
            shown |= {"perplexity": f"{row['perplexity']:.2f}", "seconds": f"{row['seconds']:.3g}"}
            shown["elsewhere"] = ", ".join(f"{value:.2f}" for value in row.get("elsewhere", {}).values())
            shown["spread"] = f"{row['spread']:.2f}" if len(row["seeds"]) > 1 else ""
            if base is not None and row["label"] != BASE:
                shown["against as it is"] = f"{100 * (row['perplexity'] / base - 1):+.1f}%"
        else:
            shown["perplexity"] = f"refused: {row['error']}"
        listed.append(shown)
    return listed
