"""The whole command on a CPU, in seconds: rows, resuming, absent peers, tables and pictures."""

import argparse
import json
import time
from dataclasses import replace
from itertools import pairwise, product
from typing import ClassVar

import pytest

from benchmarks.kernels import command, report
from benchmarks.kernels.harness.floors import Floors
from benchmarks.kernels.measure import Measurer
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.weight_only.providers import ours
from sliderquant_kernels.common import choices
from sliderquant_kernels.weight_only import tiles

MACHINE = {"gpu": "Fake GPU", "threads": 1, "cores": 16, "cpu": "x86", "memory_bytes": 80e9}
VARIANT_OF = {"sliderquant": None, **{ours.name_of(variant): variant for variant in tiles.VARIANTS}}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """`arguments(*words)`: parsed, with results into a folder of the test, on a machine without a GPU; of one op unless
    words ask for others."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # The sources may be edited while the tests run.
    monkeypatch.setattr("benchmarks.kernels.harness.machine._source_digest", lambda package: "0123")

    def parse(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        op = [] if "--op" in words else ["--op", "weight_only_linear"]
        return parser.parse_args(["--subset", "tiny", "--out", str(tmp_path), *op, *words])

    return parse


class InThisProcess:
    """Workers without processes, and with floors that need no measuring."""

    def __init__(self, count, setup, arguments):
        self.arguments = arguments
        self._answer = setup(*arguments)
        self._answer.cache_bytes = 1 << 20  # or the copies of tiny tensors take seconds to make

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def ask(self, task, timeout):
        if task == "floors" and isinstance(self._answer, Measurer):
            return Floors(20.0, 0.2, 0.0)
        return self._answer(task)

    def run(self, tasks, timeout, until=None):
        for task in tasks:
            yield task, None if until is not None and time.monotonic() > until else self.ask(task, timeout)


class FakeGpu:
    """A measurer whose kernels take `slowness` times their floor; asked for what it was asked."""

    slowness: ClassVar = {"cublas": 1.1, "sliderquant": 1.25, "humming": 1.3}

    def __init__(self, device, settings, roof=None):
        assert device == "cuda"
        self.asked, self.floors = [], Floors(4000.0, 800.0, 1.5)

    def __call__(self, task):
        if isinstance(task, str):
            return MACHINE if task == "machine" else self.floors
        FakeGpu.asked.append(task)
        accuracy = {"relative_error": 1e-3, "tolerance": 4e-3, "worst_element": 0.5}
        row = {**task.case.columns(), "provider": task.provider, "kind": task.kind, "status": "ok", **accuracy}
        if task.kind != "time":
            return row
        n, k = task.case.shape
        weight_bytes = n * k * (2 if task.provider == "cublas" else int(task.case.scheme[1]) / 8)
        work = {"bytes": weight_bytes + 2 * task.case.m * (n + k), "flops": 2.0 * task.case.m * n * k}
        us = self.slowness.get(task.provider, 2.0) * self.floors.floor_us(**_floor_arguments(work))
        return {**row, **work, "weight_bytes": weight_bytes, "q20_us": us, "q50_us": us, "q80_us": us}


def _floor_arguments(work):
    return {"work_bytes": work["bytes"], "flops": work["flops"]}


@pytest.fixture
def fake_gpu(arguments, in_this_process, monkeypatch):
    """A machine with a GPU, and what it was asked so far."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Fake GPU")
    monkeypatch.setattr(command, "setup", FakeGpu)
    monkeypatch.setattr(FakeGpu, "asked", [], raising=False)
    monkeypatch.setattr(ours, "current_device", lambda: choices.Device.typical(90))
    monkeypatch.setattr("benchmarks.kernels.harness.machine.installed", lambda name: None if "==" in name else "1.0")
    return FakeGpu.asked


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(command, "Workers", InThisProcess)


