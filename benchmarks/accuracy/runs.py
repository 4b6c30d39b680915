"""Runs of a benchmark: a model is quantized and its perplexity measured. Each is kept in a file as soon as it is there.

A result file holds no path of the machine: models are called by their names, texts by their place in --material.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import sliderquant
from benchmarks import results
from benchmarks.accuracy.outliers import inject_outliers
from benchmarks.peers.runs import NOT_INSTALLED, Peer, PeerError, PeerSettings
from sliderquant.calibration.text import NAMED_SOURCES, read_text
from sliderquant.errors import InputError, SliderQuantError
from sliderquant.models.source import open_model
from sliderquant.planning.methods import METHODS, with_overrides
from sliderquant.planning.settings import OneShotSettings, Settings
from sliderquant.schemes import ModelScheme

__all__ = [
    "DEMO",
    "Case",
    "Place",
    "RunFile",
    "Text",
    "kept_text",
    "named_text",
    "outlier_model",
    "positive",
    "run_all",
    "scheme_argument",
    "summarize",
]

DEMO = Path(__file__).parents[2] / "sliderquant" / "assets" / "demo-llama-5m"
ORIGINAL = "original"
# What makes two rows the same line of a table; a run with other settings or texts replaces the row that is there.
SEEDLESS = ("ablation", "label", "model", "scheme", "method", "rotation", "epochs", "samples")
SLOT = (*SEEDLESS, "seed")
WORK = ("model", "scheme", "engine", "rotation", "seed", "samples", "settings", "seqlen", "calibration", "evaluation")

Row = dict[str, Any]


class Text(NamedTuple):
    """A text by the name that results call it, and what `sliderquant.quantize` reads."""

    name: str
    source: str


@dataclass(frozen=True)
class Place:
    """A model and the texts that it is calibrated and measured on.

    Attributes:
        name: what results call it.
        model: folder, or id on the Hugging Face hub.
        seqlen: tokens of a sample and of a block; None: 2048, or the model's maximum when that is shorter.
        elsewhere: further texts that it is measured on, of other domains.
    """

    name: str
    model: str
    calibration: Text
    evaluation: Text
    seqlen: int | None
    elsewhere: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        scheme: as `sliderquant.schemes` writes it; "16 bits" with the method "original".
        settings: all of them, the method's and what was changed.
        label: tells apart runs of one method with different settings.
        ablation: the name of the ablation that it belongs to.
        peer: another package, which does it in a process of its own.
        budget: the epochs that its table is about; None: its own.
    """

    model: str
    scheme: str
    method: str
    settings: Settings | OneShotSettings | PeerSettings | None = None
    rotation: tuple[str, ...] = ()
    seed: int | None = None
    samples: int | None = None
    label: str = ""
    ablation: str = ""
    peer: Peer | None = None
    budget: int | None = None

    @property
    def epochs(self) -> int | None:
        """Its own, if it has any."""
        return self.settings.epochs if isinstance(self.settings, Settings) else None

    @classmethod
    def of(
        cls,
        model: str,
        scheme: str,
        method: str,
        changes: dict[str, Any],
        epochs: int | None,
        effort: str | None = None,
        **more: Any,
    ) -> "Case":
        """A run with the method's settings but for `changes`; `epochs` where the method has any, None: its own.

        Raises:
            InputError: the changes are not settings of the method, or the effort is none of its.
        """
        chosen, parsed = METHODS[method], ModelScheme.parse(scheme)
        if epochs is not None and isinstance(chosen.settings_for(parsed), Settings):
            changes = {"epochs": epochs, **changes}
        return cls(model, str(parsed), method, with_overrides(chosen, parsed, changes, effort), **more)

    @classmethod
    def original(cls, model: str) -> "Case":
        """The model as it is."""
        return cls(model, "16 bits", ORIGINAL)

    def __str__(self) -> str:
        rotated = "+".join(self.rotation)
        parts = (self.model, self.scheme, self.ablation, self.method, self.label, rotated)
        return " ".join(part for part in parts if part) + ("" if self.seed is None else f" seed {self.seed}")

    def described(self, place: Place) -> Row:
        """The columns of its row that are known before it ran."""
        settings = None if self.settings is None else self.settings.model_dump(mode="json")
        return {
            **({"ablation": self.ablation} if self.ablation else {}),
            "model": self.model,
            "scheme": self.scheme,
            "method": self.method,
            **({"label": self.label} if self.label else {}),
            "rotation": ",".join(self.rotation),
            "seed": self.seed,
            "epochs": self.epochs if self.budget is None else self.budget,
            "samples": self.samples if self.settings is not None else None,
            "seqlen": place.seqlen,
            "calibration": place.calibration.name if self.settings is not None else None,
            "evaluation": place.evaluation.name,
            # Methods that slide windows differ in their settings alone.
            "engine": "windows" if isinstance(self.settings, Settings) else self.method,
            "settings": settings,
        }


