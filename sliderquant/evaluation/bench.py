"""Speed and memory of a checkpoint along the way that a user takes: load the folder, generate tokens."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sliderquant.devices import machine, resolve_device, versions
from sliderquant.errors import InputError, SliderQuantError
from sliderquant.evaluation.bench_worker import Job
from sliderquant.evaluation.models import is_quantized
from sliderquant.models.source import open_model
from sliderquant.progress import Progress

__all__ = ["DEFINITIONS", "Bench", "Metric", "bench"]

DEFINITIONS = (
    "load: seconds of sliderquant.load, or of from_pretrained, after imports; files in the page cache",
    "first token: seconds of generate for one token after a prompt of that length, batch 1",
    "decode: tokens a second of all sequences together in generate, from the first new token to the last",
    "memory: largest resident memory of the process, with Python and libraries; on CUDA allocated by PyTorch",
    "ratio: to the original, of speed (above 1 is faster) or of memory; the median over calls in turns, with quartiles",
)


@dataclass(frozen=True)
class Metric:
    """One figure of every subject.

    Attributes:
        name: of the row: `first token, 512`.
        unit: `s`, `tokens/s` or `MB`.
        values: by subject, median.
        ratio: quantized to original, of speed (more is faster) or of memory (less is smaller): the median of the ratios
            of calls that followed each other; None: there is no original.
        spread: the quartiles of these ratios, or their ends where there are fewer than four; None as well.
    """

    name: str
    unit: str
    values: dict[str, float]
    ratio: float | None = None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        subjects: `quantized` and, if it was asked for, `original`: the folder or hub id of each.
        metrics: the rows of the table.
        raw: by subject and name of the row, every value in the order in which it was measured.
        settings: lengths, batches, repeats, rounds, device and dtype.
    """

    subjects: dict[str, str]
    metrics: list[Metric]
    raw: dict[str, dict[str, list[float]]]
    settings: dict[str, Any]
    machine: dict[str, str]
    versions: dict[str, str]

    def metric(self, name: str) -> Metric:
        """The row of this name. Raises KeyError."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "definitions": list(DEFINITIONS)}


def bench(
    path: str | Path,
    against: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    prompts: Sequence[int] = (16, 128, 512, 2048),
    batches: Sequence[int] = (1, 8),
    new_tokens: int = Job.new_tokens,
    repeats: int = 4,
    rounds: int = 2,
    progress: Progress | None = None,
) -> Bench:
    """Measure loading, memory, time to first token and decoding of a checkpoint, and of the original beside it.

    Each of the two is loaded and run in a process of its own, whose memory is its own, and they take turns call by
    call, so that a change of the machine's speed hits both. Where both do not fit into memory, one process follows the
    other.

    Args:
        path: folder of a quantized checkpoint.
        against: folder or hub id of a model to compare with: the original, or another checkpoint.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        dtype: of both; `"auto"`: what a user gets who says nothing.
        prompts: prompt lengths in tokens; those that a model does not take are left out.
        batches: batch sizes for decoding.
        new_tokens: tokens that each sequence decodes.
        repeats: timed calls of each kind in a round, after one to warm up.
        rounds: how often both are loaded anew.

    Raises:
        InputError: an argument or a folder is not usable; before anything is measured.
        SliderQuantError: a process failed; the message ends with its last words.
    """
    target = resolve_device(device)
    for name, numbers, least in (("prompts", prompts, 1), ("batches", batches, 1)):
        if any(number < least for number in numbers):
            raise InputError(f"{name} {list(numbers)}: expected numbers of {least} or more")
    for name, number, least in (("new_tokens", new_tokens, 2), ("repeats", repeats, 1), ("rounds", rounds, 1)):
        if number < least:
            raise InputError(f"{name} is {number}: expected {least} or more")
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise InputError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    if not is_quantized(Path(path).expanduser()):
        raise InputError(f"{path}: not a quantized checkpoint; expected the folder that `sliderquant quantize` wrote")
    folders = {"quantized": Path(path).expanduser()}
    if against is not None:
        quantized = is_quantized(Path(against).expanduser())
        folders["original"] = Path(against).expanduser() if quantized else open_model(against).folder
    progress = progress or Progress()
    jobs = {name: Job(str(folder), str(target), dtype, 16, new_tokens) for name, folder in folders.items()}
    together = _fit_together(list(folders.values()), target)
    calls = [("first_token", length) for length in prompts] + [("decode", batch) for batch in batches]
    raw: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(1, rounds + 1):
        turns = [jobs] if together else [{name: job} for name, job in jobs.items()]
        for subjects in turns:
            progress.message(f"round {number} of {rounds}: {' and '.join(subjects)}")
            for name, found in _round(subjects, calls, repeats, raw).items():
                facts[name] = found
    settings = {
        "device": str(target),
        "dtype": dtype,
        "dtypes": {name: found["dtype"] for name, found in facts.items()},
        "prompts": list(prompts),
        "batches": list(batches),
        "decode_prompt": 16,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "rounds": rounds,
        "call_by_call": together,
        "threads": facts["quantized"]["threads"],
    }
    named = {"quantized": str(path), **({} if against is None else {"original": str(against)})}
    return Bench(named, _metrics(raw), raw, settings, machine(target), versions())


def _fit_together(folders: Sequence[Path], device: torch.device) -> bool:
    """Whether the models of these folders are in memory at once, with half as much again for what they compute."""
    needed = 1.5 * sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _round(
    jobs: Mapping[str, Job],
    calls: Sequence[tuple[str, int]],
    repeats: int,
    raw: dict[str, dict[str, list[float]]],
) -> dict[str, dict[str, Any]]:
    """Measure all calls of the subjects in turns, add the values to `raw`, and return the facts of each."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Process(job)) for name, job in jobs.items()}
        for name, worker in workers.items():
            raw[name].setdefault("load", []).append(worker.ask("load"))
        for call, size in calls:
            row = _ROWS[call].format(size)
            for repeat in range(repeats + 1):
                for name, worker in workers.items():
                    value = worker.ask(call, size)
                    if repeat > 0 and value is not None:
                        raw[name].setdefault(row, []).append(value)
        facts = {name: worker.ask("facts") for name, worker in workers.items()}
    for name, found in facts.items():
        raw[name].setdefault("weights", []).append(found["weight_bytes"] / 1e6)
        for phase, row in _MEMORY_ROWS.items():
            if phase in found["memory"]:
                raw[name].setdefault(row, []).append(found["memory"][phase] / 1e6)
    return facts


