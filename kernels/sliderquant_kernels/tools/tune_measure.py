"""Compiling, checking and timing candidates on the GPU at hand, for `tune`.

A candidate is timed only if it compiles without spilling and computes the right numbers. Each has a CUDA graph of at
least a millisecond, whose launches rotate over copies of the weight that exceed twice the L2 cache. The graphs take
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from ..common import workspace
from ..common.choices import Choice, Device, Problem
from ..common.launch_plan import PlanCache
from ..common.layout import PackedWeight
from ..weight_only.layout import WeightLayout
from . import timing, warming
from .inspect import inspect
from .launches import describe_launch
from .problems import Case

__all__ = ["DeviceLost", "Failure", "GpuMeasurer", "Measurer", "chosen"]

SETTINGS = timing.Settings(graph_us=1000.0, warm_us=10_000.0, budget_us=9000.0, fewest_samples=7, most_samples=15)
# Seconds for compiling one candidate; they take about one, and several when all cores compile.
COMPILE_SECONDS = 30.0
# Bytes and operations per microsecond that no GPU exceeds: they only decide how many launches go into a graph.
MOST_BYTES, MOST_OPERATIONS = 5e6, 1e9
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Elements of a weight that are unpacked to fp64 at a time: a quarter of a gigabyte.
_AT_ONCE = 1 << 25


class Failure(NamedTuple):
    """Why a candidate is not timed: `not compiled`, `wrong numbers` or `failed`, and the details."""

    status: str
    detail: str

    @property
    def late(self) -> bool:
        """Whether there was only no time: another run may have it."""
        return self.detail == warming.LATE


class DeviceLost(RuntimeError):
    """The GPU does nothing any more in this process, as after an illegal memory access by `choice`."""

    def __init__(self, choice: Choice, error: Exception) -> None:
        super().__init__(_first_line(error))
        self.choice = choice


class Measurer(Protocol):
    """What tuning needs of a GPU."""

    def compile(self, pairs: Sequence[tuple[Problem, Choice]], seconds: float | None) -> list[Failure | None]:
        """Compile in parallel, the first pairs first, for at most so many seconds; what went wrong with each pair."""

    def time(self, problem: Problem, choices: Sequence[Choice]) -> list[list[float] | Failure]:
        """Samples of each choice's microseconds per launch, all choices in turns.

        Raises:
            DeviceLost: nothing more can be measured.
        """


@dataclass(frozen=True)
class TileJob:
    """A launch to compile. Pickled by `warming`."""

    case: Case
    choice: Choice | None

    @property
    def name(self) -> str:
        return self.case.op

    def compile(self, arch: int) -> None:
        """Compile for an architecture such as 90, into Triton's cache. Raises what is wrong: it spills, for example."""
        row = inspect(self.case, f"sm_{arch}", self.choice)
        if row.error:
            raise RuntimeError(row.error)
        if row.spills:
            raise RuntimeError(f"spills {row.spills} bytes of registers a thread")


class GpuMeasurer:
    """Measures on the current CUDA device.

    Args:
        device: as the rules see it.
        cache_bytes: size of its L2 cache.
        timer: captures and times graphs.
        place: where tensors are; other than `cuda` only for tests.
        processes: that compile at a time; None: one for every core.
    """

    def __init__(
        self,
        device: Device,
        cache_bytes: int,
        timer: timing.Device | None = None,
        place: str = "cuda",
        processes: int | None = None,
        settings: timing.Settings = SETTINGS,
    ) -> None:
        self._device, self._cache_bytes, self._place = device, cache_bytes, torch.device(place)
        self._timer, self._processes, self._settings = timer or timing.Cuda(), processes, settings

    def compile(self, pairs: Sequence[tuple[Problem, Choice]], seconds: float | None) -> list[Failure | None]:
        """See `Measurer`. Problems whose sizes a kernel is not specialized for share one compilation."""
        jobs: dict[Any, TileJob] = {}
        keys = []
        for problem, choice in pairs:
            op = "dequantize" if choice.variant == "dense" else "weight_only_linear"
            job = TileJob(Case(op, problem), None if choice.variant == "dense" else choice)
            key = _kernel_key(job, self._device.arch)
            jobs.setdefault(key, job)
            keys.append(key)
        errors = warming.compile_each(
            list(jobs.values()), self._device.arch, self._processes, timeout=COMPILE_SECONDS, seconds=seconds
        )
        failed = {key: Failure("not compiled", error) for key, error in zip(jobs, errors, strict=True) if error}
        return [failed.get(key) for key in keys]

    def time(self, problem: Problem, choices: Sequence[Choice]) -> list[list[float] | Failure]:
        """See `Measurer`."""
        with torch.inference_mode():
            found = self._in_turns(_Operands.random(problem, self._place, self._cache_bytes), choices)
        # No graph is left that would use them.
        workspace.release_captured()
        if self._place.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _in_turns(self, operands: _Operands, choices: Sequence[Choice]) -> list[list[float] | Failure]:
        failures: dict[int, Failure] = {}
        graphs: dict[int, timing.Graph] = {}
        for number, choice in enumerate(choices):
            try:
                captured = self._capture(operands, choice)
            except Exception as error:  # a tile that this GPU does not launch
                self._check_device(choice, error)
                captured = Failure("failed", _first_line(error))
            if isinstance(captured, Failure):
                failures[number] = captured
            else:
                graphs[number] = captured
        samples: list[list[float]] = []
        if graphs:
            samples = timing.graphs_in_turns(list(graphs.values()), self._timer, self._settings)
        found = failures | dict(zip(graphs, samples, strict=True))
        return [found[number] for number in range(len(choices))]

    def _capture(self, operands: _Operands, choice: Choice) -> timing.Graph | Failure:
        from ..weight_only.launch import weight_only_linear

        plans = PlanCache()

        def call(weight: Tensor, scale: Tensor) -> Tensor:
            return weight_only_linear(operands.x, weight, scale, None, None, operands.layout, plans=plans)

        operands.poison(choice)
        with chosen(choice):  # by the plan, which later calls find
            y = call(*operands.copies[0])
        wrong = operands.wrong(y, choice)
        if wrong:
            return Failure("wrong numbers", wrong)
        calls = [partial(call, *copy) for copy in operands.copies]
        # Graphs that run one after the other may share counters, which every launch leaves at 0. Without that a
        # problem's graphs would use them up, and from then on every launch would clear its own.
        workspace.release_captured()
        return timing.capture_rounds(calls, operands.floor_us, self._timer, self._settings)

    def _check_device(self, choice: Choice, error: Exception) -> None:
        if self._place.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            raise DeviceLost(choice, error) from error


