"""Build the compiled kernels of a GPU that is not here into one file, or check that such a file serves this Python.

`build` runs the GPU tests, the quick benchmark, the tuner's candidates and decoding up to where Triton would compile,
compiles what they would launch, packs it, and checks the file. It needs no GPU, but the Triton of the machine with one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from . import archive as cache
from .archive import CacheError
from .device import ARCH
from .kernels import Missing, compile_all, compile_text, only_cached
from .record import SOURCES, record

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "gpu-cache.tar.xz"
# What a machine takes along with a working tree: a larger file has to go another way.
MOST_BYTES = 64 << 20
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|check")
    build = actions.add_parser("build", help="record, compile, pack, check")
    build.add_argument("--out", type=Path, default=FILE, help=f"the file (default: {FILE.name} in the project)")
    folder_help = f"where the cache is made and will lie (default: {cache.FOLDER})"
    build.add_argument("--folder", type=Path, default=cache.FOLDER, help=folder_help)
    build.add_argument("--source", choices=SOURCES, nargs="+", default=list(SOURCES), help="only these")
    build.add_argument("--processes", type=int, default=_cores(), help="that compile (default: one for every core)")
    check = actions.add_parser("check", help="unpack a file and look every kernel up")
    check.add_argument("file", type=Path, nargs="?", default=FILE)


def run(arguments: argparse.Namespace) -> None:
    try:
        if arguments.action == "build":
            build(arguments.out, arguments.folder, arguments.source, arguments.processes)
            arguments.file = arguments.out
        passed = check(arguments.file)
    except (CacheError, RuntimeError) as error:
        raise SystemExit(f"gpu-cache: {error}") from error
    if not passed:
        raise SystemExit(1)


def build(out: Path, folder: Path, sources: list[str], processes: int) -> None:
    """Write the file of everything that the sources would launch.

    What an earlier build has compiled into the folder, and still holds, is not compiled again.

    Raises:
        CacheError: the folder holds what is not ours.
        RuntimeError: a source recorded nothing, or nothing could be compiled.
    """
    folder = folder.absolute()
    cache.claim(folder)
    # Binaries alone: what led to them, Triton needs only to compile.
    os.environ.update(cache.environment(folder), TRITON_STORE_BINARY_ONLY="1")
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.monotonic()
    with TemporaryDirectory() as made:
        for source in sources:
            record(source, Path(made), processes)
            _say(started, f"{source}: {_recorded(Path(made), source)}")
        kernels = merged(Path(made))
    _say(started, f"{len(kernels)} kernels in all, compiled by {processes} processes into {folder}")
    errors = compile_all(kernels, processes, lambda done, of: _progress(started, done, of))
    for error, count in Counter(errors).most_common(_SHOWN):
        print(f"  not compiled, {count} times: {error}")
    found = cached(kernels)
    if not found:
        raise RuntimeError(f"none of {len(kernels)} kernels could be compiled")
    held = list(found)
    manifest = cache.describe(ARCH, folder, held)
    size = cache.pack(out, manifest, held, found.values())
    _say(started, f"{len(held)} kernels, {size / 1e6:.1f} MB, {size / len(held) / 1e3:.1f} kB each: {out}")
    if size > MOST_BYTES:
        print(f"warning: {out.name} is larger than {MOST_BYTES >> 20} MiB; build it from fewer sources, --source ...")


def check(file: Path) -> bool:
    """Whether this interpreter finds every kernel of a file; unpacks it, and says what differs.

    Raises:
        CacheError: it is no such file, or its folder holds what is not ours.
    """
    manifest = cache.manifest(file)
    print(f"{file}: {manifest.kernels} kernels for sm_{manifest.arch}, triton {manifest.triton}, to lie in "
          f"{manifest.folder}")  # fmt: skip
    if (why := cache.mismatch(manifest)) is not None:
        print(why)
        return False
    folder = cache.unpack(file, anew=True)
    os.environ.update(cache.environment(folder))
    kernels = cache.texts(file)
    misses = Counter(json.loads(text)["name"] for text in set(kernels) - set(cached(kernels)))
    print(f"{len(kernels) - misses.total()} hits, {misses.total()} misses")
    changed = cache.changed(manifest)
    if changed:
        print(f"changed since it was built, or moved in their files: {', '.join(changed)}; build it again")
    for name, count in misses.most_common():
        print(f"  {name}: {count} would be compiled anew")
    return not misses and not changed


def cached(kernels: list[str]) -> dict[str, Path]:
    """Of the kernels that Triton's cache holds, the folder of each."""
    found = {}
    with only_cached():
        for text in kernels:
            try:
                compiled = compile_text(text)
            except Missing:
                continue
            found[text] = Path(next(iter(compiled.metadata_group.values()))).parent
    return found


def merged(folder: Path) -> list[str]:
    """Every kernel that was recorded, once."""
    return sorted({text for file in folder.glob("*.jsonl") for _, kernels in _lines(file) for text in kernels})


def _recorded(folder: Path, source: str) -> str:
    """How much a source recorded, and what of it recorded nothing."""
    lines = [line for file in sorted(folder.glob(f"{source}-*.jsonl")) for line in _lines(file)]
    silent = [name for name, kernels in lines if not kernels]
    shown = "".join(f"\n    nothing: {name}" for name in silent[:_SHOWN])
    more = f"\n    and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
    kernels = {text for _, found in lines for text in found}
    return f"{len(kernels)} kernels from {len(lines) - len(silent)} of {len(lines)}{shown}{more}"


def _lines(file: Path) -> list[tuple[str, list[str]]]:
    found = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(line["name"], line["kernels"]) for line in found]


def _progress(started: float, done: int, of: int) -> None:
    if done % 100 == 0 or done == of:
        _say(started, f"{done} of {of} compiled")


def _say(started: float, text: str) -> None:
    print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
