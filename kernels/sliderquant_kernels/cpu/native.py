"""Compiled loops for what torch has no op for on a CPU: the C files of this package.

The C compiler of the machine (`CC`, cc, gcc or clang: the one that Triton needs too) compiles each when it is first
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

__all__ = ["dequantize_int4", "has_amx", "openmp", "threads_for", "vnni", "vnni_linear"]

logger = logging.getLogger(__name__)

# -ffp-contract=off: a fused multiply-add would round otherwise than torch does.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_SECONDS = 180
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@lru_cache(maxsize=1)
def dequantize_int4() -> Callable[..., int] | None:
    """The function of `int4_dequantize.c`, which `int4_native` calls; None: there is none here, see the log."""
    return _function("int4_dequantize.c", "sliderquant_dequantize_int4", (ctypes.c_void_p,) * 4)


@lru_cache(maxsize=4)
def vnni(bits: int) -> Callable[..., int] | None:
    """The function of `vnni.c` for codes of 2, 3, 4 or 8 bits, which `cpu_vnni` calls; None: there is none here, as
    there never is without AVX512-VNNI, see the log."""
    return _function("vnni.c", "sliderquant_vnni", (ctypes.c_void_p,), f"-DBITS={4 if bits == 3 else bits}")


@lru_cache(maxsize=4)
def vnni_linear(bits: int) -> Callable[..., int] | None:
    """The other function of `vnni.c`, a whole linear for few tokens, beside `vnni`."""
    arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32)
    return _function("vnni.c", "sliderquant_vnni_linear", arguments, f"-DBITS={4 if bits == 3 else bits}")


@lru_cache(maxsize=1)
def has_amx() -> bool:
    """Whether the loop of `vnni.c` multiplies by AMX: the processor has it, the compiler knows it, and the system
    lets this process use it."""
    function = _function("vnni.c", "sliderquant_has_amx", (), "-DBITS=4")
    return function is not None and bool(function())


def _function(source: str, name: str, arguments: tuple[type, ...], *flags: str) -> Callable[..., int] | None:
    """The C function `int name(...)` of a file of this package."""
    if os.environ.get("SLIDERQUANT_NATIVE", "1") == "0" or platform.system() not in ("Linux", "Darwin"):
        return None
    try:
        function = getattr(ctypes.CDLL(str(_library(Path(__file__).with_name(source), flags))), name)
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("%s is not used, torch's ops take its place: %s", source, error)
        return None
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


def threads_for(work: int, least: int) -> int:
    """Threads for so much work, of which a thread takes `least` at the least: to wake it takes time too."""
    return min(torch.get_num_threads(), max(1, work // least))


@lru_cache(maxsize=1)
def openmp() -> tuple[ctypes.c_void_p, ...] | None:
    """GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime that torch runs on.

    None: it is not one with all of them, and loops run in one thread.
    """
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


def _library(source: Path, flags: tuple[str, ...]) -> Path:
    """The shared library for this source, compiler, flags and processor; compiled if it is not in the cache yet."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None:
        raise RuntimeError("no C compiler (CC, cc, gcc, clang)")
    key = hashlib.sha256(
        repr((source.read_bytes(), _headers(source), compiler, _FLAGS, flags, _processor())).encode()
    ).hexdigest()[:20]
    folder = _cache_folder()
    library, digest = folder / f"{source.stem}-{key}.so", folder / f"{source.stem}-{key}.sha256"
    if _is_whole(library, digest):
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *_FLAGS, *flags, "-o", str(made), str(source), "-lm"]
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


def _headers(source: Path) -> list[bytes]:
    """What the file may include: all headers beside it."""
    return [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]


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
