"""The file of compiled kernels from end to end: recorded without a GPU, compiled for one, found again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.cache import archive as cache

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing needs to stand for it")


def python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


BUILD = """
import json, sys
from pathlib import Path
import torch
from benchmarks.gpu.cache import command
from benchmarks.gpu.cache.device import absent_gpu
from benchmarks.gpu.cache.kernels import text_of
from sliderquant_kernels.elementwise import kernels as elementwise

def record(source, folder, processes):
    kernels = set()
    with absent_gpu(lambda *compiled: kernels.add(text_of(*compiled))):
        x = torch.randn(3, 257, device="cuda").half()
        weight = torch.ones(256, dtype=torch.float16).cuda()
        elementwise.rms_norm(x[:, :256].contiguous(), weight, 1e-5)
        elementwise.rms_norm(x[:, 1:], weight, 1e-5)  # begins at an odd address: another kernel
    Path(folder, "some-0.jsonl").write_text(json.dumps({"name": "both", "kernels": sorted(kernels)}))

command.record = record
command.build(Path(sys.argv[1]), Path(sys.argv[2]), ["some"], 1)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A file of two kernels, and what building it has said."""
    folder = tmp_path_factory.mktemp("built")
    done = python("-c", BUILD, folder / "cache.tar.xz", folder / "tc")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(file=folder / "cache.tar.xz", folder=folder / "tc", said=done.stdout)


def test_what_is_built(built: SimpleNamespace) -> None:
    assert "some: 2 kernels from 1 of 1" in built.said
    found = cache.manifest(built.file)
    assert (found.kernels, found.arch, found.folder) == (2, 90, str(built.folder))
    assert list(found.sources) == ["sliderquant_kernels.elementwise.kernels.rms_norm_kernel"]
    aligned = ["divisibility" in str(json.loads(text)["attributes"]) for text in cache.texts(built.file)]
    assert len(aligned) == 2
    kernels = [json.loads(text) for text in cache.texts(built.file)]
    assert {kernel["signature"][0][1] for kernel in kernels} == {"*fp16"}
    assert kernels[0]["attributes"] != kernels[1]["attributes"]


def test_the_same_python_finds_everything(built: SimpleNamespace) -> None:
    done = python("-m", "benchmarks", "gpu-cache", "check", built.file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 hits, 0 misses" in done.stdout
    assert len(list(built.folder.glob("*/*.cubin"))) == 2
    assert not list(built.folder.rglob("*.source"))


LAUNCH = """
import torch, triton
from benchmarks.gpu.cache.device import absent_gpu
from benchmarks.gpu.cache.kernels import only_cached
from sliderquant_kernels.elementwise import kernels as elementwise

real = triton.compile
def launch(source, target, options):
    with only_cached():
        print("found", len(real(source, target=target, options=options).kernel) > 1000)

with absent_gpu(launch):
    x = torch.randn(5, 256, dtype=torch.float16).cuda()
    elementwise.rms_norm(x, x[0], 1e-5)
"""


def test_a_launch_finds_its_kernel(built: SimpleNamespace) -> None:
    """By what Triton's JIT hands to the compiler, which knows of no record."""
    folder = cache.unpack(built.file, anew=True)
    done = python("-c", LAUNCH, **cache.environment(folder))
    assert done.stdout == "found True\n", done.stderr
    done = python("-c", LAUNCH, **cache.environment(folder.with_name("empty")))
    assert "Missing" in done.stderr


def test_a_kernel_that_is_missing(built: SimpleNamespace, tmp_path: Path) -> None:
    folder, found = cache.unpack(built.file, anew=True), cache.manifest(built.file)
    kept = sorted(path for path in folder.iterdir() if path.is_dir())[:1]
    changed = dict.fromkeys(found.sources, "0")
    other = cache.Manifest(**{**vars(found), "sources": changed})
    cache.pack(tmp_path / "part.tar.xz", other, cache.texts(built.file), kept)
    done = python("-m", "benchmarks", "gpu-cache", "check", tmp_path / "part.tar.xz")
    assert done.returncode == 1
    assert "1 hits, 1 misses" in done.stdout
    assert "rms_norm_kernel: 1 would be compiled anew" in done.stdout
    assert (
        "changed since it was built, or moved in their files: sliderquant_kernels.elementwise.kernels.rms"
        in done.stdout
    )


