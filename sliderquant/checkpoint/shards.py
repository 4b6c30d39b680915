"""Tensors to safetensors files, streamed: what is in memory is at most one file."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sliderquant.checkpoint.checksums import tensor_digest
from sliderquant.errors import CheckpointError

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "ShardWriter", "disk_full", "free_bytes"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_GIGABYTE = 1e9


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# The last is the limit on the size of a file: of the shell, or of the file system.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_full(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk into a CheckpointError that says how much is needed.

    Args:
        path: what is being written.
        needed: bytes that the whole checkpoint takes, as far as is known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports an operating system error as text.
        code = getattr(error, "errno", None)
        full = code in _FULL or any(f"os error {number}" in str(error) for number in _FULL)
        if not full:
            raise
        raise CheckpointError(
            f"disk full while writing {path}: needs about {needed / _GIGABYTE:.3g} GB, free "
            f"{free_bytes(path.parent) / _GIGABYTE:.3g} GB; free some space or choose another folder"
        ) from error


class ShardWriter:
    """Collects tensors and writes a file whenever `max_shard_bytes` would be passed.

    Attributes:
        total_bytes: of all tensors so far.
        shapes: of all tensors so far, by name.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._digests: list[dict[str, str]] = []
        self.total_bytes = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to the CPU and write it, now or with the ones that follow.

        Raises:
            CheckpointError: there is a tensor of this name already, or the disk is full.
        """
        if name in self.shapes:
            raise CheckpointError(f"tensor {name} was written twice: every tensor of a checkpoint has one value")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._flush()
        # A copy of its own: safetensors refuses tensors that share memory, and the caller may go on to change it.
        # With strides of its own: those of a dimension of size 1 can be anything, and safetensors refuses them.
        copied = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._pending[name] = copied.copy_(tensor.detach())
        self._pending_bytes += size
        self.total_bytes += size
        self.shapes[name] = tuple(tensor.shape)

    def finish(self) -> dict[str, dict[str, str]]:
        """Write what is left, give the files their final names, and write the index if there are two files or more.

        Returns:
            By file name, the digest of each of its tensors.
        """
        if self._pending or not self._digests:
            self._flush()
        count = len(self._digests)
        names = [WEIGHTS_NAME]
        if count > 1:
            names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for index, name in enumerate(names):
            os.replace(self._partial(index), self._folder / name)
        by_file = dict(zip(names, self._digests, strict=True))
        if count > 1:
            weight_map = {tensor: name for name, digests in by_file.items() for tensor in digests}
            index_json = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index_json, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX_NAME).write_text(text, encoding="utf-8")
        return by_file

    def _partial(self, index: int) -> Path:
        return self._folder / f"shard-{index:05d}"

    def _flush(self) -> None:
        path = self._partial(len(self._digests))
        with disk_full(path, self.total_bytes):
            path.touch()
            mode = stat.S_IMODE(path.stat().st_mode)
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors makes files that only their owner can read
        self._digests.append({name: tensor_digest(tensor) for name, tensor in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0
