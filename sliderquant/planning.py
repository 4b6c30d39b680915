"""What a quantization run is going to do, worked out from headers alone before any long work starts."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from sliderquant.errors import InputError
from sliderquant.methods import Method, OneShotSettings, Settings, check_scheme
from sliderquant.models.source import ModelSource
from sliderquant.rotation import RotatedSource, Rotations
from sliderquant.schemes import Scheme
from sliderquant.windows import Window, schedule
from sliderquant_kernels.activations import MAX_K

__all__ = ["Plan", "make_plan"]

_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """One run, settled.

    Attributes:
        schemes: full name of every linear that is quantized -> its scheme, in the order of the layers.
        settings: those of the method; None for one that needs no calibration text.
        windows: empty for a method that learns nothing.
        steps: optimizer steps of the whole run.
        work: the same, each counted once for every layer of its window: what the time goes by.
        memory_bytes: estimated peak of the run's own tensors, on the device where layers are refined.
        host_memory_bytes: estimated peak of the run's own tensors in host memory.
        disk_bytes: size of the checkpoint's tensors.
        source_bytes: size of the model's tensors as they are now.
    """

    source: ModelSource
    scheme: Scheme
    schemes: dict[str, Scheme]
    method: Method
    settings: Settings | OneShotSettings | None
    windows: tuple[Window, ...]
    samples: int
    seqlen: int
    steps: int
    work: int
    memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    source_bytes: int

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
    def rotations(self) -> Rotations | None:
        """What is folded into the weights before they are quantized."""
        return self.source.rotations if isinstance(self.source, RotatedSource) else None

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for the report and for `--dry-run`."""
        return {
            "model": self.source.name,
            "scheme": str(self.scheme),
            "method": self.method.name,
            "settings": None if self.settings is None else self.settings.model_dump(),
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
            "layers": self.source.num_layers,
            "windows": [{"layers": list(window.layers), "phase": window.phase} for window in self.windows],
            "quantized": dict(Counter(f"{name.split('.', 3)[-1]}: {scheme}" for name, scheme in self.schemes.items())),
            "kept": list(self.kept),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "steps": self.steps,
            "memory_bytes": self.memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "quantized_bits_per_weight": self.bits_per_weight,
            "source_bytes": self.source_bytes,
        }


def make_plan(
    source: ModelSource,
    scheme: Scheme,
    method: Method,
    settings: Settings | OneShotSettings | None,
    samples: int,
    seqlen: int,
    per_channel_fallback: bool = False,
) -> Plan:
    """Settle a run.

    Args:
        per_channel_fallback: linears whose input size the group size does not divide get one scale per channel, where
            the whole model would be refused otherwise.

    Raises:
        InputError: the group size does not divide some linear's input size, or that is too long for quantized
            activations; the method makes no sense with the scheme; samples or seqlen out of range.
    """
    check_scheme(method, scheme)
    if samples < 1:
        raise InputError(f"samples {samples}: expected at least 1")
    if not 2 <= seqlen <= source.max_positions:
        raise InputError(f"seqlen {seqlen}: expected 2 to {source.max_positions}, the longest that the model takes")
    shapes = source.shapes
    schemes = _schemes(source, shapes, scheme.of_linear(), per_channel_fallback)
    windows: tuple[Window, ...] = ()
    steps = work = 0
    if isinstance(settings, Settings):
        windows = schedule(source.num_layers, **settings.windows.model_dump())
        steps_of_window = settings.epochs * math.ceil(samples / settings.batch_size)
        steps, work = len(windows) * steps_of_window, sum(map(len, windows)) * steps_of_window
    layer_weights = max(
        sum(math.prod(shapes[f"{name}.weight"][0]) for name in source.linear_names(layer))
        for layer in range(source.num_layers)
    )
    device_bytes, host_bytes = _memory(source, scheme, settings, windows, samples, seqlen, layer_weights)
    source_bytes = sum(size for _, size in shapes.values())
    quantized = [(name, shapes[f"{name}.weight"]) for name in schemes]
    disk = source_bytes - sum(size for _, (_, size) in quantized)
    scale_bytes = torch.finfo(source.dtype).bits // 8
    disk += sum(schemes[name].stored_bytes(shape[0], shape[1], scale_bytes) for name, (shape, _) in quantized)
    return Plan(
        source=source,
        scheme=scheme,
        schemes=schemes,
        method=method,
        settings=settings,
        windows=windows,
        samples=samples,
        seqlen=seqlen,
        steps=steps,
        work=work,
        memory_bytes=device_bytes,
        host_memory_bytes=host_bytes,
        disk_bytes=disk,
        source_bytes=source_bytes,
    )


