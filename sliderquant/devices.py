"""Which device a run uses, and how much memory it took."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sliderquant._version import __version__
from sliderquant.errors import InputError

__all__ = ["deterministic", "has_fast_bfloat16", "machine", "peak_memory", "resolve_device", "versions"]


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device when there is one, else the CPU.

    Raises:
        InputError: CUDA is asked for where there is none, or the name is not a device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is not understood: expected auto, cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported: expected auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"device {str(device)!r}: this torch ({torch.__version__}) sees no CUDA GPU; use device='cpu', or "
                "install a CUDA build of torch and a driver"
            )
        if resolved.index is not None and resolved.index >= torch.cuda.device_count():
            raise InputError(f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    return resolved


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has units that multiply bf16 matrices: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in PyTorch, and not in every release.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(supported() for supported in asked if supported is not None)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the peak resident memory of the process, and on CUDA the peak that PyTorch allocated on the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def machine(device: torch.device) -> dict[str, str]:
    """What a report says about the machine."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    threads = torch.get_num_threads()
    return {"device": f"cpu ({platform.machine()}, {threads} thread{'' if threads == 1 else 's'})"}


def versions() -> dict[str, str]:
    """What a report says about the software."""
    import compressed_tensors
    import transformers

    return {
        "sliderquant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed_tensors": compressed_tensors.__version__,
    }


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it CUDA takes its deterministic algorithms; on a CPU PyTorch's own are, for a given number of threads."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
