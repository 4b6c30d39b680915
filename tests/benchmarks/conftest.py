"""The benchmarks are not installed with the package: they are found next to the tests."""

import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture
def run_facts():
    """`run_facts(id, device)`: what the file of results holds about a run."""

    def make(number=0, device="cuda", copy_gbps=4000.0, matmul_tflops=800.0):
        floors = {"copy_gbps": copy_gbps, "matmul_tflops": matmul_tflops, "empty_kernel_us": 1.5}
        machine = {"gpu": "NVIDIA Test", "cpu": "x86_64", "threads": 1, "cores": 2}
        clocks = {"driver_version": "1.2", "clocks.sm": "1980 MHz"}
        date, versions = "2026-01-01T00:00:00+00:00", {"torch": "2.8"}
        return {
            "id": number, "date": date, "device": device, "versions": versions,
            "machine": machine, "floors": floors, "clocks": clocks,
        }  # fmt: skip

    return make


@pytest.fixture
def timed_row():
    """`timed_row(provider, us, ...)`: a measured row of the weight-only linear."""

    def make(provider, us, shape="4096x4096", m=1, scheme="W4A16-g128", dtype="bf16", run=0, weight_bytes=9e6, **more):
        n, k = map(int, shape.split("x"))
        work = {"bytes": weight_bytes + 2 * m * (n + k), "flops": 2.0 * m * n * k, "weight_bytes": weight_bytes}
        times = {"q20_us": us * 0.99, "q50_us": us, "q80_us": us * 1.02, "samples": 9}
        accuracy = {"relative_error": 1e-3, "tolerance": 4e-3, "worst_element": 0.5}
        case = {
            "op": "weight_only_linear",
            "layer": "a layer",
            "shape": shape,
            "m": m,
            "scheme": scheme,
            "dtype": dtype,
        }
        kept = {"provider": provider, "kind": "time", "status": "ok", "version": "1", "run": run}
        return {**case, **kept, **work, **times, **accuracy, **more}

    return make


@pytest.fixture
def modules(monkeypatch):
    """`modules(name, **contents)`: have a module, and the packages above it, importable."""

    def add(name, **contents):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules or not hasattr(sys.modules[parent], "stand_in"):
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
                sys.modules[parent].stand_in = True
                sys.modules[parent].__path__ = []
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[parent])
        for key, value in contents.items():
            setattr(sys.modules[name], key, value)

    return add


@pytest.fixture
def unpack_words():
    """`unpack_words(words, bits)`: little-endian fields of int32 words along the last dimension."""

    def unpack(words, bits):
        stream = (words.long()[..., None] >> torch.arange(32)) & 1
        return (stream.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)

    return unpack


@pytest.fixture
def pack_words():
    """`pack_words(codes, bits)`: the inverse of `unpack_words`."""

    def pack(codes, bits):
        fields = (codes[..., None] >> torch.arange(bits)) & 1
        return (fields.flatten(-2).unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1).to(torch.int32)

    return pack