def test_another_triton(built: SimpleNamespace, tmp_path: Path) -> None:
    other = cache.Manifest(**{**vars(cache.manifest(built.file)), "triton": "3.1.4", "folder": str(tmp_path / "tc")})
    cache.pack(tmp_path / "other.tar.xz", other, cache.texts(built.file), [])
    done = python("-m", "benchmarks", "gpu-cache", "check", tmp_path / "other.tar.xz")
    assert done.returncode == 1
    assert "built for triton 3.1.4, this is" in done.stdout
    assert not (tmp_path / "tc").exists()


TESTS = """
import pytest, torch
from sliderquant_kernels import quantize_activations
from sliderquant_kernels.common import launching
from sliderquant_kernels.elementwise import op as elementwise

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(launching.INTERPRETED, reason="interpreted"),
]

@pytest.fixture
def assert_that():
    return assert_never

def test_with_launches_in_and_after_an_assert(assert_that):
    x = torch.randn(2, 64, device="cuda")
    assert quantize_activations(x, 8).codes.cpu().sum() == 1.5
    assert_that(x)
    quantize_activations(x, 4)
    elementwise.rms_norm(x, x[0], 1e-5)  # by a kernel where nothing traces, by torch elsewhere

def assert_never(x):
    raise AssertionError

def test_without_one():
    assert False
"""


def test_tests_are_recorded_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    done = python("-m", "pytest", "-p", "benchmarks.gpu.cache.plugin", "-p", "no:cacheprovider", "-q",
                  tmp_path / "test_some.py", SLIDERQUANT_RECORDED=str(tmp_path))  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout
    first, second = lines(tmp_path)
    assert first["name"].endswith("test_with_launches_in_and_after_an_assert")
    names = [json.loads(text)["name"] for text in first["kernels"]]
    assert sorted(names) == ["quantize_kernel", "quantize_kernel", "rms_norm_kernel"]
    assert (second["kernels"], second["outcomes"]) == ([], [])
    assert not list(tmp_path.rglob("*.pyc"))


ABSENT = """
import threading, torch
from torch import nn
from benchmarks.gpu.cache.device import absent_gpu
from sliderquant_kernels import quantize_activations

seen = []
with absent_gpu(lambda source, target, options: seen.append(source.name), largest=1000):
    x = torch.arange(20.0).view(4, 5)
    y = x.cuda()[1:, 1:] * 2
    assert (y.device, y.is_cuda, y.get_device(), str(torch.tensor([1], device="cuda").device)) == (
        torch.device("cuda:0"), True, 0, "cuda:0")
    assert x.cuda()[1:, 1:].data_ptr() % 16 == 8  # where it would begin
    assert torch.equal(y.cpu(), x[1:, 1:] * 2) and torch.equal(y.to("cpu", torch.float64), x[1:, 1:].double() * 2)
    assert type(y.cpu()) is torch.Tensor and y.sum().item() == 300 and bool((y > 0).all())
    linear = nn.Linear(5, 3).cuda()
    assert all(p.is_cuda and isinstance(p, nn.Parameter) for p in linear.parameters())
    assert linear(x.cuda()).shape == (4, 3) and linear(x.cuda()).is_cuda
    random = torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(random.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(1)))
    large = torch.randn(2000, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert large.is_cuda and large.shape == (2000,) and bool(torch.isfinite(large).all())
    assert torch.equal(large.cpu(), torch.zeros(2000))
    with torch.inference_mode():  # as what is timed runs
        assert large.narrow(0, 5, 9).is_cuda and y.t().bfloat16().shape == (4, 3)
    thread = threading.Thread(target=lambda: quantize_activations(torch.ones(2, 64, device="cuda"), 8))
    thread.start()
    thread.join()
    assert torch.compile(quantize_activations) is quantize_activations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        quantize_activations(torch.ones(2, 64, device="cuda").half(), 8)
    graph.replay()
assert seen == ["quantize_kernel"] * 2, seen
assert not torch.cuda.is_available() and torch.compile(quantize_activations) is not quantize_activations
print("fine")
"""


def test_the_gpu_that_is_not_there() -> None:
    done = python("-c", ABSENT)
    assert done.stdout == "fine\n", done.stderr
