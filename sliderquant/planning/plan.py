"""What a quantization run is going to do, worked out from headers alone before any long work starts."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from sliderquant.checkpoint.config import Entry
from sliderquant.checkpoint.readers import Reader, readers
from sliderquant.errors import InputError
from sliderquant.models.source import ModelSource
from sliderquant.planning.allocation import Allocation, check_average_bits
from sliderquant.planning.memory import choosing_files, choosing_memory, optimizer_bytes, refining_memory, trying_memory
from sliderquant.planning.methods import Method, check_scheme
from sliderquant.planning.request import Request
from sliderquant.planning.rotation_choice import RotationChoice, check_rotation_seeds
from sliderquant.planning.settings import OneShotSettings, Settings
from sliderquant.planning.windows import Window, schedule
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ModelScheme, Scheme, bits_by_kind
from sliderquant_kernels.activations.op import MAX_K

__all__ = ["Plan", "make_plan"]

MEASURED_SAMPLES = 16
"""Of the calibration samples, those that choices are measured on: seeds of rotations, bits of linears."""


@dataclass(frozen=True)
class Plan:
    """One run, settled.

    Attributes:
        source: the model, with its rotations folded in.
        request: what was asked for.
        seqlen: tokens of a calibration sample.
        schemes: full name of every linear that is quantized -> its scheme, in the order of the layers.
        windows: empty for a method that learns nothing.
        steps: optimizer steps of the whole run.
        layer_weights: quantized weights of a decoder layer, of the largest.
        memory_bytes: estimated peak of the run's own tensors, on the device where layers are refined.
        host_memory_bytes: estimated peak of the run's own tensors in host memory.
        optimizer_bytes: of these, the state of the optimizer: two moments of everything that is learned in the largest
            window.
        disk_bytes: size of the checkpoint's tensors.
        source_bytes: size of the model's tensors as they are now.
        allocation: the bits that were chosen; None: none, or not yet, and `schemes` and `disk_bytes` are those of a
            model where all linears have the scheme's bits.
        rotation_choice: what was measured of the seeds of rotations; None: one seed, or not yet, and `source` has the
            first.
    """

    source: ModelSource
    request: Request
    seqlen: int
    schemes: dict[str, Scheme]
    windows: tuple[Window, ...]
    steps: int
    layer_weights: int
    memory_bytes: int
    host_memory_bytes: int
    optimizer_bytes: int
    disk_bytes: int
    source_bytes: int
    allocation: Allocation | None = None
    rotation_choice: RotationChoice | None = None

    @property
    def scheme(self) -> ModelScheme:
        """What was asked for; single linears may differ, see `schemes`."""
        return self.request.scheme

    @property
    def method(self) -> Method:
        """The method."""
        return self.request.method

    @property
    def settings(self) -> Settings | OneShotSettings | None:
        """Those of the method; None for one that needs no calibration text."""
        return self.request.settings

    @property
    def learning(self) -> Settings:
        """The settings of a method that learns. Raises TypeError for another one."""
        if not isinstance(self.settings, Settings):
            raise TypeError(f"method {self.method.name} learns nothing")
        return self.settings

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return self.request.samples

    @property
    def average_bits(self) -> float | None:
        """At most so many bits for a weight on average, of a model whose linears get different bits: at least those of
        the scheme; None: all get those of the scheme."""
        return self.request.average_bits

    @property
    def work(self) -> float:
        """Of all steps, each counted as `work_of` its window: what the time goes by."""
        if not self.windows:
            return 0.0
        return self.steps / len(self.windows) * sum(map(self.work_of, self.windows))

    def work_of(self, window: Window) -> float:
        """What a step in the window takes, counted in layers. Where logits are matched the head counts too: as so many
        layers as it has times the weights of one."""
        if self.learning.last_loss == "hidden" or window.stop < self.source.num_layers:
            return float(len(window))
        config = self.source.config
        return len(window) + config.vocab_size * config.hidden_size / self.layer_weights

    @property
    def scheme_in_words(self) -> str:
        """Of all linears, or `W2A16 and more, 2.5 bits on average`."""
        if self.average_bits is None:
            return str(self.scheme)
        return f"{self.scheme} and more, {self.average_bits:g} bits on average"

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of weights of the linears that are quantized, by full name."""
        return {name: math.prod(self.source.shapes[f"{name}.weight"][0]) for name in self.schemes}

    @property
    def chooses_bits(self) -> bool:
        """Whether bits are to be chosen, which takes calibration text, and have not been yet."""
        return self.average_bits is not None and self.allocation is None

    @property
    def chooses(self) -> bool:
        """Whether anything is left to choose, which takes calibration text."""
        return self.chooses_rotation or self.chooses_bits

    @property
    def needs_text(self) -> bool:
        """Whether there has to be calibration text."""
        return self.method.engine != "rounding" or self.chooses

    @property
    def measured_samples(self) -> int:
        """Samples of the calibration text that choices are measured on."""
        return min(self.samples, MEASURED_SAMPLES)

    @property
    def chooses_rotation(self) -> bool:
        """Whether a seed of the rotations is to be chosen, which takes calibration text, and has not been yet."""
        return self.request.rotation_seeds > 1 and self.rotation_choice is None

    def with_rotation_seed(self, seed: int) -> "Plan":
        """The plan for the model with the same rotations, their signs from another seed."""
        assert isinstance(self.source, RotatedSource)
        return replace(self, source=self.source.with_seed(seed))

    def with_rotation_choice(self, choice: RotationChoice) -> "Plan":
        """The plan for the model rotated with the chosen seed."""
        return replace(self.with_rotation_seed(choice.seed), rotation_choice=choice)

    def with_allocation(self, allocation: Allocation) -> "Plan":
        """The plan with these bits.

        Raises:
            InputError: they are not of the plan's linears, are fewer than the scheme's, or exceed the budget.
        """
        allocation.check(self.scheme.linear, self.sizes)
        schemes = {name: replace(scheme, bits=allocation.bits[name]) for name, scheme in self.schemes.items()}
        disk_bytes = _disk_bytes(self.source, schemes)
        return replace(self, schemes=schemes, disk_bytes=disk_bytes, allocation=allocation)

    @property
    def file_bytes(self) -> int:
        """Of temporary files, while it is measured which linear needs which bits."""
        return choosing_files(self.source, self.measured_samples, self.seqlen) if self.chooses_bits else 0

    @property
    def largest_disk_bytes(self) -> int:
        """What the checkpoint's tensors take at most, whatever bits are chosen."""
        if not self.chooses_bits:
            return self.disk_bytes
        assert self.average_bits is not None
        weights = sum(self.sizes.values())
        # Every group has a zero-point of as many bits: 1/32 of the codes at most.
        return self.disk_bytes + math.ceil((self.average_bits - self.scheme.linear.bits) * weights / 8 * 33 / 32)

    @property
    def code_bits_per_weight(self) -> float:
        """Bits of the code of a quantized weight, on average."""
        sizes = self.sizes
        return sum(self.schemes[name].bits * size for name, size in sizes.items()) / sum(sizes.values())

    @property
    def kept(self) -> tuple[str, ...]:
        """Weights of two dimensions that stay as they are: embeddings and the head."""
        shapes = self.source.shapes
        quantized = {f"{name}.weight" for name in self.schemes}
        return tuple(name for name, (shape, _) in shapes.items() if len(shape) == 2 and name not in quantized)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a quantized weight, with its share of scales and zero-points."""
        shapes = {name: self.source.shapes[f"{name}.weight"][0] for name in self.schemes}
        scale_bytes = torch.finfo(self.source.dtype).bits // 8
        stored = sum(self.schemes[name].stored_bytes(shape[0], shape[1], scale_bytes) for name, shape in shapes.items())
        return 8 * stored / sum(math.prod(shape) for shape in shapes.values())

    @property
    def clips_activations(self) -> bool:
        """Whether clippings of activations, queries, keys and values are learned."""
        online = self.rotations is not None and bool(self.rotations.online)
        return isinstance(self.settings, Settings) and self.settings.clips_activations(self.scheme, online)

    @property
    def rotations(self) -> Rotations | None:
        """What is folded into the weights before they are quantized."""
        return self.source.rotations if isinstance(self.source, RotatedSource) else None

    @property
    def readers(self) -> list[Reader]:
        """Who reads the checkpoint, and what they compute with it."""
        entry = Entry(self.rotations, self.scheme.kv_bits, self.clips_activations)
        return readers(self.schemes.values(), entry, self.source.dtype)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for the report and for `--dry-run`."""
        return {
            "request": self.request.as_dict(),
            "model": self.source.name,
            "scheme": str(self.scheme),
            "scheme_in_words": self.scheme_in_words,
            "method": self.method.name,
            "effort": self.request.effort,
            "settings": None if self.settings is None else self.settings.model_dump(),
            "average_bits": self.average_bits,
            "allocation": None if self.allocation is None else self.allocation.as_dict(),
            "bits_by_kind": bits_by_kind(self.schemes),
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
            "rotation_choice": None if self.rotation_choice is None else self.rotation_choice.as_dict(),
            "layers": self.source.num_layers,
            "windows": [{"layers": list(window.layers), "phase": window.phase} for window in self.windows],
            "quantized": dict(Counter(f"{name.split('.', 3)[-1]}: {scheme}" for name, scheme in self.schemes.items())),
            "readers": [reader.as_dict() for reader in self.readers],
            "kept": list(self.kept),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "steps": self.steps,
            "memory_bytes": self.memory_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "code_bits_per_weight": self.code_bits_per_weight,
            "quantized_bits_per_weight": self.bits_per_weight,
            "source_bytes": self.source_bytes,
        }