@pytest.fixture
def result(tmp_path):
    return tmp_path / "cpu" / "kernels-tiny.json"


def test_floors_are_the_better_of_before_and_after(arguments, fake_gpu, tmp_path, monkeypatch):
    """What ran before may still be running when they are measured first."""
    found = iter([Floors(2500.0, 800.0, 2.0, 4200.0), Floors(4000.0, 700.0, 1.5, 4100.0)])
    ask = InThisProcess.ask

    def asked(self, task, timeout):
        return next(found) if task == "floors" else ask(self, task, timeout)

    monkeypatch.setattr(InThisProcess, "ask", asked)
    command.run(arguments())
    content = json.loads((tmp_path / "fake-gpu" / "kernels-tiny.json").read_text())
    better = {"copy_gbps": 4000.0, "matmul_tflops": 800.0, "empty_kernel_us": 1.5, "read_gbps": 4200.0}
    assert content["runs"][0]["floors"] == better
    row = next(row for row in content["rows"] if row["kind"] == "time")
    assert row["percent_of_copy"] == pytest.approx(100 * row["gbps"] / 4200, rel=1e-3)


def test_measure_resume_and_report(arguments, result, capsys):
    command.run(arguments())
    first = json.loads(result.read_text())
    assert {row["status"] for row in first["rows"]} == {"ok"}
    assert {row["provider"] for row in first["rows"]} == {"onednn", "sliderquant", "torch-int4"}
    assert all(row["q50_us"] > 0 and row["ratio_to_16bit"] > 0 and row["percent_of_floor"] > 0 for row in first["rows"])
    assert all(row["relative_error"] <= row["tolerance"] for row in first["rows"])
    run = first["runs"][0]
    assert run["device"] == "cpu"
    assert run["clocks"] is None
    assert run["floors"]["copy_gbps"] > 0
    assert {"torch", "sliderquant_kernels"} <= set(run["versions"])
    assert {goal["passed"] for goal in first["goals"]} == {None}
    assert not result.with_suffix(".journal").exists()
    printed = capsys.readouterr().out
    assert "no GPU: CPU routes" in printed
    assert "goals: they are for a GPU" in printed

    command.run(arguments())
    second = json.loads(result.read_text())
    times = [
        [(row["provider"], row["m"], row["q50_us"], row["run"]) for row in each["rows"]] for each in (first, second)
    ]
    assert times[0] == times[1]
    assert "us\n" not in capsys.readouterr().out.split("written to")[0]  # nothing was measured again

    written = report.report(result)
    assert written[0] == result.with_suffix(".md")
    assert len(written) == 1 + 2 * 3
    assert all(path.read_bytes().startswith(PNG) for path in written[1:])
    text = written[0].read_text()
    assert "## weight_only_linear W4A16-g128 bf16" in text
    assert "| tiny | 256x512 | 4 | sliderquant |" in text
    assert all(f"({path.name})" in text for path in written[1:])
    assert "14 of 14 results agree with fp64" in text


@pytest.mark.usefixtures("in_this_process")
def test_an_absent_peer_is_one_error_row_and_gone_when_it_comes(arguments, result, monkeypatch, capsys):
    op = OPS["weight_only_linear"]
    peer = replace(op.PROVIDERS["torch-int4"], distribution="no-such-peer==7.0")
    monkeypatch.setitem(op.PROVIDERS, "torch-int4", peer)
    command.run(arguments("--providers", "torch-int4"))
    rows = json.loads(result.read_text())["rows"]
    failed = [row for row in rows if row["provider"] == "torch-int4"]
    assert [(row["kind"], row["status"], row["error"]) for row in failed] == [
        ("provider", "error", "not installed: pip install no-such-peer==7.0")
    ]
    assert {row["provider"] for row in rows} == {"torch-int4", "onednn"}
    assert "absent: torch-int4: not installed" in capsys.readouterr().out
    assert (
        "| torch-int4 | error | not installed: pip install no-such-peer==7.0 | 1 |"
        in report.report(result, plots=False)[0].read_text()
    )

    monkeypatch.setitem(op.PROVIDERS, "torch-int4", replace(peer, distribution=None))
    command.run(arguments("--providers", "torch-int4"))
    found = [row for row in json.loads(result.read_text())["rows"] if row["provider"] == "torch-int4"]
    assert {(row["kind"], row["status"]) for row in found} == {("time", "ok")}


