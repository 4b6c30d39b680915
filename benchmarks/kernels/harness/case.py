"""What is measured: a case, and the providers that compute it. An op is a module with the functions of `Op`.

Timing, checking, resuming and reporting know no op: they see cases, prepared calls and what those must return.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .checking import Expected

__all__ = [
    "Arithmetic", "Case", "Goal", "Op", "Plan", "Prepared", "Provider", "Task", "Unsupported", "Work", "generator",
    "timings",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Unsupported(Exception):
    """A provider does not compute a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One problem: an op on operands of one shape, for m tokens. `layer` only tells people where it occurs."""

    op: str
    layer: str
    shape: tuple[int, ...]
    m: int
    scheme: str
    dtype: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this case from others."""
        return self.op, "x".join(map(str, self.shape)), self.m, self.scheme, self.dtype

    def columns(self) -> dict[str, Any]:
        """The case as columns of a row."""
        op, shape, m, scheme, dtype = self.key
        return {"op": op, "layer": self.layer, "shape": shape, "m": m, "scheme": scheme, "dtype": dtype}


@dataclass(frozen=True)
class Arithmetic:
    """Where a provider rounds to 16 bits, apart from its 32-bit accumulator: decides how far its result may be off."""

    weight_roundings: int = 0  # of a dequantized weight
    offset_roundings: int = 0  # of a zero-point times its scale, where a provider stores that product
    output_roundings: int = 1


@dataclass(frozen=True)
class Prepared:
    """A provider's packed operands and its call on them.

    tensors: what one call reads besides the activations; they are copied to keep the cache cold.
    call: (activations, tensors) -> result; capturable in a CUDA graph.
    arithmetic: m -> where it rounds, which may depend on the kernel that m tokens get.
    weight: `[N, K]`, for providers that quantize in a way of their own; None: the case's own weight.
    note: m -> what is worth knowing about the call, such as the kernel that was chosen.
    compared: what of the result is compared with fp64, `[M, N]`.
    cold: whether the tensors must come from memory; without it they stay in the cache.
    """

    tensors: tuple[Tensor, ...]
    call: Callable[[Tensor, tuple[Tensor, ...]], Any]
    arithmetic: Callable[[int], Arithmetic] = lambda m: Arithmetic()
    weight: Tensor | None = None
    note: Callable[[int], str] = lambda m: ""
    compared: Callable[[Any], Tensor] = lambda result: result
    cold: bool = True

    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


@dataclass(frozen=True)
class Provider:
    """Something that computes an op.

    prepare: operands -> Prepared; raises Unsupported for what it does not compute.
    distribution: the package that must be installed, pinned to the version that the adapter was written for.
    peer: somebody else's kernel for the same job, to be compared with.
    computes: how what it computes differs from the case's scheme; empty: not at all.
    compilation: for those that compile at the first call, what of a case the compiled code depends on; None: nothing is
        compiled. One case of each is called in parallel processes before anything is timed.
    accepts: why a case is not measured with it, or None.
    release: called when the graph that was timed is gone.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    devices: tuple[str, ...] = ("cuda",)
    distribution: str | None = None
    peer: bool = False
    computes: str = ""
    compilation: Callable[[Case], Hashable] | None = None
    accepts: Callable[[Case], str | None] = lambda case: None
    release: Callable[[], None] = lambda: None


class Work(NamedTuple):
    """What a call cannot avoid: each operand read once, the result written once, and the arithmetic."""

    bytes: int
    flops: float


class Task(NamedTuple):
    """What a worker is asked for. kind: `check` compares, `time` compares and times, `warm` calls, which compiles."""

    kind: str
    case: Case
    provider: str


def timings(cases: Iterable[Case], providers: Mapping[str, Provider], device: str) -> Iterator[Task]:
    """Each case timed with each provider that takes it on the device."""
    for case in cases:
        for name, provider in providers.items():
            if device in provider.devices and provider.accepts(case) is None:
                yield Task("time", case, name)


class Plan(NamedTuple):
    """What a subset consists of, most important first."""

    checks: list[Task]
    timings: list[Task]


class Goal(NamedTuple):
    """A target and what was measured; None where it was not."""

    text: str
    target: float
    measured: float | None
    at_least: bool
    where: str

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached, None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


class Op(Protocol):
    """What a module must offer to be measured."""

    NAME: str
    PROVIDERS: dict[str, Provider]
    # The provider on each device type that ratios are taken to.
    BASELINE: dict[str, str]

    def subsets(self, device: str) -> Sequence[str]:
        """Names of the subsets, for a device type."""

    def plan(self, subset: str, device: str) -> Plan:
        """The rows of a subset."""

    def operands_key(self, case: Case) -> Hashable:
        """Cases with equal keys share their operands and what providers prepared from them."""

    def operands(self, case: Case, device: torch.device) -> Any:
        """Random operands."""

    def activations(self, case: Case, operands: Any) -> Tensor:
        """The call's activations."""

    def expected(self, operands: Any, activations: Tensor, prepared: Prepared) -> Expected:
        """What the call must return, and how far it may be off."""

    def work(self, case: Case, prepared: Prepared) -> Work:
        """Bytes and operations of a call."""

    def goals(self, rows: list[dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[Goal]:
        """What was aimed at, and what the rows say."""


def generator(case: Case, device: torch.device) -> torch.Generator:
    """A generator that the same case always gets."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(case.key).encode()))
