"""What a long run tells whoever started it. The default says nothing; the command line draws bars or prints lines."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerReport", "Progress", "WindowReport"]


@dataclass
class WindowReport:
    """One stage of one window, for the report.

    Attributes:
        fraction: share of the input channels that was quantized.
        losses: mean squared error of each epoch.
        retries: attempts thrown away because of a non-finite loss.
        seconds: that it took.
        tokens_per_second: calibration tokens that passed through the window, forward and backward, in a second.
    """

    layers: list[int]
    phase: str
    sweep: int
    fraction: float
    losses: list[float] = field(default_factory=list)
    retries: int = 0
    rate_scale: float = 1.0
    converged: bool = True
    seconds: float = 0.0
    tokens_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class LayerReport:
    """One layer that a one-shot method quantized, for the report.

    Attributes:
        error: squared error of the layer's output over that of its inputs, the already quantized layers' output,
            relative to the squared norm of what the original layer makes of them; None: not finite.
        linears: by name in the layer: `error`, the same of the linear's output with nothing but its weight rounded, and
            what else the method says; `trouble`, where there was any.
        scales: by site, what the method says about channel scales.
    """

    layer: int
    error: float | None
    linears: dict[str, dict[str, Any]]
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Progress:
    """Called by long runs; override what is of interest."""

    def run_started(self, steps: int, work: float) -> None:
        """`steps` optimizer steps are ahead; `work` counts each of them as `sliderquant.planning.plan.Plan.work_of`."""

    def window_started(self, label: str, number: int, total: int) -> None:
        """A stage of a window begins, the `number`-th (from 1) of `total`."""

    def epoch_done(self, steps: int, work: float, loss: float) -> None:
        """An epoch of `steps` optimizer steps, `work` of the whole work, ended with this mean loss."""

    def window_done(self, report: WindowReport) -> None:
        """A stage of a window ended."""

    def layer_quantized(self, report: LayerReport, total: int) -> None:
        """A one-shot method is done with one of `total` layers."""

    def layer_written(self, done: int, total: int) -> None:
        """`done` of `total` layers are in the checkpoint."""

    def evaluated(self, done: int, total: int) -> None:
        """`done` of `total` blocks of text are measured."""

    def layer_passed(self, done: int, total: int) -> None:
        """`done` of `total` passes of a block of text through a layer or the head are done."""

    def kernels_compiled(self, done: int, total: int) -> None:
        """`done` of `total` kernels are compiled."""

    def message(self, text: str) -> None:
        """A line worth reading."""