def make_plan(source: ModelSource, request: Request) -> Plan:
    """Settle a run.

    Args:
        source: the model that the request names, with the rotations that it names.

    Raises:
        InputError: the group size does not divide some linear's input size, or that is too long for quantized
            activations; the method makes no sense with the scheme; samples, seqlen or average_bits out of range;
            rotation_seeds out of range, or several for a model that is not rotated.
    """
    scheme, settings, samples = request.scheme, request.settings, request.samples
    check_scheme(request.method, scheme)
    check_rotation_seeds(request.rotation_seeds, isinstance(source, RotatedSource))
    if request.average_bits is not None:
        check_average_bits(scheme, request.average_bits)
    if samples < 1:
        raise InputError(f"samples {samples}: expected at least 1")
    seqlen = source.default_seqlen if request.seqlen is None else request.seqlen
    if not 2 <= seqlen <= source.max_positions:
        raise InputError(f"seqlen {seqlen}: expected 2 to {source.max_positions}, the longest that the model takes")
    schemes = _schemes(source, scheme.linear, request.per_channel_fallback)
    windows: tuple[Window, ...] = ()
    steps = 0
    if isinstance(settings, Settings):
        windows = schedule(source.num_layers, **settings.windows.model_dump())
        steps = len(windows) * settings.epochs * math.ceil(samples / settings.batch_size)
    layer_weights = max(sum(math.prod(source.shape(layer, name)) for name in layer.linears) for layer in source.layers)
    device_bytes, host_bytes = refining_memory(source, scheme, settings, windows, samples, seqlen, layer_weights)
    measured = min(samples, MEASURED_SAMPLES)
    if request.average_bits is not None:
        choosing = choosing_memory(source, measured, seqlen, layer_weights)
        device_bytes, host_bytes = max(device_bytes, choosing[0]), max(host_bytes, choosing[1])
    if request.rotation_seeds > 1:
        trying = trying_memory(source, measured, seqlen, layer_weights)
        device_bytes, host_bytes = max(device_bytes, trying[0]), max(host_bytes, trying[1])
    settled = Plan(
        source=source,
        request=request,
        seqlen=seqlen,
        schemes=schemes,
        windows=windows,
        steps=steps,
        layer_weights=layer_weights,
        memory_bytes=device_bytes,
        host_memory_bytes=host_bytes,
        optimizer_bytes=optimizer_bytes(source, scheme, settings, windows),
        disk_bytes=_disk_bytes(source, schemes),
        source_bytes=sum(size for _, size in source.shapes.values()),
    )
    return settled if request.allocation is None else settled.with_allocation(request.allocation)


