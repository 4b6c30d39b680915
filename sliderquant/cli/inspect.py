"""sliderquant inspect: what is in a checkpoint, and whether it is what was written."""

from pathlib import Path
from typing import Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import QuietOption, VerboseOption

__all__ = ["command"]


@reported
def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a quantized checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its stored checksum.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a quantized checkpoint holds; with --verify, find any damage."""
    import json
    from dataclasses import asdict

    from sliderquant import checkpoint as checkpoints
    from sliderquant.cli.plan import print_bits, print_readers
    from sliderquant.errors import CheckpointError
    from sliderquant.schemes import attention_in_words

    # Damaged headers must not keep --verify from naming everything that is wrong.
    verified = checkpoints.verify(checkpoint) if verify else None
    if verified is not None and not verified.ok:
        if json_:
            print(json.dumps({"verification": asdict(verified)}, indent=2))
        else:
            for problem in verified.problems:
                print(problem)
        raise CheckpointError(f"{checkpoint}: {len(verified.problems)} problems found; copy the checkpoint again")
    found = checkpoints.describe(checkpoint)
    if json_:
        verification = {} if verified is None else {"verification": asdict(verified)}
        print(json.dumps({**asdict(found), **verification}, indent=2))
        return
    print(f"path        {found.path}")
    print(f"model       {found.architecture}, {found.weights / 1e6:.1f} million weights")
    print("scheme      " + ", ".join(f"{scheme} ({count} linears)" for scheme, count in found.schemes.items()))
    print("activations " + ", ".join(f"{what} ({count} linears)" for what, count in found.activations.items()))
    print("attention   " + attention_in_words(found.kv_bits))
    if found.clipped:
        print("clipping    of the ranges of activations, by learned factors")
    print("rotations   " + (", ".join(found.rotations) or "none"))
    print(f"method      {found.method or 'unknown'}, written by sliderquant {found.written_by or '(another tool)'}")
    print("format      " + ", ".join(f"{name} ({count} linears)" for name, count in found.stored_formats.items()))
    print_readers(found.readers)
    print("layers      " + ", ".join(f"{count} x {kind}" for kind, count in found.layers.items()))
    print(f"size        {found.total_bytes / 1e6:.2f} MB of tensors, {found.disk_bytes / 1e6:.2f} MB on disk")
    for part, size in sorted(found.bytes_by_part.items(), key=lambda item: -item[1]):
        print(f"  {part:<16} {size / 1e6:10.3f} MB")
    print(
        f"bits        {found.code_bits_per_weight:.3f} per quantized weight, {found.quantized_bits_per_weight:.3f} "
        f"with scales and zero-points, {found.bits_per_weight:.3f} over the whole model"
    )
    print_bits(found.bits_by_kind)
    for name, measured in found.perplexity.items():
        print(f"perplexity  {name}: {measured['value']:.4f} on {measured['dataset']}, blocks of {measured['seqlen']}")
    if verified is not None:
        if verified.has_checksums:
            print(f"verified    {verified.files} files and {verified.tensors} tensors are what was written")
        else:
            print("verified    structure only: another tool wrote this folder, without checksums")