class RunFile:
    """Rows of runs in `<folder>/<device>/<name>.json`, which is replaced as a whole after every run.

    Several processes may add to it at a time. Rows that are not of runs, such as those of older files, are dropped.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self.folder = name, folder
        self.path = (folder or results.FOLDER) / results.device_name() / f"{name}.json"
        digest = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"sliderquant-benchmark-{digest}.lock")

    def rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{self.path}: not a result file of this command ({error}): move it away") from error
        return [row for row in found if "engine" in row]

    def add(self, row: Row) -> None:
        """Write the row in place of the one of the same slot. Those of other seeds go with it if they were run with
        other settings or texts, for a mean is of seeds alone."""
        with self._lock:
            kept = [other for other in self.rows() if not _replaces(row, other)]
            results.write(self.name, [*kept, row], self.folder)

    def found(self, row: Row) -> Row | None:
        """The row of the same slot that has a perplexity."""
        slot = _columns(row, SLOT)
        return next((other for other in self.rows() if "perplexity" in other and _columns(other, SLOT) == slot), None)

    def beside(self, suffix: str) -> Path:
        """The path of a file next to it."""
        return self.path.with_suffix(suffix)


def run_all(
    cases: Sequence[Case],
    places: dict[str, Place],
    file: RunFile,
    resume: bool,
    added: Callable[[], None] = lambda: None,
) -> None:
    """Run the cases one after the other; each is in the file when the next begins, then `added` is called.

    Args:
        resume: runs that are in the file are not repeated. A run that does the same as an earlier one by another name
            is never repeated; its row says whose figures it holds. Runs that ended in an error are tried again.
    """
    finished = [row for row in file.rows() if "perplexity" in row] if resume else []
    for number, case in enumerate(cases, start=1):
        row = case.described(places[case.model])
        print(f"[{number}/{len(cases)}] {case}", end=" ", flush=True)
        same = [other for other in finished if _work(other) == _work(row)]
        there = next((other for other in same if _columns(other, SLOT) == _columns(row, SLOT)), None)
        if there is not None:
            print(f"{there['perplexity']:.2f}, is in the file", flush=True)
            continue
        if same:
            row = {**same[0], **row, "same_as": _named(same[0])}
        else:
            row = _measured(case, places[case.model], row)
            kept = file.found(row) if row.get("reason") == NOT_INSTALLED else None
            if kept is not None:
                version = kept["settings"]["version"]
                print(f"{row['error']} (the file keeps {kept['perplexity']:.2f}, of version {version})", flush=True)
                continue
        file.add(row)
        if "perplexity" in row:
            finished.append(row)
            print(f"{row['perplexity']:.2f}" + (f", {row['seconds']} s" if row["seconds"] else ""), flush=True)
        else:
            print(row["error"], flush=True)
        added()


def _replaces(row: Row, other: Row) -> bool:
    if _columns(row, SEEDLESS) != _columns(other, SEEDLESS):
        return False
    return row.get("seed") == other.get("seed") or _work({**other, "seed": row.get("seed")}) != _work(row)


def _work(row: Row) -> Any:
    """What a row is the result of. Settings that did not exist when it was run have their defaults, which is how runs
    were before there were any."""
    if row["engine"] == "windows":
        with suppress(ValidationError):  # of a setting that there is no longer
            row = {**row, "settings": Settings.model_validate(row["settings"]).model_dump(mode="json")}
    return _columns(row, WORK)


def _measured(case: Case, place: Place, row: Row) -> Row:
    """The row with what came out, or with an `error`."""
    with tempfile.TemporaryDirectory() as folder:
        measured: Row = {}
        checkpoint: str | Path = place.model
        try:
            if case.peer is not None:
                checkpoint = Path(folder) / "checkpoint"
                measured = case.peer.quantize(
                    case.settings,
                    place.model,
                    checkpoint,
                    ModelScheme.parse(case.scheme),
                    place.calibration.source,
                    case.samples or 1,
                    place.seqlen,
                    case.seed or 0,
                )
            elif case.method != ORIGINAL:
                start = time.perf_counter()
                result = sliderquant.quantize(
                    place.model,
                    Path(folder) / "checkpoint",
                    scheme=case.scheme,
                    method=case.method,
                    settings=None if case.settings is None else case.settings.model_dump(),
                    calibration=place.calibration.source,
                    samples=case.samples or 1,
                    seqlen=place.seqlen,
                    seed=case.seed or 0,
                    rotate=case.rotation,
                )
                measured = {"seconds": round(time.perf_counter() - start, 1), "steps": result.plan.steps}
                measured["threads"] = torch.get_num_threads()
                checkpoint = result.path
            # In fp32 on every device: what is compared is quantization, not the rounding of 16-bit activations.
            measure = partial(sliderquant.evaluate, checkpoint, seqlen=place.seqlen, dtype="float32")
            value = measure(place.evaluation.source)
            others = {text.name: measure(text.source).value for text in place.elsewhere}
        except PeerError as error:
            if str(error) != error.summary:
                print(error, flush=True)
            return {**row, "error": error.summary, "reason": error.reason}
        except SliderQuantError as error:
            return {**row, "error": str(error).replace(place.model, place.name).replace(folder, "")}
        tokens = {"blocks": value.blocks, "tokens": value.tokens}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        elsewhere = {"elsewhere": others} if others else {}
        return {
            "seconds": None, "steps": None, **row, "perplexity": value.value, **elsewhere, **measured, **tokens,
            "date": date,
        }  # fmt: skip


def summarize(rows: Iterable[Row]) -> list[Row]:
    """One row for all seeds: mean `perplexity` and `seconds`, `least` and `most` perplexity, their difference `spread`,
    and the `seeds`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_columns(row, SEEDLESS), []).append(row)
    summary = []
    for group in groups.values():
        found = [row for row in group if "perplexity" in row]
        kept = {name: value for name, value in (found or group)[0].items() if name in SEEDLESS}
        kept["seeds"] = [row["seed"] for row in found if row["seed"] is not None]
        if found:
            values = [row["perplexity"] for row in found]
            least, most = min(values), max(values)
            kept |= {"perplexity": statistics.fmean(values), "least": least, "most": most, "spread": most - least}
            texts = dict.fromkeys(text for row in found for text in row.get("elsewhere", ()))
            kept["elsewhere"] = {
                text: statistics.fmean(row["elsewhere"][text] for row in found if text in row.get("elsewhere", ()))
                for text in texts
            }
            seconds = [row["seconds"] for row in found if row["seconds"] is not None]
            kept["seconds"] = round(statistics.fmean(seconds), 1) if seconds else None
        else:
            kept |= {name: group[0][name] for name in ("error", "reason") if name in group[0]}
        summary.append(kept)
    return summary


