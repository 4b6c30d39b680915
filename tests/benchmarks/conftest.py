"""What the tests of the benchmarks share."""

import argparse
import sys
import types

import pytest
import torch


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


@pytest.fixture
def run_row():
    """`run_row(model, scheme, method, perplexity, ...)`: a row of the accuracy table or of an ablation."""

    def make(model, scheme, method, perplexity, **more):
        learned = method in ("omniquant", "cbq", "sliderquant", "sliderquant-published")
        known = {
            "model": model, "scheme": scheme, "method": method, "rotation": "", "seed": 2,
            "epochs": 10 if learned else None, "samples": None if method == "rtn" else 64, "seqlen": 256,
            "calibration": "a.txt", "evaluation": "b.txt", "engine": "windows" if learned else method, "settings": {},
            "perplexity": perplexity, "seconds": 12.0,
        }  # fmt: skip
        original = {"seed": None, "samples": None, "seconds": None} if method == "original" else {}
        return {**known, **original, **more}

    return make


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """`parsed(module, *words)`: a command's arguments, with results into `tmp_path / "cpu"`."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def parse(module, *words):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return parser.parse_args([*map(str, words), "--out", str(tmp_path)])

    return parse
