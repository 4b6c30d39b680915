"""sliderquant sensitivity: which layers, and which kinds of linears, quantization hurts most."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption, rotation_names

if TYPE_CHECKING:
    from rich.table import Table

    from sliderquant.evaluation.sensitivity import Part

__all__ = ["command"]


@reported
def command(
    model: Annotated[str, typer.Argument(help="Original model: local folder, or id on the Hugging Face hub.")],
    scheme: Annotated[str, typer.Option(help="What to round to, as for quantize.")] = "W4A16-g128",
    text: Annotated[
        str, typer.Option(help="wikitext2, c4, topics, or a text or .jsonl file; FILE[:400000] takes a part.")
    ] = "wikitext2",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a block.", show_default="2048, or the model's maximum")
    ] = None,
    max_blocks: Annotated[int, typer.Option(help="Blocks of the text, from its beginning, at the most.")] = 32,
    per_channel_fallback: Annotated[
        bool, typer.Option("--per-channel-fallback", help="Layers that the group does not divide: per channel.")
    ] = False,
    memory_gb: Annotated[
        float, typer.Option(help="Memory for hidden states; more means fewer reads of the model.")
    ] = 8,
    rotate: Annotated[str, typer.Option(help="Rotations to fold in first, of R1,R2,R3,R4, or none.")] = "none",
    seed: Annotated[int, typer.Option(help="Of the signs of rotations.")] = 2,
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write into.", show_default="sensitivity-NAME")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a study that is there.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Quantize every layer and every kind of linear of MODEL alone, and all but it, and compare perplexities."""
    from rich.console import Console

    from sliderquant.cli.progress import shown_progress
    from sliderquant.evaluation.sensitivity import sensitivity
    from sliderquant.reports.sensitivity import check_output, write_sensitivity

    folder = Path(f"sensitivity-{Path(model).expanduser().resolve().name}") if output is None else output
    check_output(folder, overwrite)
    with shown_progress(quiet, verbose) as progress:
        result = sensitivity(
            model,
            scheme,
            text,
            seqlen=seqlen,
            max_blocks=max_blocks,
            device=device,
            per_channel_fallback=per_channel_fallback,
            memory_gb=memory_gb,
            rotate=rotation_names(rotate),
            seed=seed,
            progress=progress,
        )
    written = write_sensitivity(result, folder)
    console = Console()
    console.print(_table("layer", result.layers))
    console.print(_table("linears", result.kinds))
    everything = result.everything
    print(f"perplexity: {result.original:.4f} -> {everything.perplexity:.4f} with everything at {result.scheme}")
    print(f"output error {everything.output_error:.4g}, KL divergence {everything.kl_divergence:.4g} nats")
    print(f"protocol: {result.protocol}")
    for path in written:
        print(path)


def _table(name: str, parts: "Sequence[Part]") -> "Table":
    from rich.table import Table

    table = Table(title=f"perplexity by {name}: it alone quantized, and all but it")
    for heading in (name, "alone", "change", "output error", "KL", "all but", "change"):
        table.add_column(heading, justify="left" if heading == name else "right")
    for part in parts:
        alone, all_but = part.alone, part.all_but
        table.add_row(
            part.name,
            f"{alone.perplexity:.3f}",
            f"{alone.perplexity_change:+.3f}",
            f"{alone.output_error:.3g}",
            f"{alone.kl_divergence:.3g}",
            f"{all_but.perplexity:.3f}",
            f"{all_but.perplexity_change:+.3f}",
        )
    return table
