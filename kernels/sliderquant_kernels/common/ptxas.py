"""One assembler for the whole life of a process: the one that comes with Triton.

Triton asks `TRITON_PTXAS_PATH` at every compilation which `ptxas` to run, and takes its own where it is not set. The
key of its cache holds the text of `ptxas --version`, which it asks once and remembers. torch's inductor sets the
variable to torch's `ptxas`, another version, when it first compiles something in a process. From then on Triton runs
torch's `ptxas` and files what it made under the version of its own: one key stands for two machine codes, in a cache on
disk that other processes read. Processes that are started later see the variable, and compute other keys.

inductor leaves the variable alone where it is set. So it is set when this package is imported, to what Triton takes by
default: that is what `inspect` has compiled, and it does not depend on which torch is installed. inductor's kernels are
then made by it as well, as they are with a torch that comes without a `ptxas`. GPUs for which Triton has a `ptxas` of
its own (`ptxas-blackwell`) take that one, which neither inductor nor this module touches.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

__all__ = ["own_ptxas", "pin_ptxas"]

VARIABLE = "TRITON_PTXAS_PATH"
_INDUCTOR = "torch._inductor.runtime.compile_tasks"
_COMPILER = "triton.backends.nvidia.compiler"


def pin_ptxas() -> None:
    """Let Triton run its own `ptxas` from now on, unless the user named another one."""
    own = own_ptxas()
    if own is None:
        return
    if VARIABLE not in os.environ or _is_inductors(os.environ[VARIABLE]):
        os.environ[VARIABLE] = str(own)
    # Whoever compiled before may have left the version of another one behind.
    compiler = sys.modules.get(_COMPILER)
    backend = getattr(compiler, "CUDABackend", None)
    for remembered in (getattr(compiler, "get_ptxas_version", None), getattr(backend, "hash", None)):
        clear = getattr(remembered, "cache_clear", None)
        if clear is not None:
            clear()


def own_ptxas() -> Path | None:
    """Triton's; None without Triton, and with releases that have none for newer GPUs: torch's may be the only one."""
    try:
        spec = find_spec("triton")
    except ValueError:  # a stand-in without a spec
        return None
    if spec is None or spec.origin is None:
        return None
    folder, suffix = Path(spec.origin).parent / "backends" / "nvidia" / "bin", sysconfig.get_config_var("EXE") or ""
    found = folder / f"ptxas{suffix}"
    return found if found.is_file() and (folder / f"ptxas-blackwell{suffix}").is_file() else None


def _is_inductors(path: str) -> bool:
    """Whether inductor, and not the user, has named this path."""
    module = sys.modules.get(_INDUCTOR)
    if module is None or not getattr(module, "__file__", None):
        return False
    # Releases of torch differ in the folder.
    folders = Path(str(module.__file__)).absolute().parents[1:3]
    if Path(path) not in [folder / "bin" / "ptxas" for folder in folders]:
        return False
    try:
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:  # not on every system
        return True
    return os.fsencode(f"{VARIABLE}={path}") not in given
