"""The benchmark of what calls cost on the host, and the GPU that does nothing."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.speed import host, host_stub
from sliderquant_kernels.activations import kernels as activations_triton
from sliderquant_kernels.common import devices

ROOT = Path(host.__file__).parents[2]


def _python(code: str) -> str:
    """What a process that compiles Triton's kernels prints."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, open_routes = [], []

    class Around:
        def __enter__(self):
            open_routes.append(1)

        def __exit__(self, *_):
            open_routes.pop()

    cases = {
        ("a", "direct"): (lambda: order.append(("a", len(open_routes))), nullcontext()),
        ("a", "dispatcher"): (lambda: order.append(("b", len(open_routes))), Around()),
    }
    monkeypatch.setattr(host, "cases", lambda device: cases)
    times = iter([1000.0, 1000.0, 3.0, 8.0, 5.0, 6.0, 4.0, 7.0])
    microseconds = host.microseconds
    monkeypatch.setattr(host, "microseconds", lambda *given: (microseconds(*given), next(times))[1])
    rows = host.measure(torch.device("cpu"), 3, 2)
    assert [(row["call"], row["route"], row["us"]) for row in rows] == [("a", "direct", 4.0), ("a", "dispatcher", 7.0)]
    assert order == [("a", 0), ("a", 0), ("b", 1), ("b", 1)] * 4


def test_through_dispatcher_is_undone():
    kept = devices.nothing_watches
    with host.through_dispatcher():
        assert not devices.nothing_watches()
    assert devices.nothing_watches is kept


def test_the_stub_refuses_the_interpreter():
    if isinstance(activations_triton.quantize_kernel, host_stub.triton.JITFunction):
        pytest.skip("kernels are compiled")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), host_stub.stubbed_gpu():
        pass


def test_the_command_writes_its_rows(parsed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host_stub, "stubbed_gpu", nullcontext)
    monkeypatch.setattr(host, "cases", lambda device: {("an op", "direct"): (lambda: None, nullcontext())})
    host.run(parsed(host, "--rounds", 3, "--calls", 2))
    (row,) = json.loads((tmp_path / "cpu" / "host.json").read_text())["rows"]
    assert (row["call"], row["route"], row["launch"], row["tokens"]) == ("an op", "direct", "left out", 1)
    assert row["us"] >= 0
    assert "| an op | direct |" in capsys.readouterr().out


_COMPARE = """
import json, torch
from benchmarks.speed import host, host_stub
from sliderquant_kernels.common import devices, launch_plan

def plain(value):
    return ["at", value.data_ptr() % 16] if isinstance(value, torch.Tensor) else str(value)

kept, found = [], {}
with host_stub.stubbed_gpu(), torch.inference_mode():
    before = devices.nothing_watches
    for (name, route), (call, around) in host.cases(torch.device("cpu")).items():
        if name == "F.linear":
            continue
        with around:
            call()  # compiles
            host_stub.LAUNCHES = []
            call()
            direct, host_stub.LAUNCHES = host_stub.LAUNCHES, []
            launch = launch_plan.Launcher.__call__
            launch_plan.Launcher.__call__ = launch_plan.Launcher._launch_by_jit
            call()
            launch_plan.Launcher.__call__ = launch
            jit, host_stub.LAUNCHES = host_stub.LAUNCHES, None
        found[f"{name} {route}"] = [
            [[plain(value) for value in launch] for launch in launches] for launches in (direct, jit)
        ]
from sliderquant_kernels.weight_only import layout
kept = [devices.on_gpu(torch.zeros(1)), layout.WeightLayout("triton", 4, 32, 64, 32, True).device_type]
print(json.dumps([found, kept]))
"""


@pytest.mark.slow
def test_direct_launches_are_what_triton_would_launch():
    """With kernels that are compiled, and the launches that Triton's JIT makes of the same calls."""
    found, kept = json.loads(_python(_COMPARE))
    assert kept == [False, "cuda"]
    assert len(found) == 14
    for name, (direct, jit) in found.items():
        assert len(direct) == len(jit) == (2 if "W4A4" in name else 1), name
        for ours, theirs in zip(direct, jit, strict=True):
            assert len(ours) == len(theirs)
            for position, (got, want) in enumerate(zip(ours, theirs, strict=True)):
                if isinstance(want, list):
                    assert want == ["at", 0]
                    assert int(got) % 16 == 0
                elif position in (6, 7, 8):  # metadata and hooks, which have no calls
                    assert got == "None"
                else:
                    assert got == want, (name, position)


@pytest.mark.slow
def test_the_command_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['benchmarks', 'host', '--rounds', '3', '--calls', '20', '--out', {str(tmp_path)!r}]\n"
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    assert "launches: left out" in _python(code)
    rows = json.loads((tmp_path / "cpu" / "host.json").read_text())["rows"]
    us = {(row["call"], row["route"]): row["us"] for row in rows}
    assert len(us) == 15
    for name, route in us:
        if route == "direct":
            assert us[name, "direct"] < us[name, "dispatcher"], name


_KEYS = """
import torch
from triton.compiler import compiler

keys = []
key_of = compiler.ASTSource.hash
compiler.ASTSource.hash = lambda source: keys.append(key_of(source)) or keys[-1]

from benchmarks.speed.host_stub import stubbed_gpu
from sliderquant_kernels import WeightLayout, weight_only_linear
from sliderquant_kernels.common.compiling import compile_launch
from sliderquant_kernels.tools.launches import describe_launch
from sliderquant_kernels.tools.problems import Case
from sliderquant_kernels.weight_only.tiles import Problem

for n, k in ((256, 256), (40, 520)):
    with stubbed_gpu():
        layout = WeightLayout("triton", 4, n, k, None, False)
        codes = torch.zeros(n, k, dtype=torch.uint8)
        packed = layout.pack(codes, torch.ones(n, 1).bfloat16(), torch.zeros(n, 1, dtype=torch.uint8))
        weight_only_linear(torch.zeros(3, k).bfloat16(), packed, layout)
    problem = Problem(3, n, k, 4, None, False, torch.bfloat16)
    launched = keys[-1]
    compile_launch(describe_launch(Case("weight_only_linear", problem), 90), 90)
    print(launched == keys[-1], len(keys))
"""


def test_what_is_compiled_beforehand_is_found_when_it_is_launched():
    """Triton's cache is looked up by what a launch specializes for, which a release may write down in another way."""
    assert _python(_KEYS).splitlines() == ["True 2", "True 4"]
