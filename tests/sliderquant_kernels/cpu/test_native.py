"""How compiled loops are made, and the one that dequantizes int4 weights, beside torch's ops: the same bits."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_kernels import WeightLayout
from sliderquant_kernels.cpu import int4 as cpu_int4
from sliderquant_kernels.cpu import int4_native as cpu_int4_native
from sliderquant_kernels.cpu import native as cpu_native

if not cpu_int4.is_fast():
    pytest.skip(
        "torch does not vectorize its int4 matmul here, so that its container is not used", allow_module_level=True
    )


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not cpu_int4_native.is_available():
        pytest.skip("no C compiler on this machine")


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 14),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_the_same_bits_as_torch(bits, rows, groups, group_size, symmetric, dtype, threads, seed):
    n, k = 16 * rows, groups * group_size
    generator = torch.Generator().manual_seed(seed)
    layout = WeightLayout("cpu_int4", bits, n, k, group_size, symmetric)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randint(1, 0x7F7F - (3 << 7), (n, groups), generator=generator).to(torch.int16).view(torch.bfloat16)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    packed = layout.pack(codes, scale, zero)
    offset = torch.full((n, groups), 2 ** (bits - 1)) if zero is None else zero
    steps = codes.view(n, groups, group_size).float() - offset.float().unsqueeze(-1)
    expected = (steps * scale.float().unsqueeze(-1)).view(n, k).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_int4, "_CHUNK_WEIGHTS", 80 * k)  # several chunks
        patch.setattr(cpu_int4_native, "_WEIGHTS_PER_THREAD", n * k // threads)
        assert torch.equal(cpu_int4.dequantize(packed.weight, packed.scale, symmetric, dtype), expected)
        patch.setattr(cpu_int4_native, "is_available", lambda: False)
        assert torch.equal(cpu_int4.dequantize(packed.weight, packed.scale, symmetric, dtype), expected)


def test_a_block_that_is_too_large_is_refused():
    packed, fused = torch.zeros(128, 16, dtype=torch.uint8), torch.ones(1, 128, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="blocks of up to 64 rows, got 128"):
        cpu_int4_native.dequantize_int4(packed, fused, 128, True, False, torch.empty(32, 128, dtype=torch.bfloat16))


_PROBE = """
import logging
logging.basicConfig(level=logging.INFO)
from sliderquant_kernels.cpu import int4_native
print(int4_native.is_available())
"""


def _probe(**environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_a_header_that_changes_is_compiled_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "loop.c", tmp_path / "loop.h"
    source.write_text('#include "loop.h"\nint value(void) { return VALUE; }\n')
    found = []
    for value in (1, 2, 1):
        header.write_text(f"#define VALUE {value}\n")
        found.append(cpu_native._library(source, ()))
    assert [ctypes.CDLL(str(library)).value() for library in found] == [1, 2, 1]
    assert found[0] == found[2]


def test_the_library_is_compiled_once_into_the_cache(tmp_path: Path):
    assert _probe(XDG_CACHE_HOME=str(tmp_path))[0] == "True"
    folder = tmp_path / "sliderquant"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    library, digest = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (library.suffix, digest.suffix) == (".so", ".sha256")
    made = library.stat().st_mtime_ns
    assert _probe(XDG_CACHE_HOME=str(tmp_path))[0] == "True"
    assert library.stat().st_mtime_ns == made
    # Loading a library without its end would kill the process.
    library.write_bytes(library.read_bytes()[:3000])
    assert _probe(XDG_CACHE_HOME=str(tmp_path))[0] == "True"
    assert library.stat().st_mtime_ns != made


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SLIDERQUANT_NATIVE": "0"}, ""),
        ({"PATH": "/nowhere", "CC": ""}, "no C compiler"),
        ({"CC": "false"}, "false failed"),
    ],
)
def test_without_a_compiler_torch_computes(environment: dict[str, str], reason: str, tmp_path: Path):
    available, log = _probe(XDG_CACHE_HOME=str(tmp_path), **environment)
    assert available == "False"
    assert reason in log


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path):
    (tmp_path / "sliderquant").mkdir()
    (tmp_path / "sliderquant").chmod(0o777)
    available, log = _probe(XDG_CACHE_HOME=str(tmp_path))
    assert available == "False"
    assert "can be written by, another user" in log
