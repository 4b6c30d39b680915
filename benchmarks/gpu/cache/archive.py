"""Triton's compiled kernels in one file, for a machine where the time to compile them is short.

    found = manifest(file)
    if (why := mismatch(found)) is None:
        variables = environment(unpack(file))     # of the processes that launch

What Triton looks a kernel up by holds its own sources and library, the kernel's source with line numbers, the version
of ptxas, and what the kernel is specialized for, but no path: the file serves any machine with the same Triton. Only
the cache's folder must have the same path, since the files in it name each other by theirs.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from sliderquant_kernels.common.ptxas import own_ptxas

from .kernels import kernel_of, source_digests

__all__ = ["FOLDER", "CacheError", "Manifest", "changed", "describe", "environment", "manifest", "mismatch", "pack",
           "texts", "unpack"]  # fmt: skip

# Where the cache is made and used, unless told otherwise: every machine can have it.
FOLDER = Path("/tmp/tc")
_MANIFEST, _KERNELS, _ENTRIES = "manifest.json", "kernels.jsonl", "cache"
_AGAIN = "`make gpu-cache` builds it"


class CacheError(Exception):
    """A file or folder that cannot be used, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a file was built by, and for.

    Attributes:
        triton, torch, python: versions; of these only Triton's counts.
        triton_key: a digest of what of Triton its cache depends on.
        ptxas: what `ptxas --version` prints.
        arch: of the GPU, 90 for compute capability 9.0.
        folder: where the cache must lie.
        kernels: how many it holds.
        sources: of each kernel, by its full name, what of its source the cache depends on.
    """

    triton: str
    triton_key: str
    ptxas: str
    torch: str
    python: str
    arch: int
    folder: str
    kernels: int
    sources: dict[str, str]


def environment(folder: Path) -> dict[str, str]:
    """The variables of processes that use a cache, or build it.

    The ptxas is the one that `common.ptxas` of the kernels pins: here for processes too that import something else
    first.
    """
    variables = {"TRITON_CACHE_DIR": str(folder)}
    if (ptxas := own_ptxas()) is not None:
        variables["TRITON_PTXAS_PATH"] = str(ptxas)
    return variables


def describe(arch: int, folder: Path, kernels: Iterable[str]) -> Manifest:
    """The manifest of a cache that this interpreter has made.

    Args:
        kernels: what `kernels.text_of` wrote down of each.
    """
    import torch
    import triton

    kernels = list(kernels)
    return Manifest(triton.__version__, _triton_key(), _ptxas_version(), torch.__version__, platform.python_version(),
                    arch, str(folder), len(kernels), source_digests(kernels))  # fmt: skip


def manifest(file: Path) -> Manifest:
    """What a file holds, from its beginning.

    Raises:
        CacheError: it is not a file that `pack` has written.
    """
    found = json.loads(_member(file, _MANIFEST))
    names = {field.name for field in fields(Manifest)}
    if not isinstance(found, dict) or set(found) != names:
        raise CacheError(f"{file}: its manifest has other entries than {', '.join(sorted(names))}; {_AGAIN}")
    return Manifest(**found)


def texts(file: Path) -> list[str]:
    """What was written down of each kernel in a file. Raises as `manifest` does."""
    return _member(file, _KERNELS).splitlines()


def mismatch(found: Manifest) -> str | None:
    """Why this interpreter would find none of a file's kernels; None: it finds those that `changed` does not name."""
    try:
        import triton
    except ImportError:
        return "this Python has no triton: nothing is compiled, and no cache is read"
    if found.triton != triton.__version__:
        return f"built for triton {found.triton}, this is {triton.__version__}: kernels will be compiled anew"
    if found.triton_key != _triton_key():
        return (f"built by another build of triton {found.triton} than the one installed here: kernels will be "
                "compiled anew")  # fmt: skip
    if found.ptxas != _ptxas_version():
        return (f"built with ptxas {_release(found.ptxas)}, triton has {_release(_ptxas_version())} here: kernels will "
                "be compiled anew")  # fmt: skip
    arch = _arch()
    if arch is not None and arch != found.arch:
        return f"built for sm_{found.arch}, this GPU is sm_{arch}: kernels will be compiled anew"
    return None


def changed(found: Manifest) -> list[str]:
    """Names of kernels whose source, or its place in its file, is not what a file was built from."""
    names = []
    for name, digest in found.sources.items():
        module, _, function = name.rpartition(".")
        try:
            same = kernel_of(module, function).cache_key == digest
        except (ImportError, AttributeError):
            same = False
        if not same:
            names.append(name)
    return names


