"""Perplexity of all methods at all schemes, with the seconds each run took, and whether the paper's order holds.

Without --model and --quick it needs a folder with `data/` and `models/` (--material): WikiText-2 and TinyStories text
and the model stories260K. Settings: each method's own, with 10 epochs, 64 samples of 256 tokens and seed 2; --peers
adds methods of other packages. Results go into accuracy.json, accuracy.md and accuracy.png, those of --quick and
--model into accuracy-quick and accuracy-models; rows of other runs stay in the file. Where there are rows of a method
with efforts, accuracy-effort.png shows perplexity over seconds.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.effort_plot import effort_figure
from benchmarks.accuracy.plot import accuracy_figure
from benchmarks.accuracy.runs import (
    DEMO,
    Case,
    Place,
    RunFile,
    Text,
    kept_text,
    named_text,
    outlier_model,
    positive,
    run_all,
    scheme_argument,
)
from benchmarks.accuracy.table import EPOCHS, SAMPLES, SCHEMES, markdown, summary_of
from benchmarks.peers.runs import PEERS, Peer, peers_in
from sliderquant.calibration.text import NAMED_SOURCES, read_text
from sliderquant.errors import InputError
from sliderquant.planning.methods import METHODS, check_scheme, with_overrides
from sliderquant.planning.settings import Settings
from sliderquant.schemes import ModelScheme

__all__ = [
    "MODELS",
    "ModelSpec",
    "elsewhere_text",
    "material_texts",
    "model_argument",
    "model_folder",
    "plan",
    "shorter_ramps",
]

ROTATIONS = ("R1", "R2", "R3", "R4")
ROTATED_METHODS = ("rtn", "gptq", "sliderquant-published")
SEQLEN = 256
EFFORTS = tuple(METHODS["sliderquant"].efforts)
PURPOSES = ("calibration", "evaluation")
WIKITEXT = ("data/wikitext2/wiki.valid.txt", "data/wikitext2/wiki.test.raw[:400000]")
# Manual pages of Python's own documentation.
OTHER_DOMAIN = ("topics[:100000]",)
WEB = ("data/c4/c4_sample.jsonl[:120000]",)
STORIES = ("data/tinystories/tinystories.txt[:1677721]", "data/tinystories/tinystories.txt[-400000:]")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the table.

    Attributes:
        folder: in --material; empty: the model that the package brings along; None: it has to be given, NAME=FOLDER.
        texts: to calibrate and to measure on.
        elsewhere: texts of other domains, to measure on as well; documents are joined by blank lines.
        outliers: outliers are injected into the model first.
        methods, schemes: those that are run; None: all.
        ramps: the ramps of methods that have any, where the model has too few layers for theirs.
    """

    folder: str | None = ""
    texts: tuple[str, str] = WIKITEXT
    elsewhere: tuple[str, ...] = ()
    outliers: bool = False
    methods: tuple[str, ...] | None = None
    schemes: tuple[str, ...] | None = None
    ramps: int | None = None


