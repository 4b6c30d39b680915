"""The walk over the model: embed, slide the windows, hand over each layer as soon as no window needs it any more."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sliderquant.calibration.streams import ActivationStream
from sliderquant.methods import Settings
from sliderquant.models.decoder import Decoder
from sliderquant.modules.attention import insert_rounding
from sliderquant.modules.rotated import OnlineRotation, RotatedLinear
from sliderquant.planning import Plan
from sliderquant.progress import Progress, WindowReport
from sliderquant.refine import RefinedLinear, generator_for, refined_linears
from sliderquant.train import Stage, WindowLayers, train_stage
from sliderquant.windows import Window

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
    assert isinstance(plan.settings, Settings)
    settings = plan.settings
    stages = settings.stages
    sweeps: Sequence[tuple[int, ...]] = (
        [(stage,) for stage in range(len(stages))] if settings.stage_order == "sweep" else [tuple(range(len(stages)))]
    )
    reports: list[WindowReport] = []
    learned: dict[int, dict[str, dict[str, Tensor]]] = {}
    for number, sweep in enumerate(sweeps):
        last = number == len(sweeps) - 1

        def leave(index: int, layer: nn.Module, last: bool = last) -> None:
            if last:
                emit(index, layer)
            else:
                learned[index] = {name: linear.learned() for name, linear in refined_linears(layer).items()}

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
        learned: dict[int, dict[str, dict[str, Tensor]]],
        leave: Callable[[int, nn.Module], None],
    ) -> None:
        self.plan, self.settings, self.decoder = plan, settings, decoder
        self.seed, self.device, self.learned, self.leave = seed, device, learned, leave
        samples, self.inputs = decoder.embed(blocks)
        limit = settings.stream_memory_gb * 1e9 / 3
        self.fp = ActivationStream(len(blocks), plan.seqlen, plan.source.config.hidden_size, memory_limit=limit)
        self.quant, self.targets = self.fp.like(), self.fp.like()
        self.fp.fill(samples)
        self.quant.data.copy_(self.fp.data)
        self.resident: dict[int, nn.Module] = {}

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
                layers.walk(self.fp, self.settings.batch_size, self.device, into=self.targets)
                for stage in stages:
                    label = f"{window} stage {stage + 1} of {len(self.settings.stages)}"
                    total = len(self.plan.windows) * len(self.settings.stages)
                    progress.window_started(label, len(reports) + 1, total)
                    reports.append(self._train(window, layers, stage, number, label, progress))
                    progress.window_done(reports[-1])
            for index in sorted(self.resident):
                self.leave(index, self.resident.pop(index))
        finally:
            for stream in (self.fp, self.quant, self.targets):
                stream.close()

    def _window(self, window: Window) -> WindowLayers:
        for index in window.layers:
            if index not in self.resident:
                self.resident[index] = self._refined_layer(index)
        layers = [self.resident[index] for index in window.layers]
        return WindowLayers(layers, [self.inputs.arguments[index] for index in window.layers])

    def _refined_layer(self, index: int) -> nn.Module:
        layer = self.decoder.layer(index)
        prefix = f"{self.plan.source.family.layers}.{index}."
        for name in self.plan.source.family.linears:
            linear = layer.get_submodule(name)
            refined = RefinedLinear(
                linear.weight,  # type: ignore[arg-type]
                linear.bias,  # type: ignore[arg-type]
                self.plan.schemes[prefix + name],
                self.plan.source.dtype,
                self.settings,
                generator_for(self.seed, prefix + name),
            )
            if index in self.learned:
                refined.restore(self.learned[index][name])
            layer.set_submodule(name, refined)
        self._insert_what_runs(index, layer)
        return layer

    def _insert_what_runs(self, index: int, layer: nn.Module) -> None:
        """The rotations and roundings that the model computes while it runs."""
        family, rotations = self.plan.source.family, self.plan.rotations
        down = None if rotations is None else rotations.down(index)
        if down is not None:
            rotated = RotatedLinear(layer.get_submodule(family.down), OnlineRotation(down))
            layer.set_submodule(family.down, rotated.to(self.device))
        if self.plan.scheme.quantizes_attention:
            rotation = None if rotations is None else rotations.query_key(index)
            online = None if rotation is None else OnlineRotation(rotation).to(self.device)
            insert_rounding(layer.get_submodule(family.attention), self.plan.scheme.kv_bits, online)

    def _advance(self, index: int, fraction: float) -> None:
        """Both streams pass through a layer that no window needs any more."""
        layer = self.resident.pop(index)
        alone = WindowLayers([layer], [self.inputs.arguments[index]])
        alone.set(quantized=False)
        alone.walk(self.fp, self.settings.batch_size, self.device)
        alone.set(quantized=True, fraction=fraction)
        alone.walk(self.quant, self.settings.batch_size, self.device)
        self.leave(index, layer)

    def _train(
        self, window: Window, layers: WindowLayers, stage: int, sweep: int, label: str, progress: Progress
    ) -> WindowReport:
        fraction = self.settings.stages[stage]
        epochs = self.settings.epochs_of_stage(stage)
        training = Stage(
            layers, self.quant, self.targets, fraction, epochs, self.settings, self.seed, label, self.device
        )
        result = train_stage(training, lambda steps, loss: progress.epoch_done(steps, steps * len(window), loss))
        return WindowReport(list(window.layers), window.phase, sweep, fraction, **asdict(result))
