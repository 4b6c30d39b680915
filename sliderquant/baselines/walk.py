"""The walk of the one-shot methods: layer by layer, each on the output of the quantized layers before it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sliderquant.baselines.awq import awq_layer
from sliderquant.baselines.gptq import gptq_layer
from sliderquant.baselines.layer import CalibratedLayer, quotient
from sliderquant.baselines.smoothquant import smoothquant_layer
from sliderquant.calibration.layerwise import LayerwiseModel, RunningLayer
from sliderquant.models.decoder import Decoder
from sliderquant.planning.plan import Plan
from sliderquant.planning.settings import OneShotSettings
from sliderquant.progress import LayerReport, Progress
from sliderquant.quantizer.grids import QuantizedWeight, dequantize

__all__ = ["quantize_layers"]

_METHODS: Mapping[str, Callable[[CalibratedLayer, Any], None]] = {
    "gptq": gptq_layer,
    "awq": awq_layer,
    "smoothquant": smoothquant_layer,
}
Write = Callable[[int, Mapping[str, tuple[QuantizedWeight, Tensor]], Mapping[str, Tensor]], None]


@torch.no_grad()
def quantize_layers(
    plan: Plan, decoder: Decoder, blocks: Tensor, device: torch.device, write: Write, progress: Progress
) -> list[LayerReport]:
    """Quantize every layer of the plan in order.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`.
        write: is handed each layer in order: its index; by full name of the linear, the weight as it is stored and its
            value; by full name of the tensor, the norms and biases that scales were merged into.

    Returns:
        what happened in each layer.
    """
    settings = plan.settings
    assert isinstance(settings, OneShotSettings)
    source = plan.source
    model = LayerwiseModel(decoder, blocks, plan.rotations, plan.scheme.kv_bits)
    stream = model.stream(settings.stream_memory_gb * 1e9)
    reports = []
    try:
        for spec in source.layers:
            weights = {f"{name}.weight" for name in spec.linears}
            dense = [name for name in decoder.layers[spec.index].state_dict() if name not in weights]
            layer = CalibratedLayer(
                model.layer(spec.index),
                {name: plan.schemes[spec.full(name)] for name in spec.linears},
                {name: source.tensor(spec.full(name)).dtype for name in dense},
                source.dtype,
                stream,
                settings.batch_size,
                device,
            )
            _METHODS[plan.method.name](layer, settings)
            error = _advance(layer, model.layer(spec.index, rounded=False))
            write(
                spec.index,
                {
                    spec.full(name): (stored, dequantize(stored, layer.schemes[name]))
                    for name, stored in layer.stored.items()
                },
                {spec.full(name): tensor for name, tensor in layer.changed.items()},
            )
            reports.append(LayerReport(spec.index, error, layer.linears, layer.scales))
            progress.layer_quantized(reports[-1], source.num_layers)
    finally:
        stream.close()
    return reports


def _advance(layer: CalibratedLayer, original: RunningLayer) -> float | None:
    """The stream passes through the quantized layer. Returns the relative squared error of its output."""
    error = norm = 0.0

    def step(hidden: Tensor) -> Tensor:
        nonlocal error, norm
        out = layer(hidden)
        wanted = original(hidden)
        error += (out - wanted).square().sum().item()
        norm += wanted.square().sum().item()
        return out

    layer.stream.walk(step, layer.device, layer.batch_size)
    return quotient(error, norm)
