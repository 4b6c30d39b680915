"""What `bench` measured as files: JSON and a picture."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sliderquant.errors import InputError
from sliderquant.evaluation.bench import Bench, Metric
from sliderquant.reports.files import check_free, write_files

__all__ = ["bench_figure", "check_output", "write_bench"]

_NAMES = ("bench.json", "bench.png")
_SUBJECT_COLORS = {"original": "#999999", "quantized": "#0072B2"}


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises InputError when the files cannot be written into `folder`, or would replace others."""
    check_free(folder, _NAMES, overwrite)


def write_bench(result: Bench, folder: Path) -> list[Path]:
    """Write bench.json and bench.png into `folder`, each under another name first; returns their paths."""
    text = json.dumps(result.as_dict(), indent=1) + "\n"
    return write_files(
        folder,
        {
            "bench.json": lambda path: path.write_text(text, encoding="utf-8"),
            "bench.png": lambda path: bench_figure(result).savefig(path, dpi=130, format="png"),
        },
    )


def bench_figure(result: Bench) -> Figure:
    """Loading, time to first token, decoding, and memory, each subject beside the other, with the ratios above."""
    groups = {
        "load, s\n(ratio: times as fast)": [metric for metric in result.metrics if metric.name == "load"],
        "first token after a prompt, s\n(ratio: times as fast)": [
            metric for metric in result.metrics if metric.name.startswith("first token")
        ],
        "decoding, tokens/s\n(ratio: times as fast)": [
            metric for metric in result.metrics if metric.name.startswith("decode")
        ],
        "memory, MB\n(ratio: share of the original's)": [metric for metric in result.metrics if metric.unit == "MB"],
    }
    shown = {title: metrics for title, metrics in groups.items() if metrics}
    if not shown:
        raise InputError("nothing to draw: expected prompts, batches or memory among the measurements")
    widths = [max(len(metrics), 1.5) for metrics in shown.values()]
    figure = Figure(figsize=(max(1.4 * sum(widths), 6), 4), layout="constrained")
    for axes, (title, metrics) in zip(
        figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0], shown.items(), strict=True
    ):
        _bars(axes, title, metrics)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    names = " against ".join(Path(subject).name for subject in result.subjects.values())
    figure.suptitle(f"{names} on {result.machine['device']}")
    return figure


def _bars(axes: Axes, title: str, metrics: list[Metric]) -> None:
    subjects = [name for name in _SUBJECT_COLORS if name in metrics[0].values]
    width = 0.8 / len(subjects)
    for place, subject in enumerate(subjects):
        heights = [metric.values[subject] for metric in metrics]
        left = [index - 0.4 + width * (place + 0.5) for index in range(len(metrics))]
        axes.bar(left, heights, width, color=_SUBJECT_COLORS[subject], label=subject)
    top = max(value for metric in metrics for value in metric.values.values())
    for index, metric in enumerate(metrics):
        if metric.ratio is not None:
            highest = max(metric.values.values())
            axes.text(index, highest + 0.02 * top, f"{metric.ratio:.2f}x", ha="center", va="bottom", fontsize=9)
    labels = [metric.name.split(", ")[-1].replace(" memory", "").replace("memory while ", "") for metric in metrics]
    axes.set_xticks(range(len(metrics)), labels, rotation=20 if any(len(label) > 6 for label in labels) else 0)
    if "prompt" in title:
        axes.set_xlabel("tokens of the prompt", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.grid(True, axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
