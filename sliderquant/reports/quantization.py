"""sliderquant-report.html: what a quantization run did, for people; made of sliderquant-report.json alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sliderquant.reports.layer_errors import error_figure, error_table, layer_warnings, scale_table
from sliderquant.reports.page import COLORS, render, spaced_ticks, svg

__all__ = ["loss_figure", "quantization_page", "schedule_figure", "warnings_of"]

_STEPS = {
    "evaluate_before": "perplexity before",
    "choose_rotation": "choosing the seed of rotations",
    "choose_bits": "choosing bits",
    "refine": "refining",
    "write": "writing",
    "evaluate_after": "perplexity after",
    "total": "total",
}


def quantization_page(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: the contents of sliderquant-report.json.
    """
    windows, training, by_kind = report["windows"], report["training"], report["bits_by_kind"]
    errors = report["layer_errors"]
    return render(
        "quantization",
        title=f"{Path(report['model']).name}: {report['scheme_in_words']} by {report['method']}",
        method=report["method"],
        summary=_summary(report),
        warnings=[*report.get("warnings", ()), *warnings_of(training), *layer_warnings(errors)],
        perplexity=_perplexity(report["perplexity"]),
        schedule=svg(schedule_figure(windows, report["layers"]), "Windows over the layers") if training else None,
        losses=svg(loss_figure(training), "Losses of every window") if training else None,
        stages=[_stage(entry) for entry in training],
        errors=svg(error_figure(errors), "Errors of every layer and linear") if errors else None,
        error_table=error_table(errors),
        scale_table=scale_table(errors),
        seeds=_seeds(report["rotation_choice"]),
        quantized=[(*name.split(": ", 1), count) for name, count in report["quantized"].items()],
        bits=list(by_kind.items()) if len(set("".join(by_kind.values()))) > 1 else [],
        kept=", ".join([*report["kept"], "norms and biases"]),
        settings=_settings(report),
        run=[
            *((f"{_STEPS.get(name, name)}, s", f"{seconds:.1f}") for name, seconds in report["seconds"].items()),
            *report["versions"].items(),
        ],
    )


def warnings_of(training: Iterable[Mapping[str, Any]]) -> list[str]:
    """The windows that were started again, or left as they were."""
    found = []
    for entry in training:
        what = f"Window {_layers(entry['layers'])}, {entry['fraction']:.0%} of the channels"
        if not entry["converged"]:
            found.append(f"{what}: no finite loss in {entry['retries'] + 1} attempts; it was left as it was.")
        elif entry["retries"]:
            found.append(
                f"{what}: started again {entry['retries']} times after a loss that was not finite, with "
                f"{entry['rate_scale']:g} of the learning rates."
            )
    return found


def schedule_figure(windows: list[Mapping[str, Any]], layers: int) -> Figure:
    """A row for each window, from the top, over the layers that it refines; colored by phase."""
    figure = Figure(figsize=(8.5, min(1.2 + 0.2 * len(windows), 11)), layout="constrained")
    axes = figure.subplots()
    for row, window in enumerate(windows):
        first, count = window["layers"][0], len(window["layers"])
        axes.broken_barh([(first - 0.5, count)], (row - 0.4, 0.8), color=_color(window["phase"]), edgecolor="white")
    axes.set(xlabel="decoder layer", ylabel="window, in order", xlim=(-0.5, layers - 0.5))
    axes.set_ylim(len(windows) - 0.5, -0.5)
    axes.set_yticks(*spaced_ticks([str(number + 1) for number in range(len(windows))]))
    axes.set_xticks(*spaced_ticks([str(layer) for layer in range(layers)]))
    axes.grid(True, axis="x", linewidth=0.3)
    _phase_legend(figure, (window["phase"] for window in windows))
    return figure


def loss_figure(training: list[Mapping[str, Any]]) -> Figure:
    """Two panels for each sweep and share of the channels: the losses, and the losses over the first of their window.
    In a panel the windows stand next to each other, in each window its epochs."""
    stages: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    for entry in training:
        stages.setdefault((entry["sweep"], entry["fraction"]), []).append(entry)
    figure = Figure(figsize=(8.5, 4.2 * len(stages) + 0.8), layout="constrained")
    panels = figure.subplots(2 * len(stages), squeeze=False).flatten()
    for absolute, relative, ((_, fraction), entries) in zip(panels[::2], panels[1::2], stages.items(), strict=True):
        for place, entry in enumerate(entries):
            losses, style = entry["losses"], {"color": _color(entry["phase"]), "marker": ".", "markersize": 4}
            xs = [place + 0.1 + 0.8 * (epoch + 0.5) / len(losses) for epoch in range(len(losses))]
            absolute.plot(xs, losses, **style)
            if losses[0] > 0:
                relative.plot(xs, [loss / losses[0] for loss in losses], **style)
        # A loss of 0, where nothing was rounded away, has no place on a logarithmic axis.
        if all(loss > 0 for entry in entries for loss in entry["losses"]):
            absolute.set_yscale("log")
        absolute.set(ylabel="mean squared error", title=f"{fraction:.0%} of the input channels quantized")
        relative.set(ylabel="over the first epoch's")
        for axes in (absolute, relative):
            _label_windows(axes, [_layers(entry["layers"]) for entry in entries])
    panels[-1].set_xlabel("window (its layers), in order; inside each: epochs")
    _phase_legend(figure, (entry["phase"] for entry in training))
    return figure


