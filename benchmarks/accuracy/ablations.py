"""What `python -m benchmarks ablate` varies: settings of a method that differ from its own."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.accuracy.runs import Row

__all__ = ["ABLATIONS", "BASE", "Ablation", "based_on", "tables_of"]

BASE = "as it is"


@dataclass(frozen=True)
class Ablation:
    """One ingredient.

    Attributes:
        question: what the rows answer.
        rows: label -> the settings that differ; that of the method as it is comes by itself.
        scheme: the scheme unless another is asked for.
        method: whose settings differ.
        base: the settings in which every row differs from the method, that of it "as it is" too; `rows` win over them.
        base_text: what these settings are, for the headings.
        longer: label -> how many times the epochs a row has that takes less time for each: as much time as the others.
    """

    question: str
    rows: dict[str, dict[str, Any]]
    scheme: str = "W2A16"
    method: str = "sliderquant-published"
    base: dict[str, Any] = field(default_factory=dict)
    base_text: str = ""
    longer: dict[str, float] = field(default_factory=dict)


def _windows(shallow: int, deep: int, size: int) -> dict[str, Any]:
    return {"windows": {"shallow": shallow, "deep": deep, "size": size, "stride": 1}}


def _scales(use: str, start: str = "ones", space: str = "direct") -> dict[str, Any]:
    return {"scales": {"use": use, "start": start, "space": space}}


# A window of this size is one over all layers of any model: the schedule cuts it to those there are.
_ALL_LAYERS = 1000

# The published settings with a larger term, and ranges and rates that go well with it.
_LOW_RANK: dict[str, Any] = {
    "base": {
        "clipping_start": "search",
        "rank": 32,
        "grid": "free",
        "learning_rates": {"low_rank": 1e-3, "clipping": 1e-3},
    },
    "base_text": "rank 32, free ranges from a search, rates of both 1e-3",
}
_LOW_RANK_ACTIVATIONS: dict[str, Any] = {
    "base": {
        "clipping_start": "search",
        "scales": {"start": "outliers", "space": "log"},
        "rank": 32,
        "learning_rates": {"low_rank": 1e-3},
        "activation_clipping": "auto",
    },
    "base_text": "rank 32 at a rate of 1e-3, ranges from a search, scales of outliers, clipped activations",
}

ABLATIONS: dict[str, Ablation] = {
    "windows": Ablation(
        "what sliding over several layers brings",
        {
            "block by block": _windows(0, 0, 1),
            "size 2, no ramps": _windows(0, 0, 2),
            "size 3, no ramps": _windows(0, 0, 3),
            "size 2, ramps of 4": _windows(4, 4, 2),
            "one window over all layers": _windows(0, 0, _ALL_LAYERS),
        },
        **_LOW_RANK,
    ),
    "ramps": Ablation(
        "what the growing and the shrinking windows at the two ends bring",
        {
            f"shallow {shallow}, deep {deep}": _windows(shallow, deep, 2)
            for shallow, deep in ((0, 0), (2, 2), (4, 4), (4, 0), (0, 4))
        },
        **_LOW_RANK,
    ),
    "gamma": Ablation(
        "what quantizing the input channels in stages brings",
        {"one stage": {"gamma": 1.0}, "two stages": {"gamma": 0.5}, "four stages": {"gamma": 0.25}},
        **_LOW_RANK,
    ),
    "stage_order": Ablation(
        "whether stages go over the whole model one after the other, or within each window",
        {order: {"stage_order": order} for order in ("sweep", "window")},
        **_LOW_RANK,
    ),
    "rank": Ablation(
        "what the low-rank term brings",
        {"no low-rank term" if rank == 0 else f"rank {rank}": {"rank": rank} for rank in (0, 1, 4, 16, 32)},
        **_LOW_RANK,
    ),
    "clipping": Ablation(
        "what learned clipping brings, and ends of the ranges that are free of the weights",
        {
            "free ends": {"grid": "free"},
            "clipped ranges": {"grid": "range", "learning_rates": {"clipping": 1e-2}},
            "none": {"clipping": False, "grid": "range"},
        },
        **_LOW_RANK,
    ),
    "scales": Ablation(
        "which channel scales, where activations are quantized",
        {
            "none": _scales("never"),
            "from ones, direct": _scales("always", "ones", "direct"),
            "from ones, log": _scales("always", "ones", "log"),
            "from statistics, direct": _scales("always", "statistics", "direct"),
            "from statistics, log": _scales("always", "statistics", "log"),
            "outliers from statistics, log": _scales("always", "outliers", "log"),
        },
        scheme="W4A4KV4",
        **_LOW_RANK_ACTIVATIONS,
    ),
    "recipe": Ablation(
        "what each ingredient brings last: without it, everything else as it is",
        {
            "low-rank terms in place of offsets of weights": {
                "weights": False,
                "hardening": False,
                "rank": 32,
                "learning_rates": {"low_rank": 1e-3},
            },
            "low-rank terms on top": {"rank": 4},
            "ranges of the current weights": {"grid": "range"},
            "grids that are not learned": {"learning_rates": {"clipping": 0.0}},
            "ranges from 0.982": {"clipping_start": 4.0},
            "offsets that do not decay": {"weights_decay": 0.0},
            "offsets that decay half as far": {"weights_decay": 0.1665},
            "offsets that decay twice as far": {"weights_decay": 0.666},
            "offsets that do not harden": {"hardening": False},
            "hidden states to the end": {"last_loss": "hidden"},
            "two stages": {"gamma": 0.5},
            "block by block": _windows(0, 0, 1),
            "block by block, 2.5 times the epochs": _windows(0, 0, 1),
            "size 2, no ramps": _windows(0, 0, 2),
            "size 2, no ramps, 1.5 times the epochs": _windows(0, 0, 2),
        },
        method="sliderquant",
        base={"windows": {"shallow": 4, "deep": 4}, "relative_loss": 0.0},
        base_text="with ramps of 4 and plain squared errors",
        longer={"block by block, 2.5 times the epochs": 2.5, "size 2, no ramps, 1.5 times the epochs": 1.5},
    ),
    "schedule": Ablation(
        "which windows win in the same time",
        {
            "ramps of 4, 0.63 times the epochs": _windows(4, 4, 2),
            "block by block, 1.5 times the epochs": _windows(0, 0, 1),
        },
        method="sliderquant",
        longer={"ramps of 4, 0.63 times the epochs": 0.63, "block by block, 1.5 times the epochs": 1.5},
    ),
    "loss": Ablation(
        "whether the error of a token counts relatively to its hidden state",
        {f"power {x:g}": {"relative_loss": x} for x in (0.0, 0.5, 1.0)},
        method="sliderquant",
    ),
    "matmul": Ablation(
        "what matrix products in bfloat16 save and cost",
        {dtype: {"matmul": dtype} for dtype in ("float32", "bfloat16")},
        method="sliderquant",
    ),
    "recipe_alone": Ablation(
        "what each ingredient brings alone, on top of the published settings",
        {
            "one stage": {"gamma": 1.0},
            "ranges from a search": {"clipping_start": "search"},
            "offsets of weights": {"weights": True, "rank": 0, "learning_rates": {"weights": 4e-3}},
            "offsets that harden": {
                "weights": True,
                "hardening": True,
                "rank": 0,
                "learning_rates": {"weights": 4e-3},
            },
            "free grids": {"grid": "free", "learning_rates": {"clipping": 2e-3}},
            "logits at the end": {"last_loss": "logits"},
        },
    ),
}


def based_on(name: str) -> str:
    """What a heading says after the method of an ablation; empty: its settings are the method's."""
    text = ABLATIONS[name].base_text if name in ABLATIONS else ""
    return f" ({text})" if text else ""


def tables_of(summary: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by ablation, model, scheme, epochs and samples, in the order of ABLATIONS, then by name and number; and in
    that of an ablation's rows.

    `summary` is what `benchmarks.accuracy.runs.summarize` makes.
    """
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in summary:
        if "ablation" in row:
            key = tuple(row[name] for name in ("ablation", "model", "scheme", "epochs", "samples"))
            tables.setdefault(key, []).append(row)
    for (name, *_), found in tables.items():
        labels = [BASE, *(ABLATIONS[name].rows if name in ABLATIONS else ())]
        found.sort(key=partial(_place, labels, "label"))
    names = list(ABLATIONS)
    return {key: tables[key] for key in sorted(tables, key=lambda key: (_place(names, 0, key), *key[1:]))}


def _place(known: list[str], column: Any, row: Any) -> int:
    """That of the row's column in what is known; last, if it is not."""
    return known.index(row[column]) if row[column] in known else len(known)
