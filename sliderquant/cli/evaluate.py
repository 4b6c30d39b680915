"""sliderquant eval: perplexity of a checkpoint or of an original model."""

from typing import Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption

__all__ = ["command"]


@reported
def command(
    model: Annotated[str, typer.Argument(help="Quantized checkpoint, or original model: folder or hub id.")],
    perplexity: Annotated[
        str,
        typer.Option(
            help="wikitext2, c4, stdlib, topics, or a file (text, JSON Lines, ...); FILE[:400000] takes a part."
        ),
    ] = "wikitext2",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a block.", show_default="2048, or the model's maximum")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the arithmetic: auto, float32, float16 or bfloat16; auto is float32 on a CPU.")
    ] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the result and its protocol as JSON.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure the perplexity of MODEL."""
    import json

    from sliderquant.cli.progress import shown_progress
    from sliderquant.evaluation.models import evaluate

    with shown_progress(quiet, verbose) as progress:
        result = evaluate(model, perplexity, seqlen=seqlen, device=device, dtype=dtype, progress=progress)
    if json_:
        print(json.dumps(result.as_dict(), indent=2))
        return
    print(f"perplexity: {result.value:.4f}")
    print(f"protocol: {result.protocol}")
