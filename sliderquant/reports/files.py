"""Files of a report in a folder of the user's choice."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sliderquant.errors import InputError

__all__ = ["check_free", "write_files"]


def check_free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raises InputError when files of these names cannot be written into `folder`, or would replace others."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder}: is a file, expected a folder")
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise InputError(f"output {folder}: holds {', '.join(present)}; choose another folder, or use --overwrite")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {folder}: {parent} is not a folder that can be written to; choose another")


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write each file under another name first, so that none is ever there in part; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
        partial = folder / f".{name}.partial"
        try:
            write(partial)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return [folder / name for name in writers]
