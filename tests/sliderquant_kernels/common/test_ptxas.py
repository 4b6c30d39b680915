"""Which assembler Triton runs, and which one the key of its cache names, with inductor before and after the import."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARCH = 80  # of these GPUs every release of Triton takes `ptxas`

PROGRAM = f"""
import os, subprocess, sys
from pathlib import Path

def inductor():
    from torch._inductor.runtime import compile_tasks
    compile_tasks.__file__ = sys.argv[2]  # where torch comes with a ptxas, which not every build of it does
    compile_tasks._set_triton_ptxas_path()

def ours():
    import sliderquant_kernels

def compiled():
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
    path = get_ptxas({ARCH}).path
    return path, CUDABackend(GPUTarget("cuda", {ARCH}, 32)).hash()

for step in sys.argv[1].split():
    found = dict(inductor=inductor, ours=ours, compiled=compiled)[step]()
path, key = found
assert key.startswith(subprocess.run([path, "--version"], capture_output=True, text=True).stdout), (path, key)
print(path)
"""


@pytest.fixture
def torch_files(tmp_path: Path) -> Path:
    """Where inductor would be in a torch that comes with its own ptxas."""
    for folder in ("torch", "torch/_inductor"):
        _make_ptxas(tmp_path / folder / "bin" / "ptxas", "13.0")
    return tmp_path / "torch" / "_inductor" / "runtime" / "compile_tasks.py"


def _make_ptxas(path: Path, release: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def _run(steps: str, torch_files: Path, **named: str) -> Path:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    for name in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-c", PROGRAM, steps, str(torch_files)]
    done = subprocess.run(command, env=environment | named, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize(
    "steps",
    [
        "ours compiled",
        "ours compiled inductor compiled",
        "ours inductor compiled",
        "inductor ours compiled",
        "compiled inductor ours compiled",
        "inductor compiled ours compiled",
    ],
)
def test_triton_runs_its_own_and_says_so(steps: str, torch_files: Path) -> None:
    assert _run(steps, torch_files).parent.parts[-4:] == ("triton", "backends", "nvidia", "bin")


def test_without_the_package_inductor_decides(torch_files: Path) -> None:
    assert _run("inductor compiled", torch_files).parts[-4:-2] != ("triton", "backends")


@pytest.mark.parametrize("steps", ["ours compiled inductor compiled", "inductor compiled ours compiled"])
@pytest.mark.parametrize("torchs_own", [False, True])
def test_what_the_user_named_stays(steps: str, torchs_own: bool, torch_files: Path, tmp_path: Path) -> None:
    path = torch_files.parents[2] / "bin" / "ptxas" if torchs_own else tmp_path / "mine" / "ptxas"
    if not torchs_own:
        _make_ptxas(path, "12.5")
    assert _run(steps, torch_files, TRITON_PTXAS_PATH=str(path)) == path
