"""The walk over the model: embed, slide the windows, hand over each layer as soon as no window needs it any more."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sliderquant.activation_clipping import ActivationClipping
from sliderquant.calibration.streams import ActivationStream
from sliderquant.checkpoint.packing import INPUT_CLIP
from sliderquant.clipping import start_from_search
from sliderquant.compiling import can_compile
from sliderquant.models.decoder import Decoder
from sliderquant.modules.attention import AttentionRounding, round_layer
from sliderquant.modules.rotated import insert_rotation
from sliderquant.planning import Plan
from sliderquant.progress import Progress, WindowReport
from sliderquant.refine import (
    RefinedLinear,
    SharedInput,
    WeightGroup,
    generator_for,
    learned_state,
    refined_linears,
    restore_learned,
)
from sliderquant.scales import Site, insert_scales, scale_sites, start_from_statistics
from sliderquant.schemes import Scheme
from sliderquant.settings import Settings
from sliderquant.train import Stage, WindowLayers, train_stage
from sliderquant.windows import Window

__all__ = ["refine_model", "refined_layer", "stored_clips"]


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


def refined_layer(plan: Plan, decoder: Decoder, index: int, seed: int, device: torch.device) -> nn.Module:
    """Decoder layer `index` with refined linears in the places of its linears, and with the rotations and roundings
    that the model computes while it runs."""
    assert isinstance(plan.settings, Settings)
    layer, family, rotations = decoder.layer(index), plan.source.family, plan.rotations
    prefix = f"{family.layers}.{index}."
    compiled = _compiles(plan, device)
    # With --per-channel-fallback linears that share an input may differ in grouping, never in how it is rounded.
    shared: dict[str, SharedInput] = {}
    clips = plan.clips_activations
    start = plan.settings.activation_clipping_start
    for names in (*family.shared_inputs, *((name,) for name in family.linears)):
        if names[0] not in shared:
            clipping = ActivationClipping(start) if clips and plan.scheme.quantizes_activations else None
            shared |= dict.fromkeys(names, SharedInput(len(names), clipping))
    groups: dict[tuple[int, Scheme], WeightGroup] = defaultdict(WeightGroup)
    for name in family.linears:
        linear = layer.get_submodule(name)
        scheme = plan.schemes[prefix + name]
        refined = RefinedLinear(
            linear.weight,  # type: ignore[arg-type]
            linear.bias,  # type: ignore[arg-type]
            scheme,
            plan.source.dtype,
            plan.settings,
            generator_for(seed, prefix + name),
            shared[name],
            groups[linear.weight.shape[1], scheme],  # type: ignore[index]
        )
        refined.compiled = compiled
        layer.set_submodule(name, refined)
    if plan.settings.scales.used_with(plan.scheme):
        log = plan.settings.scales.space == "log"
        insert_scales(layer, _sites(plan), refined_linears(layer), log, plan.source.dtype)
    insert_rotation(layer, index, family, rotations)
    round_layer(layer, index, family, plan.scheme.kv_bits, rotations)
    if plan.scheme.quantizes_attention:
        rounding: AttentionRounding = layer.get_submodule(family.attention).rounding  # type: ignore[assignment]
        rounding.compiled = compiled
        if clips:
            rounding.learn_clips(start)
    return layer.to(device)


@torch.no_grad()
def stored_clips(layer: nn.Module) -> dict[str, Tensor]:
    """By name of the tensor in a refined decoder layer, what is stored of the learned clipping of activations, queries,
    keys and values, fp32 `[2]`: see `sliderquant.activation_clipping`."""
    linears = refined_linears(layer)
    clips = {f"{name}.{INPUT_CLIP}": linear.input_clipping for name, linear in linears.items()}
    for name, child in layer.named_modules():
        if isinstance(child, AttentionRounding):
            attention = name.rpartition(".")[0]
            clips |= {f"{attention}.{site}_clip": clip for site, clip in child.learned_clips.items()}  # type: ignore[misc]
    return {name: clip.stored() for name, clip in clips.items() if clip is not None}


@contextmanager
def starting(plan: Plan, layer: nn.Module) -> Iterator[None]:
    """Within it the unquantized layer sees its calibration inputs; then what is learned is where it starts."""
    settings, linears = plan.settings, refined_linears(layer)
    assert isinstance(settings, Settings)
    with ExitStack() as stack:
        if settings.clipping and settings.clipping_start == "search":
            stack.enter_context(start_from_search(linears))
        # Left first: the clipping is searched for scaled weights.
        if settings.scales.used_with(plan.scheme) and settings.scales.start != "ones":
            outliers_only = settings.scales.start == "outliers"
            stack.enter_context(start_from_statistics(layer, _sites(plan), linears, outliers_only))
        yield
    for linear in linears.values():
        linear.start()


def _sites(plan: Plan) -> dict[str, Site]:
    rotated = plan.rotations is not None and "R4" in plan.rotations.transforms
    return scale_sites(plan.source.family, plan.source.config, rotated)


def _compiles(plan: Plan, device: torch.device) -> bool:
    """Whether the quantizers are compiled: it takes some 10 s, and is taken to save, in every step and for every
    layer, 0.15 ms a linear and 3 ns a weight: an estimate, which only has to tell long runs from short ones. On a GPU
    it has not been tried yet: there it is when it is asked for."""
    assert isinstance(plan.settings, Settings)
    if plan.settings.compile == "always":
        return can_compile(device.type, plan.source.dtype)
    if plan.settings.compile == "never" or device.type != "cpu":
        return False
    weights = sum(math.prod(plan.source.shapes[f"{name}.weight"][0]) for name in plan.source.linear_names(0))
    saved = plan.work * (1.5e-4 * len(plan.source.family.linears) + 3e-9 * weights)
    return saved > 10 and can_compile(device.type, plan.source.dtype)


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
        samples, self.inputs = decoder.embed(blocks)
        limit = settings.stream_memory_gb * 1e9 / 3
        self.fp = ActivationStream(len(blocks), plan.seqlen, plan.source.config.hidden_size, memory_limit=limit)
        self.quant, self.targets = self.fp.like(), self.fp.like()
        self.fp.fill(samples)
        self.quant.data.copy_(self.fp.data)
        self.resident: dict[int, nn.Module] = {}
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
                self.leave(index, self.resident.pop(index))
        finally:
            for stream in (self.fp, self.quant, self.targets):
                stream.close()

    def _window(self, window: Window) -> WindowLayers:
        for index in window.layers:
            if index not in self.resident:
                layer = refined_layer(self.plan, self.decoder, index, self.seed, self.device)
                if index in self.learned:
                    restore_learned(layer, self.learned[index])
                else:
                    self.new.append(index)
                self.resident[index] = layer
        layers = [self.resident[index] for index in window.layers]
        return WindowLayers(layers, [self.inputs.arguments[index] for index in window.layers])

    def _output(self, window: Window) -> Callable[[Tensor], Tensor] | None:
        """What turns the outputs of the window into logits, if it is to match these."""
        if self.settings.last_loss == "hidden" or window.stop < len(self.decoder.layers):
            return None
        norm, head = self.decoder.output()
        return lambda hidden: head(norm(hidden))

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