@contextmanager
def outlier_model(source: str, factor: float = 32.0) -> Iterator[str]:
    """A folder with a copy of a model that has outliers injected, for as long as the context lasts."""
    opened = open_model(source)
    model = AutoModelForCausalLM.from_pretrained(opened.folder, dtype="auto")
    inject_outliers(model, opened.family, factor=factor)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened.tokenizer().save_pretrained(folder)
        yield folder


def named_text(source: str, material: Path) -> Text:
    """A text as a user names it: a file below `material` is called by its place in it, another by its name alone."""
    if source.partition("[")[0] in NAMED_SOURCES:
        return Text(source, source)
    path = Path(source).expanduser().resolve()
    inside = path.is_relative_to(material.resolve())
    return Text(path.relative_to(material.resolve()).as_posix() if inside else path.name, source)


def kept_text(text: Text, purpose: str, folder: Path) -> Text:
    """Texts that take long to put together, written once to a file in `folder`."""
    if text.source.partition("[")[0] not in NAMED_SOURCES:
        return text
    read = read_text(text.source, purpose)  # type: ignore[arg-type]
    if not read.running:
        return text
    path = folder / f"{purpose}-{hashlib.sha256(text.source.encode()).hexdigest()[:16]}.txt"
    path.write_text(read.documents[0], encoding="utf-8")
    return Text(text.name, str(path))


def positive(text: str) -> int:
    """A whole number above 0 given on the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, not {text!r}")
    return int(text)


def scheme_argument(text: str) -> str:
    """A scheme given on the command line, as `sliderquant.schemes` writes it."""
    try:
        return str(ModelScheme.parse(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _columns(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in names)


def _named(row: Row) -> str:
    parts = (row.get("ablation"), row["method"], row.get("label"), row["rotation"])
    return " ".join(part for part in parts if part)
