"""Recording launches, and compiling what was recorded in other processes for a GPU that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Without the interpreter, which is decided for a process: what is recorded is compiled for sm_90.
PROGRAM = """
import sys, torch
from sliderquant_kernels import activations_triton, decode_attention_triton, elementwise_triton, hadamard_launch
from sliderquant_kernels import factor_hadamard, low_bit_launch, weight_only_triton
from sliderquant_kernels.layout import WeightLayout
from sliderquant_kernels.low_bit_layout import LowBitLayout
from sliderquant_kernels.warming import compile_jobs, recorded_jobs

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
        weight_only_triton.weight_only_linear(x, packed[0], packed[1], None, None, layout)
        a, b, c, d = activations_triton.quantize_activations(x, 4, False, None, 0.0, None, False, (0.9, 0.8))
        low_bit_launch.low_bit_linear(a, b, c, d, *low_packed, None, None, low, torch.bfloat16)
        hadamard_launch.hadamard(x, None, factor_hadamard(256), False)
        elementwise_triton.rms_norm(x, x[0], 1e-6)
        elementwise_triton.silu_mul(x, x)
        elementwise_triton.rotary(q, keys[:, :, :1], q[:, 0], q[:, 0])
        decode_attention_triton.decode_attention(q, keys, keys, torch.tensor([5]), None, 0.125)
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
    from sliderquant_kernels.warming import Job, compile_jobs

    job = Job("sliderquant_kernels.elementwise_triton", "silu_mul_kernel", (None,), (1,), {}, {"num_warps": 3})
    (error,) = compile_jobs([job], 90)
    assert error.startswith("silu_mul_kernel: ")
