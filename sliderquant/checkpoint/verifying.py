"""Is a checkpoint on disk what was written?"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sliderquant.checkpoint.checksums import CHECKSUMS_NAME, check_files
from sliderquant.checkpoint.reader import read_checkpoint
from sliderquant.checkpoint.skeleton import build_skeleton, check_against_model, plain_config
from sliderquant.errors import CheckpointError, InputError

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        problems: one line each, naming the file and, where it can be told, the tensor; empty: all is well.
        files, tensors: how many were compared with their recorded SHA-256.
        has_checksums: False: another tool wrote the folder, and only its structure was checked.
    """

    problems: tuple[str, ...]
    files: int
    tensors: int
    has_checksums: bool

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path) -> Verification:
    """Check a checkpoint folder: the SHA-256 of every file and tensor, and that headers, configuration and model agree.

    Raises:
        InputError: `path` is not a folder, or its model is not quantized.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a quantized checkpoint")
    has_checksums = (folder / CHECKSUMS_NAME).is_file()
    problems, files, tensors = check_files(folder) if has_checksums else ([], 0, 0)
    try:
        checkpoint = read_checkpoint(folder)
        if checkpoint.format_version is not None and not has_checksums:
            problems.append(f"{CHECKSUMS_NAME}: missing: the folder is incomplete, or was saved again by another tool")
        where = str(folder)
        model = build_skeleton(plain_config(checkpoint.config, where), where, torch.float32)
        check_against_model(checkpoint, model)
    except InputError:
        # With damaged files, "not a quantized model" is a consequence.
        if not problems:
            raise
    except CheckpointError as error:
        problems.append(str(error))
    return Verification(tuple(problems), files, tensors, has_checksums)
