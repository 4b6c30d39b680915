"""What a long run shows: bars on a terminal, a plain line now and then elsewhere, nothing with -q."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sliderquant.progress import LayerReport, Progress, WindowReport

__all__ = ["in_words", "shown_progress"]

_SECONDS_BETWEEN_LINES = 5.0


def shown_progress(quiet: bool, verbose: bool = False) -> "Bars | Lines | Silent":
    """The right kind for where stderr goes; a context manager."""
    if quiet:
        return Silent()
    if sys.stderr.isatty():
        return Bars(verbose)
    return Lines(verbose)


def _window_line(report: WindowReport) -> str:
    layers = report.layers
    named = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    line = f"{named}, {report.fraction:.0%} of the channels: loss {report.losses[0]:.4g} -> {report.losses[-1]:.4g}"
    speed = f", {report.seconds:.1f} s, {report.tokens_per_second:.0f} tokens/s"
    return line + speed + _trouble(report)


def _layer_line(report: LayerReport) -> str:
    error = "not finite" if report.error is None else f"{report.error:.3g}"
    troubles = [f"; {name}: {found['trouble']}" for name, found in report.linears.items() if "trouble" in found]
    return f"layer {report.layer}: relative error of its output {error}" + "".join(troubles)


def _troubled(report: LayerReport) -> bool:
    return report.error is None or any("trouble" in found for found in report.linears.values())


def _trouble(report: WindowReport) -> str:
    if not report.converged:
        return f"; not finite in {report.retries + 1} attempts: the window was left as it was"
    if report.retries:
        return f"; {report.retries} restarts after a non-finite loss, rates x {report.rate_scale:g}"
    return ""


def in_words(seconds: float) -> str:
    """About so long, in the unit that suits it."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    if seconds < 100 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


class _Counter:
    """How far the refining is."""

    def __init__(self, steps: int, work: float) -> None:
        self.steps, self.work = steps, work
        self.steps_done, self.work_done = 0, 0.0
        self.window = ""
        self.start = time.monotonic()

    def count(self, steps: int, work: float, loss: float) -> str:
        """Add an epoch; what there is to say about it. A repeated window must not count beyond the end."""
        self.steps_done = min(self.steps_done + steps, self.steps)
        self.work_done = min(self.work_done + work, self.work)
        return f"{self.window}, step {self.steps_done} of {self.steps}, loss {loss:.4g}"

    def seconds_left(self) -> float:
        return (time.monotonic() - self.start) / self.work_done * (self.work - self.work_done)


class Silent(Progress):
    """Shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Counting(Progress):
    """Knows how far the refining is, and says after the first window how long it will take."""

    windows_done = 0

    def run_started(self, steps: int, work: float) -> None:
        self.counter = _Counter(steps, work)

    def window_started(self, label: str, number: int, total: int) -> None:
        self.counter.window = f"window {number} of {total}, {label}"

    def window_done(self, report: WindowReport) -> None:
        self.windows_done += 1
        if self.windows_done == 1 and self.counter.work_done:
            self.message(
                f"refining takes {in_words(self.counter.seconds_left())} more, by the time of the first window"
            )


class Bars(_Counting):
    """Live bars of rich: optimizer steps with the loss, layers written, blocks evaluated."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.console = Console(stderr=True)
        self.bars = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def _update(
        self, name: str, total: float, done: float | None = None, advance: int | None = None, note: str = ""
    ) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, note=note)
        self.bars.update(self.tasks[name], total=total, completed=done, advance=advance, note=note)  # type: ignore[arg-type]
        if done is not None and done >= total:
            self.bars.remove_task(self.tasks.pop(name))  # type: ignore[arg-type]

    def epoch_done(self, steps: int, work: float, loss: float) -> None:
        note = self.counter.count(steps, work, loss)
        self._update("refining", self.counter.work, done=self.counter.work_done, note=note)

    def window_done(self, report: WindowReport) -> None:
        super().window_done(report)
        if self.verbose or report.retries:
            self.console.print(_window_line(report), markup=False, highlight=False)

    def layer_quantized(self, report: LayerReport, total: int) -> None:
        if self.verbose or _troubled(report):
            self.console.print(_layer_line(report), markup=False, highlight=False)

    def layer_written(self, done: int, total: int) -> None:
        self._update("layers written", total, done=done)

    def evaluated(self, done: int, total: int) -> None:
        self._update("blocks measured", total, done=done)

    def layer_passed(self, done: int, total: int) -> None:
        self._update("passes", total, done=done)

    def kernels_compiled(self, done: int, total: int) -> None:
        self._update("kernels compiled", total, done=done)

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


class Lines(_Counting):
    """Plain lines on stderr, at most one every few seconds for what repeats."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.last = 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES:
            return False
        self.last = now
        return True

    def epoch_done(self, steps: int, work: float, loss: float) -> None:
        note = self.counter.count(steps, work, loss)
        if self._due():
            self._print(f"{note}, {self.counter.seconds_left():.0f} s left")

    def window_done(self, report: WindowReport) -> None:
        super().window_done(report)
        if self.verbose or report.retries:
            self._print(_window_line(report))

    def layer_quantized(self, report: LayerReport, total: int) -> None:
        if self.verbose or _troubled(report) or self._due():
            self._print(f"{_layer_line(report)}; {report.layer + 1} of {total} layers")

    def layer_written(self, done: int, total: int) -> None:
        if done == total:
            self._print(f"{total} layers written")

    def evaluated(self, done: int, total: int) -> None:
        if done < total and self._due():
            self._print(f"measured {done} of {total} blocks")

    def layer_passed(self, done: int, total: int) -> None:
        if done < total and self._due():
            self._print(f"{done / total:.0%} of the passes done")

    def kernels_compiled(self, done: int, total: int) -> None:
        if done < total and self._due():
            self._print(f"compiled {done} of {total} kernels")

    def message(self, text: str) -> None:
        self._print(text)
