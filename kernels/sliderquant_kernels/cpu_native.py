"""A compiled loop for what torch has no op for on a CPU: `cpu_int4_dequantize.c`.

The C compiler of the machine (`CC`, cc, gcc or clang: the one that Triton needs too) compiles it when it is first
wanted, into the user's cache folder. Where there is no compiler, or with
`SLIDERQUANT_NATIVE=0`, torch's own ops compute the same bits in several passes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["dequantize_int4", "is_available"]

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_int4_dequantize.c")
# -ffp-contract=off: a fused multiply-add would round otherwise than torch does.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_SECONDS = 60
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
# Fewer weights than this take less time than waking another thread does.
_WEIGHTS_PER_THREAD = 1 << 16


class _Job(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("fused", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("k", "groups", "block", "blocks", "fused_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("halves", "symmetric", "as_float", "threads")),
    )


def is_available() -> bool:
    """Whether the loop is compiled here, after trying once."""
    return _function() is not None


def dequantize_int4(packed: Tensor, fused: Tensor, block: int, halves: bool, symmetric: bool, out: Tensor) -> None:
    """Write rows of a `cpu_int4` weight to `out`.

    Args:
        packed: bytes of whole blocks, uint8 `[rows, K / 2]`, contiguous.
        fused: scale and zero of the same rows, bf16 `[G, rows, 2]`; the rows may be a slice.
        block, halves: how rows are ordered, see `cpu_int4.RowOrder`.
        out: `[K, rows]` bf16 or fp32, with rows next to each other.

    Raises:
        RuntimeError: the loop is not available, or does not take such a weight.
    """
    function = _function()
    if function is None:
        raise RuntimeError("there is no compiled loop on this machine; ask is_available() first")
    rows, k = packed.shape[0], packed.shape[1] * 2
    runtime = _openmp()
    threads = min(torch.get_num_threads(), max(1, rows * k // _WEIGHTS_PER_THREAD)) if runtime else 1
    job = _Job(
        packed.data_ptr(),
        fused.data_ptr(),
        out.data_ptr(),
        k,
        fused.shape[0],
        block,
        rows // block,
        fused.stride(0) // 2,
        out.stride(0),
        halves,
        symmetric,
        out.dtype == torch.float32,
        threads,
    )
    if function(ctypes.byref(job), *(runtime or (None, None, None))):
        raise RuntimeError(f"the compiled loop takes blocks of up to 64 rows, got {block}")


@lru_cache(maxsize=1)
def _function() -> Callable[..., int] | None:
    if os.environ.get("SLIDERQUANT_NATIVE", "1") == "0" or platform.system() not in ("Linux", "Darwin"):
        return None
    try:
        function = ctypes.CDLL(str(_compiled())).sliderquant_dequantize_int4
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("int4 weights are dequantized by torch's ops: %s", error)
        return None
    function.argtypes = (ctypes.POINTER(_Job), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache yet."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None:
        raise RuntimeError("no C compiler (CC, cc, gcc, clang)")
    key = hashlib.sha256(repr((_SOURCE.read_bytes(), compiler, _FLAGS, _processor())).encode()).hexdigest()[:20]
    folder = _cache_folder()
    library, digest = folder / f"int4-{key}.so", folder / f"int4-{key}.sha256"
    if _is_whole(library, digest):
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {' '.join(done.stderr.split())[:300]}")
        noted = made.with_suffix(".sha256")
        noted.write_text(_sha256(made), encoding="ascii")
        # Of several processes that compile at once any may be the last. What they make may differ, and a library that
        # does not fit its digest is compiled again.
        made.replace(library)
        noted.replace(digest)
    return library


def _is_whole(library: Path, digest: Path) -> bool:
    """Whether the library is what was compiled: a file that lost its end ends the process when it is loaded."""
    try:
        return digest.read_text(encoding="ascii") == _sha256(library)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _processor() -> str:
    """What -march=native looks at: a cache in a shared home folder serves machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    """A folder that only this user writes to: what lies in it is loaded as code."""
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")
    root = named if named.is_absolute() else Path.home() / ".cache"
    folder = root / "sliderquant"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{folder} belongs to, or can be written by, another user")
    return folder


@lru_cache(maxsize=1)
def _openmp() -> tuple[ctypes.c_void_p, ...] | None:
    """The functions of `_OPENMP` in the OpenMP runtime that torch runs on; None: it is not one with all of them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    for path in sorted(paths):
        try:
            library = ctypes.CDLL(path)
            return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _OPENMP)
        except (OSError, AttributeError):
            continue
    return None
