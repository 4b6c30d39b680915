"""sliderquant bench: speed and memory of a checkpoint along the way that a user takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption

if TYPE_CHECKING:
    from rich.table import Table

    from sliderquant.evaluation.bench import Bench

__all__ = ["command"]


@reported
def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a quantized checkpoint.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model to compare with: the original's folder or hub id.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt lengths whose time to first token is measured.")] = (
        "16,128,512,2048"
    ),
    batches: Annotated[str, typer.Option(help="Batch sizes at which decoding is measured.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each sequence decodes.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each kind in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often both models are loaded anew.")] = 2,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16, of both models.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write into.", show_default="bench-NAME")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace measurements that are there.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure loading, memory, time to first token and decoding of OUT, with --against beside another model."""
    import json

    from rich.console import Console

    from sliderquant.cli.progress import shown_progress
    from sliderquant.evaluation.bench import DEFINITIONS, bench
    from sliderquant.reports.bench import check_output, write_bench

    folder = Path(f"bench-{checkpoint.expanduser().resolve().name}") if output is None else output
    check_output(folder, overwrite)
    with shown_progress(quiet, verbose) as progress:
        result = bench(
            checkpoint,
            against,
            device=device,
            dtype=dtype,
            prompts=_numbers("--prompts", prompts),
            batches=_numbers("--batches", batches),
            new_tokens=new_tokens,
            repeats=repeats,
            rounds=rounds,
            progress=progress,
        )
    written = write_bench(result, folder)
    if json_:
        print(json.dumps(result.as_dict(), indent=2))
        return
    Console().print(_table(result))
    for line in DEFINITIONS:
        print(line)
    for path in written:
        print(path)


def _numbers(option: str, text: str) -> list[int]:
    from sliderquant.errors import InputError

    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"{option} {text!r}: expected whole numbers with commas between them, such as 16,128")
    return [int(word) for word in words]


def _table(result: "Bench") -> "Table":
    from rich.table import Table

    settings = result.settings
    order = [name for name in ("original", "quantized") if name in result.subjects]
    dtypes = ", ".join(f"{name} {settings['dtypes'][name]}" for name in order)
    table = Table(title=f"{result.machine['device']}; {dtypes}")
    table.add_column("")
    for name in order:
        table.add_column(name, justify="right")
    if len(order) > 1:
        table.add_column("ratio", justify="right")
        table.add_column("quartiles", justify="right")
    for metric in result.metrics:
        row = [f"{metric.name}, {metric.unit}"]
        row += [_figure(metric.values[name]) for name in order]
        if metric.ratio is not None and metric.spread is not None:
            row += [f"{metric.ratio:.2f}", f"{metric.spread[0]:.2f} to {metric.spread[1]:.2f}"]
        table.add_row(*row)
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
