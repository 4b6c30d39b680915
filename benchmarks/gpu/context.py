"""What a phase is given: where its rows go, how long it may take, and whether this is a rehearsal."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import faults
from .state import State

__all__ = ["Context", "OutOfTime"]


class OutOfTime(Exception):
    """Raised by a phase that has rows left to make: the run goes on with the next phase, and resuming comes back."""


class Context:
    """Attributes:
    state: the run's folder; other phases' rows are read from it.
    rehearsal: whether there is no GPU: kernels run in Triton's interpreter, and clocks are stubs.
    """

    def __init__(self, phase: str, state: State, ends: float, rehearsal: bool) -> None:
        """Args:
        ends: a time of time.monotonic, which is the same for all processes of a machine.
        """
        self.phase, self.state, self.rehearsal = phase, state, rehearsal
        self._ends = ends
        self._known = {row["key"] for row in state.rows(phase) if "key" in row}

    @property
    def device(self) -> torch.device:
        """The current CUDA device, or the CPU in a rehearsal."""
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", torch.cuda.current_device())

    @property
    def left(self) -> float:
        """Seconds."""
        return self._ends - time.monotonic()

    @property
    def ends(self) -> float:
        """A time of time.monotonic."""
        return self._ends

    def folder(self, name: str) -> Path:
        """A folder of the run for files of this phase."""
        path = self.state.folder / name
        path.mkdir(exist_ok=True)
        return path

    def has(self, key: str) -> bool:
        """Whether an earlier attempt has made this row."""
        return key in self._known

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row, at once and for good."""
        self.state.add(self.phase, {"key": key, **row})
        self._known.add(key)
        if self.phase in faults.given("crash"):
            os.abort()

    def need(self, seconds: float) -> None:
        """Raises OutOfTime with less than so many seconds left."""
        if self.left < seconds:
            raise OutOfTime(f"{self.left:.0f} s are left, {seconds:.0f} are needed to go on")