@pytest.mark.usefixtures("in_this_process")
def test_low_bit_ops_are_measured_and_reported(arguments, result, capsys):
    command.run(arguments("--op", "low_bit_linear", "quantize_activations"))
    rows = json.loads(result.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    found = {(row["op"], row["provider"]) for row in rows}
    assert found == {
        *product(["low_bit_linear"], ["onednn", "sliderquant", "sliderquant-unfused"]),
        *product(["quantize_activations"], ["copy", "sliderquant", "sliderquant-unfused"]),
    }
    assert all(row["ratio_to_16bit"] > 0 for row in rows if row["provider"] != "copy")
    assert "goals: they are for a GPU" in capsys.readouterr().out
    text, *pictures = report.report(result)
    assert "## low_bit_linear W4A4+rms_norm bf16" in text.read_text()
    assert "## quantize_activations A4+silu_mul bf16" in text.read_text()
    # What has no products is on no roofline, and one number of tokens makes no curve.
    assert {path.name.split("-")[2] for path in pictures} == {"low_bit_linear"}


def test_ops_take_turns_and_operands_stay():
    plans = [op.plan("quick", "cuda").timings for op in OPS.values()]
    mixed = command.interleave(plans)
    assert sorted(map(str, mixed)) == sorted(map(str, (task for plan in plans for task in plan)))
    for op, plan in zip(OPS, plans, strict=True):
        assert [task for task in mixed if task.case.op == op] == plan
        part = [task for task in mixed[: len(mixed) // 3] if task.case.op == op]
        assert 0.15 < len(part) / len(plan) < 0.55

    def changes(tasks):
        keys = [OPS[task.case.op].operands_key(task.case) for task in tasks]
        return sum(first != second for first, second in pairwise(keys))

    assert changes(mixed) == sum(map(changes, plans)) + len(plans) - 1


def test_providers_are_those_of_the_ops_that_are_asked():
    every = command.make_plan(OPS, "quick", "cuda", ["conch", "sliderquant:tiles"]).timings
    found = {(task.case.op, task.provider) for task in every}
    assert found == {
        ("weight_only_linear", "conch"), ("weight_only_linear", "cublas"),
        ("low_bit_linear", "sliderquant:tiles"), ("low_bit_linear", "cublas"),
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--providers conch: expected some of cublas, onednn, sliderquant"):
        command.make_plan(["low_bit_linear"], "quick", "cuda", ["conch"])


def test_rows_of_a_width_that_is_skipped_are_not_made(arguments):
    for word in ("weight_only_linear:2", "low_bit_linear:4", "quantize_activations:4"):
        op, width = word.split(":")
        skipped = arguments("--skip", word).skip
        whole, plan = (
            command.make_plan([op], "quick", "cuda", None),
            command.make_plan([op], "quick", "cuda", None, skipped),
        )
        for every, found in zip(whole, plan, strict=True):
            assert found == [task for task in every if task.case.scheme[1] != width]
            assert 0 < len(found) < len(every)
        # Of the other ops nothing is skipped.
        assert command.make_plan(["hadamard"], "quick", "cuda", None, skipped) == command.make_plan(
            ["hadamard"], "quick", "cuda", None
        )
    for wrong in ("weight_only_linear", "weight_only_linear:four", "linear:4"):
        with pytest.raises(SystemExit):
            arguments("--skip", wrong)


@pytest.mark.usefixtures("in_this_process")
def test_rows_of_other_versions_are_measured_again(arguments, result):
    command.run(arguments("--providers", "onednn"))
    content = json.loads(result.read_text())
    content["rows"][0]["version"] = "older"
    content["rows"][1]["q50_us"] = 1e9
    result.write_text(json.dumps(content))
    command.run(arguments("--providers", "onednn"))
    rows = json.loads(result.read_text())["rows"]
    assert sorted(row["run"] for row in rows) == [0] * (len(rows) - 1) + [1]
    assert max(row["q50_us"] for row in rows) == 1e9  # kept, although it cannot be


@pytest.mark.usefixtures("in_this_process")
def test_out_of_time_rows_are_left_for_the_next_start(arguments, result, capsys):
    command.run(arguments("--budget", "0.001"))
    assert json.loads(result.read_text())["rows"] == []
    assert "out of time: 14 rows" in capsys.readouterr().out
    command.run(arguments())
    assert len(json.loads(result.read_text())["rows"]) == 14


def test_on_a_gpu_checks_come_first_then_compilation_then_times_and_the_goals_last(
    arguments, fake_gpu, tmp_path, capsys
):
    command.run(arguments("--subset", "quick"))
    kinds = [task.kind for task in fake_gpu]
    assert kinds == sorted(kinds, key=["check", "warm", "time"].index)
    assert set(kinds) == {"check", "warm", "time"}
    # Everything that compiles is called once before anything is timed.
    ours_timed = [task for task in fake_gpu if task.kind == "time" and task.provider in VARIANT_OF]
    compiled = [ours.compilation(task.case, VARIANT_OF[task.provider]) for task in fake_gpu if task.kind == "warm"]
    assert len(compiled) == len(set(compiled)) < 80
    assert set(compiled) == {ours.compilation(task.case, VARIANT_OF[task.provider]) for task in ours_timed}

    content = json.loads((tmp_path / "fake-gpu" / "kernels-quick.json").read_text())
    absent = {row["provider"] for row in content["rows"] if row["kind"] == "provider"}
    assert absent == {"humming", "torchao", "mslk", "conch", "bitsandbytes"}
    assert not [task for task in fake_gpu if task.provider in absent]
    assert [goal["passed"] for goal in content["goals"]] == [True, True, True, False, True, True, True]
    last = capsys.readouterr().out.splitlines()[-7:]
    assert [line[:4] for line in last] == ["pass", "pass", "pass", "MISS", "pass", "pass", "pass"]
    assert last[0] == (
        "pass  W4A16-g128, M = 1, weights of 60 MB and up: of copy bandwidth: 0.800 "
        "(at least 0.75; worst of 1: 8192x28672, M = 1)"
    )
    assert last[3].startswith("MISS  W4A16-g128, M >= 2048: time of cuBLAS bf16 over ours: 0.880 (at least 0.9; ")

    fake_gpu.clear()
    command.run(arguments("--subset", "quick"))
    assert fake_gpu == []


@pytest.mark.parametrize(
    ("cores", "memory", "helpers"), [(16, 80e9, 14), (4, 80e9, 2), (16, 24e9, 4), (1, 2e9, 1), (64, 140e9, 14)]
)
def test_as_many_helpers_as_the_machine_carries(cores, memory, helpers):
    assert command.helpers_that_fit({"cores": cores, "memory_bytes": memory}) == helpers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--subset", "full"], "--subset: subset: expected one of quick, tiny on cpu, got 'full'"),
        (["--providers", "marlin"], "--providers marlin: expected some of cublas, onednn, sliderquant"),
    ],
)
def test_bad_arguments(arguments, words, message):
    with pytest.raises(SystemExit, match=message.replace("(", r"\(")):
        command.run(arguments(*words))


def test_report_without_files_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"no kernels-\*\.json in it; measure with python -m benchmarks kernels"):
        report.run(argparse.Namespace(folder=tmp_path, no_plots=True))
