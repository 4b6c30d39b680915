"""sliderquant quantize: a model in, a quantized checkpoint out."""

import shlex
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption, rotation_names
from sliderquant.planning.methods import METHODS, parse_overrides

__all__ = ["METHOD_LIST", "command"]

_WIDTH = max(map(len, METHODS)) + 4
# \b: the lines stay as they are.
METHOD_LIST = "\b\nMethods:\n" + "\n".join(
    textwrap.fill(method.summary, 78, initial_indent=f"  {name:{_WIDTH - 2}}", subsequent_indent=" " * _WIDTH)
    for name, method in METHODS.items()
)


@reported
def command(
    model: Annotated[str, typer.Argument(help="Local folder, or id on the Hugging Face hub.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the checkpoint to write.")] = None,
    scheme: Annotated[
        str, typer.Option(help="W{2,3,4,8}A16 or W{2,4,8}A{4,8}[KV4|KV8][-g32|-g64|-g128][-sym][-act-sym].")
    ] = "W4A16-g128",
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}: see below.")] = "sliderquant",
    calibration: Annotated[
        str,
        typer.Option(
            help="wikitext2, c4, stdlib, topics, or a file (text, JSON Lines, ...); FILE[:1000000] takes a part."
        ),
    ] = "wikitext2",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a sample.", show_default="2048, or the model's maximum")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of crops, order and start values.")] = 2,
    device: DeviceOption = "auto",
    effort: Annotated[
        str | None,
        typer.Option(help="Of sliderquant: light, default or best; minutes for accuracy.", show_default="default"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, for example epochs=10 or windows.shallow=4.")
    ] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(help="Measure perplexity on this text before and after; names and files as for --calibration."),
    ] = None,
    per_channel_fallback: Annotated[
        bool, typer.Option("--per-channel-fallback", help="Layers that the group does not divide: per channel.")
    ] = False,
    average_bits: Annotated[
        float | None,
        typer.Option(help="Bits chosen for every linear, the scheme's or more, with so many for a weight on average."),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(help="Rotations to fold in first, of R1,R2,R3,R4, or none.", show_default="the method's"),
    ] = None,
    rotation_seeds: Annotated[
        int,
        typer.Option(
            help="Seeds of rotations to try, from --seed on; that with which rounding to nearest loses least is used."
        ),
    ] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Quantize MODEL and write a checkpoint; --dry-run says who reads it, and who runs it."""
    from sliderquant.errors import InputError

    if output is None and not dry_run:
        raise InputError("missing option -o OUT: the folder of the checkpoint to write")
    from sliderquant import pipeline
    from sliderquant.cli.plan import print_plan
    from sliderquant.cli.progress import shown_progress

    arguments: dict[str, Any] = {
        "scheme": scheme,
        "method": method,
        "settings": parse_overrides(config, set_ or []),
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "effort": effort,
        "perplexity_on": perplexity,
        "per_channel_fallback": per_channel_fallback,
        "average_bits": average_bits,
        "rotate": None if rotate is None else rotation_names(rotate),
        "rotation_seeds": rotation_seeds,
        "overwrite": overwrite,
    }
    if dry_run:
        with shown_progress(quiet, verbose) as progress:
            settled = pipeline.plan(model, output=output, progress=progress, **arguments)
        print_plan(settled, device, calibration)
        return
    assert output is not None
    with shown_progress(quiet, verbose) as progress:
        result = pipeline.quantize(
            model, output, progress=progress, command=shlex.join(["sliderquant", *sys.argv[1:]]), **arguments
        )
    report = result.report
    before, after = report["source_bytes"], report["disk_bytes"]
    print(
        f"{result.path}: {result.plan.scheme_in_words} by {report['method']}, {after / 1e6:.1f} MB from "
        f"{before / 1e6:.1f} MB, "
        f"{report['seconds']['total']:.0f} s"
    )
    if result.perplexity is not None:
        print(f"perplexity: {result.perplexity['before']:.4f} -> {result.perplexity['after']:.4f}")
