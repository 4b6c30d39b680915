"""The walk over the model: embed, slide the windows, hand over each layer as soon as no window needs it any more."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sliderquant.calibration.layerwise import LayerwiseModel, RunningLayer
from sliderquant.models.decoder import Decoder
from sliderquant.planning.plan import Plan
from sliderquant.planning.settings import Settings
from sliderquant.planning.windows import Window
from sliderquant.progress import Progress, WindowReport
from sliderquant.refine.layer import learned_state, refined_layer, restore_learned, starting
from sliderquant.refine.window import Stage, WindowLayers, train_stage

__all__ = ["refine_model"]


def refine_model(
    plan: Plan,
    decoder: Decoder,
    blocks: Tensor,
    seed: int,
    device: torch.device,
    emit: Callable[[int, nn.Module], None],
    progress: Progress,
) -> list[WindowReport]:
    """Refine every window of the plan in order.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`.
        emit: is handed each finished layer in order: its index, and the module with `RefinedLinear`s in it.

    Returns:
        what happened in each stage of each window.
    """
    settings = plan.learning
    # With fewer epochs than stages the first ones have none.
    stages = [stage for stage in range(len(settings.stages)) if settings.epochs_of_stage(stage)]
    sweeps = [(stage,) for stage in stages] if settings.stage_order == "sweep" else [tuple(stages)]
    reports: list[WindowReport] = []
    learned: dict[int, dict[str, Tensor]] = {}
    for number, sweep in enumerate(sweeps):
        last = number == len(sweeps) - 1

        def leave(index: int, layer: nn.Module, last: bool = last) -> None:
            if last:
                emit(index, layer)
            else:
                learned[index] = learned_state(layer)

        _Sweep(plan, settings, decoder, blocks, seed, device, learned, leave)(sweep, number, reports, progress)
    return reports


class _Sweep:
    """One pass of the windows over the model, with one or more intra-layer stages in each window."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        decoder: Decoder,
        blocks: Tensor,
        seed: int,
        device: torch.device,
        learned: dict[int, dict[str, Tensor]],
        leave: Callable[[int, nn.Module], None],
    ) -> None:
        self.plan, self.settings, self.decoder = plan, settings, decoder
        self.seed, self.device, self.learned, self.leave = seed, device, learned, leave
        self.model = LayerwiseModel(decoder, blocks, plan.rotations, plan.scheme.kv_bits)
        self.fp = self.model.stream(settings.stream_memory_gb * 1e9 / 3)
        self.quant, self.targets = self.fp.like(), self.fp.like()
        self.quant.data.copy_(self.fp.data)
        self.resident: dict[int, RunningLayer] = {}
        self.new: list[int] = []  # of them, those that have not started

    def __call__(self, stages: tuple[int, ...], number: int, reports: list[WindowReport], progress: Progress) -> None:
        """Run these stages in every window, and add to the reports what happened."""
        fraction = self.settings.stages[stages[-1]]
        left = 0
        try:
            for window in self.plan.windows:
                while left < window.start:
                    self._advance(left, fraction)
                    left += 1
                layers = self._window(window)
                layers.set(quantized=False)
                with ExitStack() as stack:
                    for index in self.new:
                        stack.enter_context(starting(self.plan, self.resident[index]))
                    layers.walk(self.fp, self.settings.batch_size, self.device, into=self.targets)
                self.new.clear()
                for stage in stages:
                    label = f"{window} stage {stage + 1} of {len(self.settings.stages)}"
                    total = len(self.plan.windows) * min(len(self.settings.stages), self.settings.epochs)
                    progress.window_started(label, len(reports) + 1, total)
                    reports.append(self._train(window, layers, stage, number, label, progress))
                    progress.window_done(reports[-1])
            for index in sorted(self.resident):
                self.leave(index, self.resident.pop(index).module)
        finally:
            for stream in (self.fp, self.quant, self.targets):
                stream.close()

    def _window(self, window: Window) -> WindowLayers:
        for index in window.layers:
            if index not in self.resident:
                layer = refined_layer(self.plan, self.model, index, self.seed)
                if index in self.learned:
                    restore_learned(layer.module, self.learned[index])
                else:
                    self.new.append(index)
                self.resident[index] = layer
        return WindowLayers([self.resident[index] for index in window.layers])

    def _output(self, window: Window) -> Callable[[Tensor], Tensor] | None:
        """What turns the outputs of the window into logits, if it is to match these."""
        if self.settings.last_loss == "hidden" or window.stop < len(self.decoder.layers):
            return None
        norm, head = self.decoder.output()
        return lambda hidden: head(norm(hidden))

    def _advance(self, index: int, fraction: float) -> None:
        """Both streams pass through a layer that no window needs any more."""
        layer = self.resident.pop(index)
        alone = WindowLayers([layer])
        alone.set(quantized=False)
        alone.walk(self.fp, self.settings.batch_size, self.device)
        alone.set(quantized=True, fraction=fraction)
        alone.walk(self.quant, self.settings.batch_size, self.device)
        self.leave(index, layer.module)

    def _train(
        self, window: Window, layers: WindowLayers, stage: int, sweep: int, label: str, progress: Progress
    ) -> WindowReport:
        fraction = self.settings.stages[stage]
        epochs = self.settings.epochs_of_stage(stage)
        training = Stage(
            layers,
            self.quant,
            self.targets,
            fraction,
            epochs,
            self.settings,
            self.seed,
            label,
            self.device,
            self._output(window),
        )
        start = time.perf_counter()
        result = train_stage(
            training, lambda steps, loss: progress.epoch_done(steps, steps * self.plan.work_of(window), loss)
        )
        report = WindowReport(list(window.layers), window.phase, sweep, fraction, **asdict(result))
        report.seconds = time.perf_counter() - start
        tokens = len(self.quant.data) * self.plan.seqlen * len(result.losses) * (1 + result.retries)
        report.tokens_per_second = tokens / report.seconds
        return report
