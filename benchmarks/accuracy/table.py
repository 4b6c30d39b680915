"""The accuracy table in Markdown: methods over schemes, runs with their goals, whether the paper's order holds."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import results
from benchmarks.accuracy.runs import Row, summarize
from sliderquant.planning.methods import METHODS
from sliderquant.schemes import ModelScheme

__all__ = [
    "EPOCHS",
    "SAMPLES",
    "SCHEMES",
    "column_of",
    "figure_text",
    "markdown",
    "order_sentences",
    "summary_of",
    "usual_epochs",
]

SCHEMES = ("W4A16", "W3A16", "W2A16", "W2A16-g64", "W4A4KV4")
# The budget of the goals and references.
EPOCHS, SAMPLES = 10, 64

# What must be reached, and what others' code reaches.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("demo-llama-5m", "sliderquant-published"): {"W4A16": 40.80, "W3A16": 42.59, "W2A16": 60.26, "W4A4KV4": 43.70},
    ("demo-llama-5m", "sliderquant, default effort"): {
        "W4A16": 40.5,
        "W3A16": 41.5,
        "W2A16": 47.0,
        "W2A16-g64": 45.5,
        "W4A4KV4": 42.5,
    },
    ("demo-llama-5m", "sliderquant, best effort"): {
        "W4A16": 40.4,
        "W3A16": 41.2,
        "W2A16": 45.5,
        "W2A16-g64": 44.5,
        "W4A4KV4": 42.0,
    },
    ("SmolLM2-135M", "sliderquant, default effort"): {"W4A16-g64": 38.7, "W2A16-g64": 70.0},
}
REFERENCES: dict[tuple[str, str], dict[str, float]] = {
    ("demo-llama-5m", "cbq"): {"W2A16": 64.96},
    ("demo-llama-5m", "omniquant"): {"W2A16": 74.08},
    ("demo-llama-5m", "gptq"): {"W2A16": 113.6, "W2A16-g64": 71.6},
}
# The paper's, from the best on; where outliers were injected, ours and what they ruin.
ORDER = ("sliderquant-published", "cbq", "omniquant", "rtn")
OUTLIER_ORDER = ("sliderquant, default effort", "rtn")


def usual_epochs(method: str) -> int | None:
    """Of a learned method, if no others are asked for; None: its own, because it has efforts."""
    return None if METHODS[method].efforts else EPOCHS


def summary_of(rows: Iterable[Row]) -> list[Row]:
    """The rows' summary, in the order of schemes, methods and efforts; models as they come."""
    summary = summarize(rows)
    columns, methods = _ordered(map(column_of, summary)), ["original", *METHODS]
    models = list(dict.fromkeys(row["model"] for row in summary))

    def place(row: Row) -> tuple[int, ...]:
        method = methods.index(row["method"]) if row["method"] in methods else len(methods)
        labels = [f"{effort} effort" for effort in METHODS[row["method"]].efforts] if row["method"] in METHODS else []
        effort = labels.index(row["label"]) if row.get("label") in labels else len(labels)
        return models.index(row["model"]), row["method"] != "original", columns.index(column_of(row)), method, effort

    return sorted(summary, key=place)


def column_of(row: Row) -> str:
    """The column of a row in the table of all methods and schemes."""
    rotated = row["rotation"] and ModelScheme.parse(row["scheme"]).quantizes_activations
    return f"{row['scheme']}, rotated" if rotated else row["scheme"]


def markdown(rows: Iterable[Row]) -> str:
    """The tables, the sentences about the order, and the notes on peers."""
    rows = list(rows)
    summary = summary_of(rows)
    parts = ["# Accuracy", "", "Perplexity, lower is better; in brackets the seconds of quantizing, mean of all seeds."]
    for model in dict.fromkeys(row["model"] for row in summary):
        found = [row for row in summary if row["model"] == model]
        parts += ["", f"## {model}", "", *_matrix(found)]
        for text in dict.fromkeys(text for row in found for text in row.get("elsewhere", ())):
            parts += [
                "",
                f"On another domain than it was calibrated on, {text}:",
                "",
                *_matrix(_measured_on(found, text)),
            ]
        sentences = order_sentences(found)
        sentences += _peer_notes([row for row in rows if row["model"] == model])
        parts += ["", *(f"- {sentence}" for sentence in sentences)] if sentences else []
    parts += ["", "## Every run", "", results.markdown([_listed(row, summary) for row in summary], LISTED)]
    return "\n".join(parts) + "\n"


LISTED = [
    "model", "scheme", "method", "rotation", "perplexity", "of 16 bits", "spread", "seeds", "goal", "reference",
    "epochs", "samples", "seconds",
]  # fmt: skip


def _measured_on(summary: list[Row], text: str) -> list[Row]:
    """The rows with their perplexities on another text."""
    return [{**row, "perplexity": row["elsewhere"][text]} for row in summary if text in row.get("elsewhere", ())]


def _matrix(summary: list[Row]) -> list[str]:
    """Methods in rows, schemes in columns."""
    original = [row for row in summary if row["method"] == "original" and "perplexity" in row]
    quantized = [row for row in summary if row["method"] != "original"]
    columns = _ordered(map(column_of, quantized))
    cells: dict[str, dict[str, Any]] = {}
    for row in quantized:
        parts = [row["method"], row.get("label"), *_unusual(row, quantized)]
        name = ", ".join(part for part in parts if part)
        if "perplexity" in row:
            cell = f"{figure_text(row['perplexity'])} ({row['seconds']:.3g} s)"
        else:
            cell = row.get("reason", "refused")
        cells.setdefault(name, {"method": name})[column_of(row)] = cell
    names = [method for method in METHODS if method in cells]
    ordered = [cells[name] for name in names] + [cell for name, cell in cells.items() if name not in METHODS]
    head = [f"16 bits: {figure_text(original[0]['perplexity'])}", ""] if original else []
    return [*head, results.markdown(ordered, ["method", *columns])]


