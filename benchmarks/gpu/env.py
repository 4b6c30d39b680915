"""The machine as it was found, the cache of compiled kernels, and what the estimate foresees, before anything runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.harness import machine
from benchmarks.kernels.harness.case import DTYPES
from benchmarks.kernels.shared.schemes import WeightScheme
from benchmarks.kernels.weight_only.plan import plan
from benchmarks.kernels.weight_only.providers.ours import CHOSEN
from sliderquant_kernels.common.choices import Device, Problem, family
from sliderquant_kernels.weight_only.estimate import MAX_TOKENS, estimate
from sliderquant_kernels.weight_only.tiles import choose

from .context import Context

__all__ = ["run"]

PACKAGES = ("torch", "triton", "transformers", "compressed-tensors", "pytest", "pytest-xdist", "pytest-timeout",
            "humming-kernels", "torchao", "conch-triton-kernels")  # fmt: skip


def run(context: Context) -> None:
    """Ask the device for an answer, and note everything."""
    device = context.device
    answer = torch.arange(1000, device=device).sum().item()
    if answer != 499500:
        raise RuntimeError(f"{device} adds 0 to 999 up to {answer}: it is of no use")
    found = machine.describe(device)
    versions = {name: machine.installed(name) or "absent" for name in PACKAGES}
    context.add("machine", {**found, "clocks": machine.clocks(), "versions": versions, "ptxas": ptxas(),
                            "sources": machine.versions()["sliderquant_kernels"]})  # fmt: skip
    print(found, versions, flush=True)
    context.add("cache", kernel_cache())
    rules = Device.typical(90) if context.rehearsal else machine.current_device()
    for row in predictions(rules):
        context.add(f"prediction {row['shape']} {row['scheme']} M={row['m']}", row)


def ptxas() -> dict[str, str]:
    """The ptxas that Triton brings and the one that is set, with their versions."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    paths = {"triton": str(bundled), "TRITON_PTXAS_PATH": os.environ.get("TRITON_PTXAS_PATH", ""),
             "PATH": shutil.which("ptxas") or ""}  # fmt: skip
    return {name: f"{path}: {_version(path)}" for name, path in paths.items() if path}


def _version(path: str) -> str:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run ({error})"
    return text.strip().splitlines()[-1]


def kernel_cache() -> dict[str, Any]:
    """Whether compiled kernels came along, and what became of them."""
    told = os.environ.get("SLIDERQUANT_GPU_CACHE", "none was given: kernels are compiled when they are first launched")
    folder = os.environ.get("TRITON_CACHE_DIR")
    kernels = len(list(Path(folder).rglob("*.cubin"))) if folder and Path(folder).is_dir() else 0
    return {"hit": told.endswith(": hit"), "text": told, "kernels": kernels}


def predictions(device: Device) -> list[dict[str, Any]]:
    """Microseconds that the estimate foresees for what `goals` measures; nothing for GPUs that it does not know."""
    if family(device.arch) != 90:
        return []
    rows = []
    for case in [task.case for task in plan("quick", "cuda").timings if task.provider == CHOSEN]:
        scheme = WeightScheme.parse(case.scheme)
        problem = Problem(case.m, *case.shape, scheme.bits, scheme.group_size, scheme.symmetric, DTYPES[case.dtype])
        choice = choose(problem, device)
        if case.m <= MAX_TOKENS and choice.variant != "dense":
            us = round(estimate(problem, choice, device).microseconds, 2)
            rows.append({**case.columns(), "us": us, "tile": choice.reason})
    return rows
