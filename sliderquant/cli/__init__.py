"""The command line: one file per command."""

import sys

import typer

from sliderquant._version import __version__
from sliderquant.cli import bench, demo, evaluate, generate, inspect, quantize, sensitivity

__all__ = ["app", "main"]

app = typer.Typer(
    name="sliderquant",
    help="Quantize language models to 2, 3, 4 or 8 bits with SliderQuant, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize", epilog=quantize.METHOD_LIST)(quantize.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("bench")(bench.command)
app.command("inspect")(inspect.command)
app.command("sensitivity")(sensitivity.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sliderquant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point of the `sliderquant` command."""
    sys.exit(app())
