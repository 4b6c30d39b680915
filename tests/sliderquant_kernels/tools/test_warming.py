"""Recording launches, and compiling what was recorded in other processes for a GPU that need not be there."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sliderquant_kernels.tools import warming
from sliderquant_kernels.tools.warming import LATE, Job, compile_each, compile_jobs

ROOT = Path(__file__).resolve().parents[3]

# Without the interpreter, which is decided for a process: what is recorded is compiled for sm_90.
PROGRAM = """
import sys, torch
from sliderquant_kernels import factor_hadamard
from sliderquant_kernels.activations import kernels as activations
from sliderquant_kernels.attention import kernels as attention
from sliderquant_kernels.elementwise import kernels as elementwise
from sliderquant_kernels.low_bit import launch as low_bit
from sliderquant_kernels.rotation import launch as rotation
from sliderquant_kernels.weight_only import launch as weight_only
from sliderquant_kernels.weight_only.layout import WeightLayout
from sliderquant_kernels.low_bit.layout import LowBitLayout
from sliderquant_kernels.tools.warming import compile_jobs, recorded_jobs

generator = torch.Generator().manual_seed(0)
x = torch.randn(3, 256, generator=generator).bfloat16()
codes, scale = torch.zeros(128, 256, dtype=torch.uint8), torch.ones(128, 2).bfloat16()
layout = WeightLayout("triton", 4, 128, 256, 128, True)
low = LowBitLayout("triton_int8", 4, 128, 256, None, True)
packed, low_packed = layout.pack(codes, scale), low.pack(codes, torch.ones(128, 1))
q, keys = torch.randn(1, 4, 1, 64).bfloat16(), torch.randn(1, 2, 256, 64).bfloat16()
with recorded_jobs() as jobs:
    for tokens in (3, 2):
        x = x[:tokens].contiguous()
        weight_only.weight_only_linear(x, packed[0], packed[1], None, None, layout)
        a, b, c, d = activations.quantize_activations(x, 4, False, None, 0.0, None, False, (0.9, 0.8))
        low_bit.low_bit_linear(a, b, c, d, *low_packed, None, None, low, torch.bfloat16)
        rotation.hadamard(x, None, factor_hadamard(256), False)
        elementwise.rms_norm(x, x[0], 1e-6)
        elementwise.silu_mul(x, x)
        elementwise.rotary(q, keys[:, :, :1], q[:, 0], q[:, 0])
        attention.decode_attention(q, keys, keys, torch.tensor([5]), None, 0.125)
print(sorted(job.name for job in jobs))
seen = []
print(compile_jobs(jobs, 90, processes=int(sys.argv[1]), done=lambda *numbers: seen.append(numbers)))
print(seen == [(n, len(jobs)) for n in range(1, len(jobs) + 1)])
"""
KERNELS = ["join_kernel", "low_bit_warp_k_kernel", "quantize_kernel", "rms_norm_kernel", "rotary_kernel", "row_kernel",
           "share_kernel", "silu_mul_kernel"]  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_launched_is_recorded_once_and_compiled(processes: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(processes)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, errors, seen = (eval(line) for line in done.stdout.splitlines())
    assert [name for name in names if name not in ("rows_kernel", "warp_k_kernel")] == KERNELS
    assert len(names) == len(KERNELS) + 1
    assert errors == []
    assert seen is True
    assert len(list(tmp_path.glob("*/*.cubin"))) == len(names)


def test_a_kernel_that_does_not_compile_is_named() -> None:
    job = Job("sliderquant_kernels.elementwise.kernels", "silu_mul_kernel", (None,), (1,), {}, {"num_warps": 3})
    (error,) = compile_jobs([job], 90)
    assert error.startswith("silu_mul_kernel: ")


JOBS = """
import os, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Job:
    name: str
    what: str = ""

    def compile(self, arch):
        print("a compiler's own words")
        os.write(1, b"and more of them\\n")
        if self.what == "hangs":
            os.system(f"echo $$ > {__file__}.pid; exec sleep 100")
        elif self.what == "slow":
            time.sleep(0.3)
        elif self.what == "crashes":
            os._exit(3)
        elif self.what:
            raise ValueError(f"{self.what} on sm_{arch}")
"""


@pytest.fixture
def make_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Jobs of a module that the compiling processes import too."""
    (tmp_path / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    from jobs_of_a_test import Job

    return lambda *kinds: [Job(f"k{number}", kind) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_hangs_or_crashes_costs_only_itself(
    processes: int, make_jobs: Callable[..., list[Any]], tmp_path: Path
) -> None:
    jobs = make_jobs("", "hangs", "", "crashes", "is wrong", "", "", "")
    seen: list[tuple[int, int]] = []
    started = time.monotonic()
    errors = compile_each(jobs, 90, processes, lambda *numbers: seen.append(numbers), timeout=2.0)
    assert time.monotonic() - started < 90  # not the 100 seconds of the one that hangs
    assert errors == [
        "",
        "k1: compiling took longer than 2 s",
        "",
        "k3: a compiling process ended with exit code 3",
        "k4: ValueError: is wrong on sm_90",
        *[""] * 3,
    ]
    assert seen == [(number, 8) for number in range(1, 9)]
    # What it had started, as the assembler would be, has ended too. A process that nobody waits for has no command.
    command = Path(f"/proc/{(tmp_path / 'jobs_of_a_test.py.pid').read_text().strip()}/cmdline")
    assert not command.is_file() or command.read_bytes() == b""


def test_what_there_is_no_time_for_is_late(make_jobs: Callable[..., list[Any]]) -> None:
    assert compile_each(make_jobs("", ""), 90, 1, seconds=0.0) == [LATE] * 2
    # The process may start, and the job that hangs takes the rest of the time.
    errors = compile_each(make_jobs("", "hangs", ""), 90, 1, timeout=200.0, seconds=40.0)
    assert errors == ["", LATE, LATE]


def test_an_interrupted_caller_leaves_no_process(make_jobs: Callable[..., list[Any]]) -> None:
    def interrupt(number: int, total: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_each(make_jobs("", *["hangs"] * 9), 90, 2, interrupt, timeout=200.0)
    assert time.monotonic() - started < 90
    assert not [thread for thread in threading.enumerate() if thread.name == "sliderquant-compile"]


def test_a_process_that_cannot_start_is_no_hang(make_jobs: Callable[..., list[Any]], monkeypatch) -> None:
    monkeypatch.setattr(warming.sys, "executable", "/nowhere/python")
    errors = compile_each(make_jobs("", ""), 90, 1, timeout=2.0)
    assert [error[:22] for error in errors] == ["k0: FileNotFoundError:", "k1: FileNotFoundError:"]