_ROWS = {"first_token": "first token, {}", "decode": "decode, batch {}"}
_MEMORY_ROWS = {
    "load": "memory while loading",
    "run": "memory while running",
    "device_load": "GPU memory while loading",
    "device_run": "GPU memory while running",
}


class _Process:
    """A `bench_worker` in a process of its own, which ends with the context."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> "_Process":
        command = [sys.executable, "-m", "sliderquant.evaluation.bench_worker"]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self._send(asdict(self.job))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            self.process.kill()
        self.log.close()

    def ask(self, name: str, *arguments: int) -> Any:
        """What the worker answers. Raises SliderQuantError with its last words when it does not."""
        self._send([name, *arguments])
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        words = self.log.read().strip().splitlines()[-1:] or [f"exit code {code}"]
        if code == -9:
            words = ["it was killed, most likely for want of memory"]
        raise SliderQuantError(f"{self.job.model}: {name} could not be measured: {words[0]}")

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer that does not come says why
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()


def _metrics(raw: Mapping[str, Mapping[str, list[float]]]) -> list[Metric]:
    """A row for every name that all subjects have values of."""
    first = next(iter(raw.values()))
    return [
        _metric(row, {name: values[row] for name, values in raw.items()})
        for row in first
        if all(row in values for values in raw.values())
    ]


def _metric(row: str, values: Mapping[str, list[float]]) -> Metric:
    seconds = row == "load" or row.startswith("first token")
    unit = "s" if seconds else "tokens/s" if row.startswith("decode") else "MB"
    medians = {name: statistics.median(found) for name, found in values.items()}
    if len(values) < 2:
        return Metric(row, unit, medians)
    ratios = [ours / other for ours, other in zip(values["quantized"], values["original"], strict=True)]
    if seconds:
        ratios = [1 / ratio for ratio in ratios]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 3 else [min(ratios), 0.0, max(ratios)]
    return Metric(row, unit, medians, statistics.median(ratios), (quartiles[0], quartiles[2]))
