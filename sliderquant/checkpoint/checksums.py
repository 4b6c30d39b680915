"""`sliderquant-checksums.json`: SHA-256 of every file of a checkpoint, and of every tensor to name what is damaged.

    {"algorithm": "sha256", "files": {path: digest}, "tensors": {path: {tensor: digest}}, "self": digest}

`self` is the digest of the document without it, and the text is canonical JSON: damage to this file shows as well.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

__all__ = ["CHECKSUMS_NAME", "check_files", "file_digest", "tensor_digest", "write_checksums"]

CHECKSUMS_NAME = "sliderquant-checksums.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor as safetensors stores them; the digest of the file covers shape and dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(uint8).numpy().data).hexdigest()


def write_checksums(folder: Path, tensors: Mapping[str, Mapping[str, str]]) -> None:
    """Write `sliderquant-checksums.json` for every file that is in `folder` now.

    Args:
        tensors: by file name, the digest of each of its tensors.
    """
    files = {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS_NAME
    }
    document = {"algorithm": "sha256", "files": files, "tensors": {name: dict(of) for name, of in tensors.items()}}
    document["self"] = _self_digest(document)
    (folder / CHECKSUMS_NAME).write_text(_canonical(document), encoding="utf-8")


def check_files(folder: Path) -> tuple[list[str], int, int]:
    """Recompute the checksums of a folder that has them.

    Returns:
        The problems, one line each, naming the file and, where it can be told, the tensor; the number of files and the
        number of tensors that are listed.
    """
    text = (folder / CHECKSUMS_NAME).read_bytes()
    try:
        document: dict[str, Any] = json.loads(text)
        files, tensors, expected = document["files"], document["tensors"], document.pop("self")
        intact = _self_digest(document) == expected and _canonical({**document, "self": expected}).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        # Nothing that this file says can be relied on: do not blame other files for it.
        return [f"{CHECKSUMS_NAME}: damaged: it does not match its own checksum"], 0, 0
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif file_digest(path) != digest:
            problems += _locate(path, name, tensors.get(name))
    problems += [
        f"{path.name}: not in {CHECKSUMS_NAME}: it was added later"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in files
    ]
    return problems, len(files), sum(map(len, tensors.values()))


def _locate(path: Path, name: str, tensors: Mapping[str, str] | None) -> list[str]:
    if tensors is None:
        return [f"{name}: changed or damaged: its SHA-256 is not the recorded one"]
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            damaged = [
                key for key in tensors if key not in present or tensor_digest(file.get_tensor(key)) != tensors[key]
            ]
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        return [f"{name}: damaged header, or truncated: {error}"]
    if not damaged:
        return [f"{name}: damaged header: its tensors are intact, but its SHA-256 is not the recorded one"]
    return [f"{name}: tensor {key} is damaged: its SHA-256 is not the recorded one" for key in damaged]


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _self_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(document).encode()).hexdigest()