class _Operands(NamedTuple):
    """What the candidates of a problem compute with, and what has to come out.

    want: `[M, N]` fp64 from the codes themselves; magnitude: `[M, N]`, sum_k |x| |weight|, to which rounding errors are
    proportional; floor_us: the least that a launch can take.
    """

    problem: Problem
    layout: WeightLayout
    x: Tensor
    copies: list[tuple[Tensor, ...]]
    want: Tensor
    magnitude: Tensor
    floor_us: float

    @classmethod
    def random(cls, problem: Problem, place: torch.device, cache_bytes: int) -> _Operands:
        """x standard normal, codes and zero-points uniform."""
        p = problem
        layout = WeightLayout("triton", p.bits, p.n, p.k, p.group_size, p.symmetric)
        generator = torch.Generator(place).manual_seed(0)
        top, groups = 2**p.bits, (p.n, layout.groups)
        codes = torch.randint(0, top, (p.n, p.k), dtype=torch.uint8, device=place, generator=generator)
        scale = torch.rand(groups, device=place, generator=generator).add_(0.5).mul_(0.01).to(p.dtype)
        zero = torch.randint(0, top, groups, dtype=torch.uint8, device=place, generator=generator)
        zero_point = None if p.symmetric else zero
        x = torch.randn(p.m, p.k, device=place, generator=generator).to(p.dtype)
        packed: PackedWeight = layout.pack(codes, scale, zero_point)
        tensors = (packed.weight, packed.scale)
        size = sum(tensor.nbytes for tensor in tensors)
        copies = timing.copy_tensors(tensors, timing.copies_needed(size, cache_bytes))
        sums = []
        for compute in (reference.weight_only_linear, reference.magnitude):
            parts = []
            for rows in torch.arange(p.n).split(max(1, _AT_ONCE // p.k)):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                zeros = None if zero_point is None else zero_point[part]
                parts.append(compute(x, codes[part], scale[part], zeros, p.bits))
            sums.append(torch.cat(parts, 1))
        floor_us = max(size / MOST_BYTES, 2 * p.m * p.n * p.k / MOST_OPERATIONS)
        return cls(problem, layout, x, copies, sums[0], sums[1], floor_us)

    def poison(self, choice: Choice) -> None:
        """Fill the memory that a launch will probably be given: what it does not write is then not a number."""
        shape = self.want.shape
        stale = [self.x.new_full(shape, float("nan"))]
        if choice.split > 1:
            stale.append(self.x.new_full((choice.split, *shape), float("nan"), dtype=torch.float32))
        del stale

    def wrong(self, y: Tensor, choice: Choice) -> str:
        """What is wrong with a result, empty where nothing is.

        With u the unit roundoff of y: its own rounding errs by u |y|. fp32 sums of K products err by K 2^-24 of the
        magnitude at most, and the scale and its product by another 2^-23; `dense` rounds weights, which is u of the
        magnitude. These errors are independent, so that all elements together stay within 2 u, or within what sqrt(K)
        instead of K roundings of the sum make, where that is more.
        """
        u, k = UNIT_ROUNDOFF[self.problem.dtype], self.problem.k
        before_rounding = (k + 2) * 2.0**-24 + (u if choice.variant == "dense" else 0.0)
        limit = u * self.want.abs() + (1 + u) * before_rounding * self.magnitude
        # Below the smallest normal number steps no longer shrink.
        limit += torch.finfo(y.dtype).tiny * u
        if y.shape != self.want.shape:
            return f"a result of shape {tuple(y.shape)}, expected {tuple(self.want.shape)}"
        error = (y.double() - self.want).abs()
        outside = ~(error <= limit)  # also what is not a number
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            return (
                f"{int(outside.sum())} of {outside.numel()} elements, the first at [{row}, {column}]: "
                f"{y[row, column].item():.6g}, expected {self.want[row, column].item():.6g}"
            )
        norm = self.want.norm()
        relative = float(error.norm() / norm)
        most = max(2 * u, 2.0**-24 * k**0.5 * float(self.magnitude.norm() / norm))
        return "" if relative <= most else f"relative error {relative:.2e}, expected {most:.2e} at most"


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Launch by `choice` whatever the rules say."""
    from ..weight_only import launch

    before: Callable[..., Choice] = launch.choose
    launch.choose = lambda *_: choice
    try:
        yield
    finally:
        launch.choose = before


def _kernel_key(job: TileJob, arch: int) -> Any:
    """What the compiled kernel depends on."""
    launch = describe_launch(job.case, arch, job.choice)
    sizes = {name: (size == 1, size % 16 == 0) for name, size in launch.sizes.items()}
    name = launch.function.__name__
    return name, *(repr(sorted(found.items())) for found in (launch.types, sizes, launch.constants, launch.options))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
