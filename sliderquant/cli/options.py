"""Options that commands share."""

from typing import Annotated

import typer

__all__ = ["DeviceOption", "QuietOption", "VerboseOption", "rotation_names"]

QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print results only, no progress.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="More detail, and a traceback on failure.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is CUDA where there is a GPU.")]


def rotation_names(rotate: str) -> list[str]:
    """The names in `--rotate R1,R2`; of `none`, none."""
    return [name.strip().upper() for name in rotate.split(",") if name.strip().lower() not in ("", "none")]
