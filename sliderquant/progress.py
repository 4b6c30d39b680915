"""What a long run tells whoever started it. The default says nothing; the command line draws bars or prints lines."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Progress", "WindowReport"]


@dataclass
class WindowReport:
    """One stage of one window, for the report.

    Attributes:
        fraction: share of the input channels that was quantized.
        losses: mean squared error of each epoch.
        retries: attempts thrown away because of a non-finite loss.
    """

    layers: list[int]
    phase: str
    sweep: int
    fraction: float
    losses: list[float] = field(default_factory=list)
    retries: int = 0
    rate_scale: float = 1.0
    converged: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Progress:
    """Called by long runs; override what is of interest."""

    def run_started(self, steps: int, work: int) -> None:
        """`steps` optimizer steps are ahead; `work` counts each of them once for every layer of its window."""

    def window_started(self, label: str, number: int, total: int) -> None:
        """A stage of a window begins, the `number`-th (from 1) of `total`."""

    def epoch_done(self, steps: int, work: int, loss: float) -> None:
        """An epoch of `steps` optimizer steps, `work` of the whole work, ended with this mean loss."""

    def window_done(self, report: WindowReport) -> None:
        """A stage of a window ended."""

    def layer_written(self, done: int, total: int) -> None:
        """`done` of `total` layers are in the checkpoint."""

    def evaluated(self, done: int, total: int) -> None:
        """`done` of `total` blocks of text are measured."""

    def message(self, text: str) -> None:
        """A line worth reading."""
