"""The machine as it was found: GPU, driver, clocks, caches, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import sliderquant_kernels
from sliderquant_kernels.common import choices

__all__ = ["cache_bytes", "clocks", "current_device", "describe", "installed", "versions"]

GPU_QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
PACKAGES = ("torch", "triton")
# Of a CPU that does not tell.
DEFAULT_CACHE = 32 << 20


def describe(device: torch.device) -> dict[str, Any]:
    """What tells this machine from others."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return described


def versions() -> dict[str, str]:
    """Versions of the packages that every measurement depends on, and a digest of the kernels' sources."""
    found = {name: installed(name) or "absent" for name in PACKAGES}
    return {**found, "sliderquant_kernels": _source_digest(Path(sliderquant_kernels.__file__).parent)}


@lru_cache(maxsize=1)
def current_device() -> choices.Device:
    """The current CUDA device as the kernels' rules know it."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return choices.Device(10 * found.major + found.minor, found.multi_processor_count, found.name)


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, `name` or `name==version`; None if there is none. Imports nothing."""
    try:
        return importlib.metadata.version(distribution.partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, the largest cache of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=DEFAULT_CACHE)


def clocks() -> dict[str, str] | None:
    """Clocks, power and temperature as nvidia-smi tells them now; None without it. Nothing is changed."""
    if shutil.which("nvidia-smi") is None:
        return None
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader", f"--id={index}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    values = answer.strip().splitlines()[0].split(", ")
    return dict(zip(GPU_QUERY, values, strict=False))


def _source_digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json", ".c", ".h")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
