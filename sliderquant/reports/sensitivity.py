"""The study of sensitivity as files: JSON, a picture, and a page with both."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sliderquant.evaluation.sensitivity import Part, Sensitivity
from sliderquant.reports.files import check_free, write_files
from sliderquant.reports.page import COLORS, render, spaced_ticks, svg

__all__ = ["check_output", "sensitivity_figure", "sensitivity_page", "thirds", "write_sensitivity"]

_NAMES = ("sensitivity.json", "sensitivity.png", "sensitivity.html")
_HEADINGS = (
    "part",
    "weights",
    "alone: perplexity",
    "change",
    "output error",
    "KL",
    "all but: perplexity",
    "change",
    "output error",
    "KL",
)


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises InputError when the files of a study cannot be written into `folder`, or would replace others."""
    check_free(folder, _NAMES, overwrite)


def write_sensitivity(result: Sensitivity, folder: Path) -> list[Path]:
    """Write sensitivity.json, .png and .html into `folder`, each under another name first; returns their paths."""
    text = json.dumps(result.as_dict(), indent=2) + "\n"
    return write_files(
        folder,
        {
            "sensitivity.json": lambda path: path.write_text(text, encoding="utf-8"),
            "sensitivity.png": lambda path: sensitivity_figure(result).savefig(path, dpi=130, format="png"),
            "sensitivity.html": lambda path: path.write_text(sensitivity_page(result), encoding="utf-8"),
        },
    )


def thirds(layers: int) -> dict[str, range]:
    """The shallow, middle and deep third of so many layers, as equal as can be."""
    ends = [round(layers * third / 3) for third in range(4)]
    return {name: range(ends[i], ends[i + 1]) for i, name in enumerate(COLORS)}


def sensitivity_figure(result: Sensitivity) -> Figure:
    """Layers on the left, kinds of linears on the right; above what a part costs alone, below what is won back by
    leaving it in 16 bits. The thirds of the layers have their colors."""
    figure = Figure(figsize=(max(9.0, 6 + 0.16 * len(result.layers)), 6), layout="constrained")
    width = min(max(len(result.layers) / 8, 1.5), 3)
    (top, top_kinds), (bottom, bottom_kinds) = figure.subplots(2, 2, sharex="col", width_ratios=(width, 1))
    colors = [color for name, color in COLORS.items() for _ in thirds(len(result.layers))[name]]
    for axes, values in (
        (top, [part.alone.perplexity_change for part in result.layers]),
        (bottom, [-part.all_but.perplexity_change for part in result.layers]),
    ):
        axes.bar(range(len(values)), values, color=colors, width=0.8)
        _mark_thirds(axes, values, len(result.layers))
    for axes, values in (
        (top_kinds, [part.alone.perplexity_change for part in result.kinds]),
        (bottom_kinds, [-part.all_but.perplexity_change for part in result.kinds]),
    ):
        axes.bar(range(len(values)), values, color="#555555", width=0.8)
    bottom.set_xticks(*spaced_ticks([part.name for part in result.layers]))
    bottom.set_xlim(-0.6, len(result.layers) - 0.4)
    bottom.set_xlabel("decoder layer")
    bottom_kinds.set_xticks(range(len(result.kinds)), [part.name for part in result.kinds], rotation=45, ha="right")
    bottom_kinds.set_xlabel("kind of linear, in all layers")
    top.set(ylabel="perplexity added", title="a layer alone quantized")
    top_kinds.set(title="a kind alone quantized")
    bottom.set(ylabel="perplexity won back", title="a layer alone left in 16 bits")
    bottom_kinds.set(title="a kind alone left in 16 bits")
    for axes in (top, top_kinds, bottom, bottom_kinds):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(True, axis="y", linewidth=0.3)
        axes.set_axisbelow(True)
    name, rotations = Path(result.model).name, _rotations(result)
    figure.suptitle(
        f"{name} at {result.scheme}, rounded to nearest{' after ' if rotations else ''}{', '.join(rotations)}\n"
        f"perplexity {result.original:.2f}, everything quantized {result.everything.perplexity:.2f}"
    )
    return figure


def _mark_thirds(axes: Axes, values: Sequence[float], layers: int) -> None:
    """The mean of each third as a line, and its name above."""
    if layers < 3:
        return
    axes.margins(y=0.25)  # room for the names above the bars
    for name, indices in thirds(layers).items():
        mean = sum(values[index] for index in indices) / len(indices)
        ends = [indices.start - 0.5, indices.stop - 0.5]
        axes.plot(ends, [mean, mean], color=COLORS[name], linewidth=1.2, linestyle="--")
        style = {"color": COLORS[name], "fontsize": 8, "ha": "center", "va": "top"}
        axes.text(sum(ends) / 2, 0.97, f"{name} third\nmean {mean:.3g}", style, transform=axes.get_xaxis_transform())


def sensitivity_page(result: Sensitivity) -> str:
    """The page: what was measured, the picture, the tables."""
    everything = result.everything
    return render(
        "sensitivity",
        title=f"{Path(result.model).name} at {result.scheme}: what quantization hurts most",
        summary=[
            ("Model", result.model),
            ("Scheme", f"{result.scheme}, rounded to nearest"),
            ("Rotations", ", ".join(_rotations(result)) or "none"),
            ("Perplexity", f"{result.original:.4f} → {everything.perplexity:.4f} with everything quantized"),
            ("Output error, KL", f"{everything.output_error:.4g}, {everything.kl_divergence:.4g} nats"),
            ("Text", result.protocol),
        ],
        drawing=svg(sensitivity_figure(result), "Perplexity by layer and by kind of linear, alone and all but"),
        headings=_HEADINGS,
        layers=[_line(part) for part in result.layers],
        kinds=[_line(part) for part in result.kinds],
        run=[*result.versions.items(), *result.machine.items()],
    )


def _rotations(result: Sensitivity) -> list[str]:
    return [name for name in result.rotations or () if name != "seed"]


def _line(part: Part) -> tuple[str, ...]:
    cells = [part.name, f"{part.weights:,}"]
    for effect in (part.alone, part.all_but):
        cells += [f"{effect.perplexity:.3f}", f"{effect.perplexity_change:+.3f}"]
        cells += [f"{effect.output_error:.3g}", f"{effect.kl_divergence:.3g}"]
    return tuple(cells)
