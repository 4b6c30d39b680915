"""Makes rows, inside a worker process: prepare, compare with fp64, and only then time."""

from __future__ import annotations

import gc
import time
import traceback
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sliderquant_kernels.tools.timing import (
    Call,
    Cuda,
    Settings,
    Timing,
    copies_needed,
    copy_tensors,
    in_graphs,
    in_turns,
    quantiles,
)

from .harness import floors, machine
from .harness.case import Case, Op, Prepared, Task, Unsupported
from .harness.checking import Expected, Verdict, compare
from .harness.floors import Floors
from .harness.workers import Fatal
from .ops import OPS

__all__ = ["Measurer", "setup"]


# A peer that has never worked, as for want of a library or a compiler, is not tried more often: failing takes time.
MOST_FAILURES = 3


class Measurer:
    """Answers tasks with rows. Holds the operands of one key at a time, and what providers prepared from them."""

    def __init__(self, device: str, ops: dict[str, Op], settings: Settings, roof: Floors | None = None) -> None:
        # With its index, as the tensors on it have.
        self.device = torch.empty(0, device=device).device
        self.ops, self.settings = ops, settings
        self.cache_bytes = machine.cache_bytes(self.device)
        # Without a measurement, that of a small GPU: it only decides how many calls go into a graph.
        self.roof = roof or Floors(1000.0, 100.0, 0.0)
        self._key: Any = None
        self._operands: Any = None
        self._prepared: dict[str, Prepared] = {}
        self._copies: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
        self._expected: dict[Any, Expected] = {}
        self._case_key: Any = None
        self._activations: Tensor | None = None
        self._works: set[str] = set()
        self._failures: dict[str, list[str]] = defaultdict(list)

    def __call__(self, task: Task | str) -> Any:
        """A row for a task; for the words `machine` and `floors`, what these modules measure."""
        if task == "machine":
            return machine.describe(self.device)
        if task == "floors":
            self.roof = floors.measure(self.device)
            return self.roof
        assert isinstance(task, Task)
        started = time.perf_counter()
        row = {**task.case.columns(), "provider": task.provider, "kind": task.kind, "status": "ok"}
        failures = self._failures[task.provider]
        if len(failures) == MOST_FAILURES:
            return {**row, "status": "error", "error": f"not tried after {MOST_FAILURES} failures: {failures[-1]}"}
        try:
            with torch.inference_mode():
                row |= self._make(task)
            self._works.add(task.provider)
        except Unsupported as reason:
            row |= {"status": "unsupported", "error": str(reason)}
        except Exception as error:
            row |= {"status": "error", "error": describe_error(error)}
            if self._is_lost(error):
                raise Fatal(row) from error
            if self.ops[task.case.op].PROVIDERS[task.provider].peer and task.provider not in self._works:
                failures.append(row["error"])
        row["seconds"] = round(time.perf_counter() - started, 3)
        return row

    def calls(self, task: Task) -> list[Call]:
        """A task's call over each copy of its tensors, for timers other than ours."""
        op = self.ops[task.case.op]
        with torch.inference_mode():
            self._select(op, task.case)
            prepared = self._prepare(op, task.provider)
            assert self._activations is not None
            return self._rotated(prepared, self._activations)[0]

    def _make(self, task: Task) -> dict[str, Any]:
        op, case = self.ops[task.case.op], task.case
        self._select(op, case)
        prepared = self._prepare(op, task.provider)
        assert self._activations is not None
        x = self._activations
        if task.kind == "warm":
            prepared.call(x, prepared.tensors)
            self._synchronize()
            return {}
        verdict = self._check(op, case, task.provider, prepared, x)
        row: dict[str, Any] = {
            "relative_error": verdict.relative_error,
            "tolerance": verdict.tolerance,
            "worst_element": verdict.worst_element,
            "computes": op.PROVIDERS[task.provider].computes,
            "note": prepared.note(case.m),
        }
        if not verdict.correct:
            text = f"wrong: relative error {verdict.relative_error:.2e}, tolerance {verdict.tolerance:.2e}, "
            return {
                **row,
                "status": "error",
                "error": text + f"worst element {verdict.worst_element:.2g} times its limit",
            }
        if task.kind == "time":
            row |= self._time(op, case, task.provider, prepared, x)
        return row

    def _select(self, op: Op, case: Case) -> None:
        """Have the operands and activations of a case, and let go of others."""
        key = op.operands_key(case)
        if key != self._key:
            self._operands = self._activations = self._case_key = None
            self._prepared, self._copies, self._expected = {}, {}, {}
            self.free()
            self._operands, self._key = op.operands(case, self.device), key
        if case.key != self._case_key:
            self._expected.clear()
            self._activations, self._case_key = op.activations(case, self._operands), case.key

    def _prepare(self, op: Op, provider: str) -> Prepared:
        if provider not in self._prepared:
            self._prepared[provider] = op.PROVIDERS[provider].prepare(self._operands)
        return self._prepared[provider]

    def _check(self, op: Op, case: Case, provider: str, prepared: Prepared, x: Tensor) -> Verdict:
        # What those who do the same arithmetic must return is the same.
        key = (prepared.arithmetic(case.m), None if prepared.weight is None else provider)
        if key not in self._expected:
            self._expected[key] = op.expected(self._operands, x, prepared)
        expected = self._expected[key]
        # Memory that the result will probably get: an element that the kernel does not write is then not a number.
        stale = torch.full((case.m, expected.want.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
        del stale
        y = prepared.compared(prepared.call(x, prepared.tensors))
        self._synchronize()
        return compare(y, expected)

    def _time(self, op: Op, case: Case, provider: str, prepared: Prepared, x: Tensor) -> dict[str, Any]:
        work = op.work(case, prepared)
        calls, cache = self._rotated(prepared, x)
        if self.device.type == "cuda":
            for call in calls[:2]:
                call()
            timed = in_graphs(calls, self.roof.floor_us(*work), Cuda(), self.settings)
            op.PROVIDERS[provider].release()
        else:
            timed = self._against_baseline(op, provider, calls, x)
        q20, q50, q80 = quantiles(timed.samples)
        row: dict[str, Any] = {"q20_us": q20, "q50_us": q50, "q80_us": q80, "samples": len(timed.samples)}
        row |= {"calls_per_sample": timed.calls_per_sample, "timing": timed.method, "cache": cache}
        if timed.baseline is not None:
            row["baseline_us"] = quantiles(timed.baseline)[1]
        return {**row, "bytes": work.bytes, "flops": work.flops, "weight_bytes": prepared.bytes()}

    def _against_baseline(self, op: Op, provider: str, calls: list[Call], x: Tensor) -> Timing:
        name = op.BASELINE[self.device.type]
        if provider == name:
            return in_turns(calls, None, self.settings)
        baseline, _ = self._rotated(self._prepare(op, name), x)
        return in_turns(calls, baseline, self.settings)

    def _rotated(self, prepared: Prepared, x: Tensor) -> tuple[list[Call], str]:
        # Providers that read the same tensors share the copies.
        tensors = tuple(tensor.data_ptr() for tensor in prepared.tensors)
        if tensors not in self._copies:
            needed = copies_needed(prepared.bytes(), self.cache_bytes) if prepared.cold else 1
            self._copies[tensors] = copy_tensors(prepared.tensors, needed)
        copies = self._copies[tensors]
        megabytes = (
            f"{len(copies)} sets of {prepared.bytes() / 1e6:.1f} MB, {self.cache_bytes / 2**20:.0f} MiB of cache"
        )
        state = "cold: rotated over" if prepared.cold else "warm:"
        return [partial(prepared.call, x, tensors) for tensors in copies], f"{state} {megabytes}"

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory back, so that the next operands find it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _is_lost(self, error: Exception) -> bool:
        """Whether the device is of no more use to this process, as after an illegal memory access."""
        if self.device.type != "cuda":
            return False
        if isinstance(error, torch.cuda.OutOfMemoryError):
            self._key, self._operands, self._activations, self._case_key = None, None, None, None
            self._prepared, self._copies, self._expected = {}, {}, {}
            self.free()
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception:
            return True
        return False


def setup(device: str, settings: Settings, roof: Floors | None = None) -> Measurer:
    """A Measurer of all ops, for a process of its own."""
    if device == "cuda":
        torch.set_num_threads(1)  # Several processes share the CPU, and what counts runs on the GPU.
    # Every capture of a graph collects garbage: what the imports have made need not be looked at again.
    gc.collect()
    gc.freeze()
    return Measurer(device, OPS, settings, roof)


def describe_error(error: Exception) -> str:
    """One line: type, the first line of the message, and where it was raised."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}{where}"