MODELS: dict[str, ModelSpec] = {
    "demo-llama-5m": ModelSpec(elsewhere=OTHER_DOMAIN),
    "stories260K": ModelSpec(
        folder="models/stories260K",
        texts=STORIES,
        elsewhere=OTHER_DOMAIN,
        # Its linears have 64 or 172 inputs: groups of 64 are whole rows, or do not divide them.
        schemes=tuple(scheme for scheme in SCHEMES if scheme != "W2A16-g64"),
        ramps=2,
    ),
    "demo-llama-5m-outliers": ModelSpec(
        outliers=True,
        methods=("rtn", "smoothquant", "sliderquant", "sliderquant-published"),
        schemes=("W4A4KV4",),
    ),
    "SmolLM2-135M": ModelSpec(
        folder=None,
        texts=(WIKITEXT[0], "data/wikitext2/wiki.test.raw[:120000]"),
        elsewhere=WEB,
        methods=("rtn", "gptq", "awq", "sliderquant-published", "sliderquant"),
        schemes=("W4A16-g64", "W3A16-g64", "W2A16-g64", "W4A4KV4", "W4A8KV8"),
    ),
}
QUICK_TEXTS, QUICK_SEQLEN = ("topics", "stdlib[:30000]"), 128
QUICK_EPOCHS, QUICK_SAMPLES, QUICK_SCHEMES = 2, 6, ("W2A16", "W4A4KV4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the demo model, two schemes, few epochs: two minutes")
    parser.add_argument("--material", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument(
        "--models",
        nargs="+",
        type=model_argument,
        metavar="NAME[=FOLDER]",
        help=f"only these of {', '.join(MODELS)}; all but those that need a folder, if none is named",
    )
    parser.add_argument("--model", nargs="+", default=[], help="folders or hub ids of other models, in place of ours")
    parser.add_argument("--calibration", default="wikitext2", help="text for --model")
    parser.add_argument("--evaluation", default="wikitext2", help="text for --model")
    parser.add_argument(
        "--seqlen", type=positive, help="tokens of a sample and block; with --model 2048, with --quick 128, else 256"
    )
    parser.add_argument(
        "--samples", type=positive, help="calibration samples; with --model 128, with --quick 6, else 64"
    )
    parser.add_argument("--schemes", nargs="+", type=scheme_argument, help="only these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="only these; none: peers")
    parser.add_argument(
        "--efforts", nargs="+", choices=EFFORTS, default=["default"], help="of methods that have efforts"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="methods of other packages")
    parser.add_argument(
        "--peer-python",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="interpreters that have the peers' packages, where this one has not",
    )
    parser.add_argument("--epochs", type=positive, help=f"of learned methods; {EPOCHS}, with --quick {QUICK_EPOCHS}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2])
    parser.add_argument("--resume", action="store_true", help="do not repeat what is in the result file")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    if arguments.quick and (arguments.model or arguments.models):
        raise SystemExit("--quick: it is of the demo model: leave out --model and --models")
    if arguments.model and arguments.models:
        raise SystemExit("--models are names of our models, --model is for others: give one of the two")
    peers = peers_in(arguments.peers, arguments.peer_python)
    epochs = arguments.epochs or (QUICK_EPOCHS if arguments.quick else EPOCHS)
    samples = arguments.samples or (QUICK_SAMPLES if arguments.quick else 128 if arguments.model else SAMPLES)
    file = RunFile("accuracy" + ("-quick" if arguments.quick else "-models" if arguments.model else ""), arguments.out)
    with ExitStack() as stack:
        places = _places(arguments, stack)
        cases = []
        for name in places:
            spec = ModelSpec(schemes=QUICK_SCHEMES) if arguments.quick else MODELS.get(name, ModelSpec())
            cases += plan(
                name,
                spec,
                arguments.schemes,
                arguments.methods,
                epochs,
                samples,
                arguments.seeds,
                arguments.efforts,
                peers,
                arguments.epochs or (QUICK_EPOCHS if arguments.quick else None),
            )
        run_all(cases, places, file, arguments.resume, lambda: _write(file))
    _write(file, picture=True)
    print(file.beside(".md").read_text(encoding="utf-8"))
    print(f"written to {file.path}, .md and .png")


def plan(
    model: str,
    spec: ModelSpec,
    schemes: Sequence[str] | None,
    methods: Collection[str],
    epochs: int,
    samples: int,
    seeds: Sequence[int],
    efforts: Sequence[str] = ("default",),
    peers: Sequence[Peer] = (),
    epochs_of_efforts: int | None = None,
) -> list[Case]:
    """The runs of a model in their order: the model as it is, then each scheme with each method that goes with it, and
    with each peer, which says itself why it has no figure at a scheme. Methods with efforts have epochs of their own.

    Rounding to nearest depends on no seed unless it rotates, and runs once. Rotated rows are for schemes that quantize
    activations. Methods with efforts that rotate have a row without as well.
    """
    offered = spec.schemes or SCHEMES
    chosen = offered if schemes is None else [s for s in schemes if s in offered or spec.schemes is None]
    cases, versions = [Case.original(model)], [(peer, peer.settings()) for peer in peers]
    for scheme in chosen:
        for method, rotation in _with_rotations(ModelScheme.parse(scheme), spec.outliers):
            allowed = method in methods and (spec.methods is None or method in spec.methods)
            if not (allowed and _go_together(method, scheme)):
                continue
            changes = shorter_ramps(method, scheme, spec, {})
            if METHODS[method].efforts:
                for effort in efforts:
                    changes = shorter_ramps(method, scheme, spec, {}, effort)
                    label = f"{effort} effort"
                    case = Case.of(
                        model, scheme, method, changes, epochs_of_efforts, effort, rotation=rotation, label=label,
                        samples=samples,
                    )  # fmt: skip
                    cases += _seeded(case, seeds)
                continue
            case = Case.of(model, scheme, method, changes, epochs, rotation=rotation, seed=seeds[0], samples=samples)
            cases += [case] if case.settings is None and not rotation else _seeded(case, seeds)
        for peer, settings in versions:
            cases += _seeded(Case(model, scheme, peer.name, settings, samples=samples, peer=peer), seeds)
    return cases


def _with_rotations(scheme: ModelScheme, own_only: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Every method with its own rotations; then, unless `own_only`, what else is compared where activations are
    quantized."""
    own = [(name, method.rotations_for(scheme)) for name, method in METHODS.items()]
    if own_only or not scheme.quantizes_activations:
        return own
    rotations = tuple(name for name in ROTATIONS if name != "R3" or scheme.quantizes_attention)
    plain: list[tuple[str, tuple[str, ...]]] = [
        (name, ()) for name, rotated in own if rotated and METHODS[name].efforts
    ]
    return own + plain + [(method, rotations) for method in ROTATED_METHODS]


def shorter_ramps(
    method: str, scheme: str, spec: ModelSpec, changes: dict[str, Any], effort: str | None = None
) -> dict[str, Any]:
    """The ramps of a method with changed settings where the model has too few layers for them, as settings."""
    settings = with_overrides(METHODS[method], ModelScheme.parse(scheme), changes, effort)
    if spec.ramps is None or not isinstance(settings, Settings):
        return {}
    windows = settings.windows
    return {"windows": {"shallow": min(windows.shallow, spec.ramps), "deep": min(windows.deep, spec.ramps)}}


def _seeded(case: Case, seeds: Sequence[int]) -> list[Case]:
    return [dataclasses.replace(case, seed=seed) for seed in seeds]


def _go_together(method: str, scheme: str) -> bool:
    try:
        check_scheme(METHODS[method], ModelScheme.parse(scheme))
    except InputError:
        return False
    return True


def _places(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, Place]:
    """By name, where models and texts are."""
    material = arguments.material
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if arguments.quick:
        texts = [kept_text(Text(t, t), p, folder) for t, p in zip(QUICK_TEXTS, PURPOSES, strict=True)]
        return {DEMO.name: Place(DEMO.name, str(DEMO), *texts, seqlen=arguments.seqlen or QUICK_SEQLEN)}
    if arguments.model:
        sources = (arguments.calibration, arguments.evaluation)
        texts = [kept_text(named_text(t, material), p, folder) for t, p in zip(sources, PURPOSES, strict=True)]
        places = {}
        for model in arguments.model:
            name = Path(model).resolve().name if Path(model).expanduser().is_dir() else model
            if name in places:
                raise SystemExit(f"--model: two models are called {name}: rename a folder, or run them one by one")
            places[name] = Place(name, model, *texts, seqlen=arguments.seqlen)
        return places
    places = {}
    given = arguments.models or [(name, None) for name, spec in MODELS.items() if spec.folder is not None]
    for name, own in given:
        spec = MODELS[name]
        model = own or model_folder(spec, material)
        if spec.outliers:
            model = stack.enter_context(outlier_model(model))
        calibration, evaluation = material_texts(spec.texts, material)
        others = tuple(elsewhere_text(text, material, folder) for text in spec.elsewhere)
        places[name] = Place(name, model, calibration, evaluation, arguments.seqlen or SEQLEN, others)
    return places


def elsewhere_text(name: str, material: Path, folder: Path) -> Text:
    """A text of another domain: one that sliderquant knows by name, or a file in `material`. Documents are joined by
    blank lines into a file in `folder`, so that a slice is one of characters."""
    source, bracket, part = name.partition("[")
    if source in NAMED_SOURCES or not source.endswith(".jsonl"):
        return kept_text(Text(name, name), "evaluation", folder)
    (whole,) = material_texts([source], material)
    path = folder / f"{Path(source).stem}.txt"
    path.write_text("\n\n".join(read_text(whole.source, "evaluation").documents), encoding="utf-8")
    return Text(name, f"{path}{bracket}{part}")


def model_folder(spec: ModelSpec, material: Path) -> str:
    """Where a model is that has not to be given."""
    return str(material / spec.folder) if spec.folder else str(DEMO)


def model_argument(text: str) -> tuple[str, str | None]:
    """NAME or NAME=FOLDER of one of MODELS."""
    name, _, folder = text.partition("=")
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODELS)}, not {name!r}; others by --model")
    if folder and not Path(folder).expanduser().is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {folder}")
    if not folder and MODELS[name].folder is None:
        raise argparse.ArgumentTypeError(f"{name} is not in --material: give its folder, {name}=FOLDER")
    return name, str(Path(folder).expanduser()) if folder else None


def material_texts(names: Iterable[str], material: Path) -> list[Text]:
    """Texts in the folder `material`."""
    if not (material / "data").is_dir():
        raise SystemExit(f"--material {material}: expected a folder with data/ and models/; --quick needs none")
    return [Text(name, str(material / name)) for name in names]


def _write(file: RunFile, picture: bool = False) -> None:
    rows = file.rows()
    file.beside(".md").write_text(markdown(rows), encoding="utf-8")
    if picture:
        accuracy_figure(summary_of(rows)).savefig(file.beside(".png"), dpi=100)
        figure = effort_figure(summary_of(rows))
        if figure is not None:
            figure.savefig(file.path.with_name(f"{file.name}-effort.png"), dpi=100)