def _label_windows(axes: Axes, names: list[str]) -> None:
    places, labels = spaced_ticks(names)
    axes.set_xlim(0, len(names))
    axes.set_xticks([place + 0.5 for place in places], labels, rotation=45 if len(labels) > 12 else 0)
    axes.set_xticks(range(len(names)), minor=True)
    axes.grid(True, axis="x", which="minor", linewidth=0.3)
    axes.grid(True, axis="y", linewidth=0.3)
    axes.tick_params(axis="x", which="both", length=0)


def _color(phase: str) -> str:
    return COLORS.get(phase, "#555555")


def _phase_legend(figure: Figure, phases: Iterable[str]) -> None:
    names = list(dict.fromkeys(phases))
    handles = [Patch(color=_color(name), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(names), frameon=False)


def _layers(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"  # noqa: RUF001


def _summary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = report["source_bytes"], report["disk_bytes"]
    memory = ", ".join(f"{size / 1e9:.2f} GB ({where})" for where, size in report["peak_memory_bytes"].items())
    pairs = [
        ("Model", f"{report['model']}, {report['layers']} layers"),
        ("Scheme", report["scheme_in_words"]),
        ("Method", report["method"]),
        ("Rotations", _rotations(report) if report["rotations"] else "none"),
        ("Size", f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB, {after / before:.3f} of it"),
        (
            "Bits per quantized weight",
            f"{report['quantized_bits_per_weight']:.3f}, with scales and zero-points; without "
            f"{report['code_bits_per_weight']:.3f}",
        ),
        ("Time", f"{report['seconds']['total']:.1f} s"),
        ("Peak memory", memory),
        ("Machine", ", ".join(report["machine"].values())),
        ("Date", report["date"]),
    ]
    measured = report["perplexity"]
    if measured:
        pairs.insert(4, ("Perplexity", f"{measured['before']['value']:.4f} → {measured['after']['value']:.4f}"))
    return pairs


def _rotations(report: Mapping[str, Any]) -> str:
    rotations, choice = report["rotations"], report["rotation_choice"]
    tried = f", of {len(choice['trials'])} tried" if choice else ""
    return f"{', '.join(name for name in rotations if name != 'seed')}; seed {rotations['seed']}{tried}"


def _seeds(choice: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    if choice is None:
        return []
    return [
        (
            trial["seed"],
            *(
                "not finite" if figure is None else f"{figure:.5g}"
                for figure in (trial["output_error"], trial["kl_divergence"], trial["perplexity"])
            ),
            "used" if trial["seed"] == choice["seed"] else "",
        )
        for trial in choice["trials"]
    ]


def _perplexity(measured: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    if not measured:
        return []
    reference = measured["before"]["value"]
    lines = []
    for name, title in (("before", "original"), ("after", "quantized")):
        found = measured[name]
        change = "" if name == "before" else f"{found['value'] / reference - 1:+.2%}"
        arithmetic = f"{found['dtype']} on {found['device']}"
        lines.append(
            (title, f"{found['value']:.4f}", change, found["dataset"], found["blocks"], found["seqlen"], arithmetic)
        )
    return lines


def _stage(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    losses = entry["losses"]
    ratio = f"{losses[-1] / losses[0]:.3f}" if losses[0] > 0 else "–"  # noqa: RUF001
    return (
        _layers(entry["layers"]),
        entry["phase"],
        f"{entry['fraction']:.0%}",
        len(losses),
        f"{losses[0]:.4g}",
        f"{losses[-1]:.4g}",
        ratio,
        f"{entry['seconds']:.1f}",
        f"{entry['tokens_per_second']:.0f}",
        entry["retries"],
    )


def _settings(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = [("seed", report["seed"])]
    if report["calibration"] is not None:
        pairs += [
            ("calibration", report["calibration"]),
            ("samples", report["samples"]),
            ("seqlen", report["seqlen"]),
            ("matrix products in", report["matmul"] or "float32"),
        ]
    return pairs + _flat(report["settings"] or {})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs
