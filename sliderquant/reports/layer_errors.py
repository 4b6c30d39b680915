"""What the page of a quantization run says of a one-shot method: the errors that it left in every layer and linear."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sliderquant.reports.page import spaced_ticks

__all__ = ["error_figure", "error_table", "layer_warnings", "scale_table"]

# Of Okabe and Ito, each with a marker of its own: there are more linears in a layer than colors to tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = "osD^vPX"

Table = tuple[list[str], list[tuple[Any, ...]]]


def error_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Over the layers: above, the error of each layer's output; below, that of each of its linears, a line for each.

    Args:
        layers: those of `layer_errors` in sliderquant-report.json. An error that was not finite has no place.
    """
    figure = Figure(figsize=(8.5, 6.4), layout="constrained")
    outputs, linears = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    places = range(len(layers))
    outputs.plot(places, [_number(layer["error"]) for layer in layers], color="#555555", marker=".")
    _logarithmic(outputs, [layer["error"] for layer in layers])
    for number, name in enumerate(_linears(layers)):
        errors = [layer["linears"].get(name, {}).get("error") for layer in layers]
        style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
        linears.plot(places, [_number(error) for error in errors], **style, markersize=4, label=_kind(name))
    _logarithmic(linears, [found["error"] for layer in layers for found in layer["linears"].values()])
    ticks, labels = spaced_ticks([str(layer["layer"]) for layer in layers])
    linears.set_xticks(ticks, labels)
    linears.set(xlim=(-0.6, len(layers) - 0.4), xlabel="decoder layer", ylabel="relative squared error")
    linears.set_title("output of each linear, its weight alone rounded")
    outputs.set(ylabel="relative squared error", title="output of the layer")
    for axes in (outputs, linears):
        axes.grid(True, axis="y", linewidth=0.3)
        axes.set_axisbelow(True)
    figure.legend(*linears.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return figure


def error_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Headings, and a line for each layer: the error of its output, and of each linear's."""
    names = _linears(layers)
    lines = [
        (
            layer["layer"],
            _cell(layer["error"]),
            *(_cell(layer["linears"][name]["error"]) if name in layer["linears"] else "" for name in names),
        )
        for layer in layers
    ]
    return ["layer", "output", *map(_kind, names)], lines


def scale_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Headings, and a line for each site of channel scales in each layer; no lines for methods without."""
    sites = [(layer["layer"], site, found) for layer in layers for site, found in layer["scales"].items()]
    keys = list(dict.fromkeys(key for _, _, found in sites for key in found))
    lines = [
        (layer, site, *(_cell(found[key]) if key in found else "" for key in keys)) for layer, site, found in sites
    ]
    return ["layer", "channel scales at", *keys], lines


def layer_warnings(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Layers whose output is not finite, and what was the matter with linears: a line for each matter."""
    found = [
        f"Layer {layer['layer']}: the error of its output is not finite." for layer in layers if layer["error"] is None
    ]
    places: dict[str, list[str]] = {}
    for layer in layers:
        names: dict[str, list[str]] = {}
        for name, linear in layer["linears"].items():
            if "trouble" in linear:
                names.setdefault(linear["trouble"], []).append(_kind(name))
        for trouble, kinds in names.items():
            places.setdefault(trouble, []).append(f"layer {layer['layer']} ({', '.join(kinds)})")
    return [*found, *(f"{trouble}: {', '.join(where)}." for trouble, where in places.items())]


def _linears(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer["linears"]))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _number(error: float | None) -> float:
    return math.nan if error is None else error


def _cell(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _logarithmic(axes: Axes, errors: Sequence[float | None]) -> None:
    """An error of 0, where nothing was rounded away, has no place on a logarithmic axis."""
    finite = [error for error in errors if error is not None]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