def _disk_bytes(source: ModelSource, schemes: dict[str, Scheme]) -> int:
    shapes = source.shapes
    kept = sum(size for _, size in shapes.values()) - sum(shapes[f"{name}.weight"][1] for name in schemes)
    scale_bytes = torch.finfo(source.dtype).bits // 8
    sizes = {name: shapes[f"{name}.weight"][0] for name in schemes}
    return kept + sum(schemes[name].stored_bytes(size[0], size[1], scale_bytes) for name, size in sizes.items())


def _schemes(source: ModelSource, scheme: Scheme, per_channel_fallback: bool) -> dict[str, Scheme]:
    shapes = source.shapes
    found: dict[str, Scheme] = {}
    misfits: dict[str, int] = {}
    for layer, linear in ((one, linear) for one in source.layers for linear in one.linears):
        name = layer.full(linear)
        if f"{name}.weight" not in shapes:
            raise InputError(f"{source.name}: tensor {name}.weight is missing from the safetensors files")
        in_features = shapes[f"{name}.weight"][0][1]
        found[name] = scheme
        if scheme.quantizes_activations and in_features > MAX_K:
            raise InputError(
                f"scheme {scheme}: {name} has {in_features} inputs, and tokens are quantized up to {MAX_K}: use "
                f"W{scheme.bits}A16"
            )
        if not scheme.fits(in_features):
            misfits[linear] = in_features
            found[name] = scheme.per_channel()
    if misfits and not per_channel_fallback:
        sizes = {shapes[f"{name}.weight"][0][1] for name in found}
        working = [f"g{size}" for size in scheme.fitting_group_sizes(math.gcd(*sizes))]
        listed = ", ".join(f"{name} ({size} inputs)" for name, size in misfits.items())
        raise InputError(
            f"scheme {scheme}: groups of {scheme.group_size} do not divide the inputs of {listed}; sizes that divide "
            f"every layer of this model: {', '.join(working) or 'none'}; or quantize per channel "
            f"({scheme.per_channel()}), or only these layers per channel with --per-channel-fallback"
        )
    return found
