"""What a long run tells whoever started it. The default says nothing; the command line draws bars or prints lines."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sliderquant.walk import WindowReport

__all__ = ["Progress"]


class Progress:
    """Called by long runs; override what is of interest."""

    def run_started(self, steps: int, work: int) -> None:
        """`steps` optimizer steps are ahead; `work` counts each of them once for every layer of its window."""

    def window_started(self, label: str, number: int, total: int) -> None:
        """A stage of a window begins, the `number`-th (from 1) of `total`."""

    def epoch_done(self, steps: int, work: int, loss: float) -> None:
        """An epoch of `steps` optimizer steps, `work` of the whole work, ended with this mean loss."""

    def window_done(self, report: "WindowReport") -> None:
        """A stage of a window ended."""

    def layer_written(self, done: int, total: int) -> None:
        """`done` of `total` layers are in the checkpoint."""

    def evaluated(self, done: int, total: int) -> None:
        """`done` of `total` blocks of text are measured."""

    def message(self, text: str) -> None:
        """A line worth reading."""