def _peer_notes(rows: list[Row]) -> list[str]:
    """What the peers ran with, and at which schemes they have no figure and why, each once."""
    notes = []
    for row in rows:
        if "package" not in (row["settings"] or {}):
            continue
        package = " ".join(filter(None, (row["settings"]["package"], row["settings"]["version"])))
        if "perplexity" in row:
            used = ", ".join(f"{name} {value}" for name, value in row["peer"].items())
            notes.append(f"{row['method']} {row['scheme']} is {package}, {row['threads']} threads: {used}")
        else:
            notes.append(f"{row['method']} {row['scheme']}: {row.get('reason', 'refused')}: {row['error']}")
    return list(dict.fromkeys(notes))


def _unusual(row: Row, summary: list[Row]) -> list[str]:
    """Epochs and samples, where rows of the same method differ in them."""
    found = []
    for name in ("epochs", "samples"):
        same = [other for other in summary if other["method"] == row["method"] and not other.get("label")]
        if not row.get("label") and len({other[name] for other in same}) > 1:
            found.append(f"{row[name]} {name}")
    return found


def _ordered(columns: Iterable[str]) -> list[str]:
    """Each once, in the order of SCHEMES, rotated after not rotated."""
    known = [column for scheme in SCHEMES for column in (scheme, f"{scheme}, rotated")]
    found = list(dict.fromkeys(columns))
    return sorted(found, key=lambda column: known.index(column) if column in known else len(known))


def _listed(row: Row, summary: list[Row]) -> Row:
    """The row as the long table shows it."""
    shown = {name: "" if value is None else value for name, value in row.items()}
    shown["seeds"] = " ".join(map(str, row["seeds"]))
    shown["method"] = _name(row)
    if "perplexity" not in row:
        error = row["error"].replace("|", "\\|")
        return {**shown, "perplexity": f"{row.get('reason', 'refused')}: {error}"}
    shown["perplexity"] = figure_text(row["perplexity"])
    shown["spread"] = f"{row['spread']:.2g}" if len(row["seeds"]) > 1 else ""
    for other in summary:
        if other["model"] == row["model"] and other["method"] == "original" and "perplexity" in other:
            shown["of 16 bits"] = f"{row['perplexity'] / other['perplexity']:.3f}"
    usual = row["epochs"] in (EPOCHS, None) and row["samples"] in (SAMPLES, None)
    if (usual or row.get("label")) and _rotates_as_usual(row):
        key = (row["model"], _name(row))
        goal, reference = (figures.get(key, {}).get(row["scheme"]) for figures in (GOALS, REFERENCES))
        if goal is not None:
            shown["goal"] = f"{goal:g} {'reached' if row['perplexity'] <= goal else 'missed'}"
        shown["reference"] = reference or ""
    return shown


def order_sentences(summary: Iterable[Row]) -> list[str]:
    """Whether the order holds, a sentence for each model, scheme and budget with two of its rows.

    It is ORDER, with injected outliers OUTLIER_ORDER, of rows that rotate as their methods do.
    """
    rows = [
        row
        for row in summary
        if "perplexity" in row and _name(row) in _order_of(row["model"]) and _rotates_as_usual(row)
    ]
    groups: dict[tuple[Any, ...], dict[str, float]] = {
        (row["model"], row["scheme"], row["epochs"], row["samples"]): {} for row in rows if row["epochs"] is not None
    }
    for (model, scheme, epochs, samples), found in groups.items():
        for row in rows:
            budget = row["epochs"] in (epochs, None) and row["samples"] in (samples, None)
            if (row["model"], row["scheme"]) == (model, scheme) and budget:
                found[_name(row)] = row["perplexity"]
    return [
        sentence
        for (model, scheme, *_), found in groups.items()
        if (sentence := _sentence(f"{model} {scheme}", found, _order_of(model)))
    ]


def _name(row: Row) -> str:
    """Of the method and what tells its rows apart."""
    return ", ".join(filter(None, (row["method"], row.get("label"))))


def _rotates_as_usual(row: Row) -> bool:
    """Whether the rotation is that of the method itself, which is none for most."""
    method = METHODS.get(row["method"])
    return method is None or row["rotation"] == ",".join(method.rotations_for(ModelScheme.parse(row["scheme"])))


def _order_of(model: str) -> tuple[str, ...]:
    return OUTLIER_ORDER if model.endswith("-outliers") else ORDER


def _sentence(name: str, found: dict[str, float], expected: Sequence[str]) -> str:
    order = [method for method in expected if method in found]
    if len(order) < 2:
        return ""
    missing = [method for method in expected if method not in found]
    note = f" (not run: {', '.join(missing)})" if missing else ""
    broken = [
        f"{better} {figure_text(found[better])} is not below {worse} {figure_text(found[worse])}"
        for better, worse in itertools.pairwise(order)
        if not found[better] < found[worse]
    ]
    if broken:
        return f"{name}: breaks: {'; '.join(broken)}{note}"
    return f"{name}: order holds: {' < '.join(f'{method} {figure_text(found[method])}' for method in order)}{note}"


def figure_text(value: float) -> str:
    """A perplexity as tables and pictures show it."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.2e}"