def pack(file: Path, found: Manifest, kernels: list[str], folders: Iterable[Path]) -> int:
    """Write a file, whole or not at all, and return its bytes.

    Args:
        kernels: what was written down of each.
        folders: of the kernels in Triton's cache, all of them inside `found.folder`.
    """
    text = json.dumps(asdict(found), indent=1)
    # Kernels of one name next to each other, small before large: they are alike, and what repeats costs little.
    entries = [(path.name, path.stat().st_size, path, folder) for folder in folders for path in folder.iterdir()
               if path.is_file() and not _is_left_out(path.name)]  # fmt: skip
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with tarfile.open(part, "w:xz", preset=9) as tar:
            _add(tar, _MANIFEST, text.encode())
            _add(tar, _KERNELS, "\n".join(kernels).encode())
            for name, _, path, folder in sorted(entries, key=lambda entry: (entry[0].startswith("_"), *entry[:3])):
                _add(tar, f"{_ENTRIES}/{folder.name}/{name}", _content(path))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file.stat().st_size


def unpack(file: Path, anew: bool = False) -> Path:
    """Put the cache of a file where it must lie, whole or not at all, and return that folder.

    What lies there from the same file stays, with what was compiled since; what lies there from another goes.

    Args:
        anew: even what lies there from the same file goes.

    Raises:
        CacheError: the file is not whole, or another's, or the folder holds what no such file brought.
    """
    found = manifest(file)
    folder = Path(found.folder)
    if not folder.is_absolute():
        raise CacheError(f"{file}: its folder is {found.folder!r}, which is no absolute path; {_AGAIN}")
    note = folder / _MANIFEST
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not note.is_file())):
        raise CacheError(f"{folder}: the cache must lie here, but something else does; move it away")
    if note.is_file() and not anew and note.read_text(encoding="utf-8") == json.dumps(asdict(found), indent=1):
        return folder
    if not hasattr(tarfile, "data_filter"):
        raise CacheError(f"Python {platform.python_version()} cannot unpack safely; 3.10.12, 3.11.4 or newer can")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        try:
            with tarfile.open(file, "r:xz") as tar:
                tar.extractall(made, filter="data")  # refuses what would lie elsewhere
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
            raise CacheError(f"{file}: {error}; it is not whole or not ours: {_AGAIN}") from error
        fresh = Path(made) / _ENTRIES
        if not fresh.is_dir():
            raise CacheError(f"{file}: it holds no folder {_ENTRIES}; {_AGAIN}")
        shutil.copyfile(Path(made) / _MANIFEST, fresh / _MANIFEST)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
    return folder


def claim(folder: Path) -> None:
    """Make a folder for building a cache, which `unpack` takes for its own.

    Raises:
        CacheError: it holds what is not ours.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MANIFEST).is_file():
        raise CacheError(f"{folder}: something else lies here; move it away, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).write_text("{}", encoding="utf-8")


def _content(path: Path) -> bytes:
    """Of a file in Triton's cache; a list of files without the source, which is left out: newer releases find nothing
    where one of the list is missing."""
    if not path.name.startswith("__grp__"):
        return path.read_bytes()
    listed = json.loads(path.read_bytes())["child_paths"]
    return json.dumps({"child_paths": {name: at for name, at in listed.items() if not _is_left_out(name)}}).encode()


def _is_left_out(name: str) -> bool:
    return name.endswith(".source") or name == "lock"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _member(file: Path, name: str) -> str:
    try:
        with tarfile.open(file, "r:xz") as tar:
            for member in tar:  # the first ones: the rest is not read
                if member.name == name and member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None
                    return content.read().decode()
    except FileNotFoundError:
        raise CacheError(f"{file}: there is no such file; {_AGAIN}") from None
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise CacheError(f"{file}: {error}; it is not whole or no archive: {_AGAIN}") from error
    raise CacheError(f"{file}: it holds no {name}: it is not a cache of kernels; {_AGAIN}")


@lru_cache
def _triton_key() -> str:
    """A digest of what Triton calls its key; releases have it in one module or the other."""
    from triton.compiler import compiler
    from triton.runtime import cache

    key = getattr(cache, "triton_key", None) or compiler.triton_key
    return hashlib.sha256(key().encode()).hexdigest()


@lru_cache
def _ptxas_version() -> str:
    path = own_ptxas()
    return "" if path is None else subprocess.check_output([path, "--version"], text=True)


def _release(version: str) -> str:
    """The number in what `ptxas --version` prints."""
    return next((word.strip(",") for word in version.split() if word[:1] == "V" and word[1:2].isdigit()), "?")


def _arch() -> int | None:
    """Of the GPU here; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