def _schemes(
    source: ModelSource, shapes: dict[str, tuple[tuple[int, ...], int]], scheme: Scheme, per_channel_fallback: bool
) -> dict[str, Scheme]:
    found: dict[str, Scheme] = {}
    misfits: dict[str, int] = {}
    for layer in range(source.num_layers):
        for name in source.linear_names(layer):
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
                misfits[name.split(".", 3)[-1]] = in_features
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


def _memory(
    source: ModelSource,
    scheme: Scheme,
    settings: Settings | OneShotSettings | None,
    windows: tuple[Window, ...],
    samples: int,
    seqlen: int,
    layer_weights: int,
) -> tuple[int, int]:
    """Bytes on the device and on the host. A layer that is refined holds, in fp32, its weights, their fake-quantized
    values and the gradients of these, and for a while two tensors more of the same size; and the activations of a
    batch that autograd keeps, some 16 hidden and 5 intermediate vectors a token. What is rounded on the way, once for
    all that read it, is kept besides."""
    config = source.config
    if settings is None:
        return 4 * layer_weights * 4, 4 * layer_weights * 4
    if not isinstance(settings, Settings):
        return _one_shot_memory(source, settings, samples, seqlen, layer_weights)
    family, largest = source.family, max(len(window) for window in windows)
    shapes = {name: source.shapes[f"{family.layers}.0.{name}.weight"][0] for name in family.linears}
    kept = 16 * config.hidden_size + 5 * config.intermediate_size
    if scheme.quantizes_activations:
        others = {name for names in family.shared_inputs for name in names[1:]}
        kept += 2 * sum(shapes[name][1] for name in family.linears if name not in others)
    if scheme.quantizes_attention:
        kept += 2 * sum(shapes[name][0] for name in (family.query, family.key, family.value))
    activations = settings.batch_size * seqlen * kept
    device = largest * 4 * (5 * layer_weights + activations)
    stream = samples * seqlen * config.hidden_size * 4
    in_memory = 3 * stream if stream <= settings.stream_memory_gb * _GB / 3 else 0
    embedding = config.vocab_size * config.hidden_size * 4
    return device, device + in_memory + embedding


def _one_shot_memory(
    source: ModelSource, settings: OneShotSettings, samples: int, seqlen: int, layer_weights: int
) -> tuple[int, int]:
    """Bytes on the device and on the host. All in fp32: a layer and its original; the largest weight some six times
    while it is rounded; X^T X of every input of the layer, and the largest once more in fp32 and, with its Cholesky
    factor and that one's inverse, in fp64; and the activations of a batch."""
    config = source.config
    shapes = {linear: source.shapes[f"{source.family.layers}.0.{linear}.weight"][0] for linear in source.family.linears}
    sharing = {linear for group in source.family.shared_inputs for linear in group[1:]}
    grams = sum(in_features**2 for linear, (_, in_features) in shapes.items() if linear not in sharing)
    grams += 7 * max(in_features for _, in_features in shapes.values()) ** 2
    rounding = 6 * max(math.prod(shape) for shape in shapes.values())
    activations = settings.batch_size * seqlen * (16 * config.hidden_size + 5 * config.intermediate_size)
    device = 4 * (2 * layer_weights + rounding + grams + activations)
    stream = samples * seqlen * config.hidden_size * 4
    embedding = config.vocab_size * config.hidden_size * 4
    return device, device + embedding + (stream if stream <= settings.stream_memory_gb * _GB else 0)
