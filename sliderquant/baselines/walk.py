"""The walk of the one-shot methods: layer by layer, each on the output of the quantized layers before it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.baselines.awq import awq_layer
from sliderquant.baselines.gptq import gptq_layer
from sliderquant.baselines.layer import CalibratedLayer, quotient
from sliderquant.baselines.smoothquant import smoothquant_layer
from sliderquant.calibration.streams import ActivationStream
from sliderquant.models.decoder import Decoder
from sliderquant.modules.attention import round_layer
from sliderquant.modules.rotated import insert_rotation
from sliderquant.planning.plan import Plan
from sliderquant.planning.settings import AwqSettings, GptqSettings, OneShotSettings, SmoothQuantSettings
from sliderquant.progress import LayerReport, Progress
from sliderquant.quantizer.grids import QuantizedWeight, dequantize

__all__ = ["quantize_layers"]

_METHODS: Mapping[type[OneShotSettings], Callable[[CalibratedLayer, Any], None]] = {
    GptqSettings: gptq_layer,
    AwqSettings: awq_layer,
    SmoothQuantSettings: smoothquant_layer,
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
    samples, inputs = decoder.embed(blocks)
    limit = settings.stream_memory_gb * 1e9
    stream = ActivationStream(len(blocks), plan.seqlen, source.config.hidden_size, memory_limit=limit)
    reports = []
    try:
        stream.fill(samples)
        for index in range(source.num_layers):
            prefix = f"{source.family.layers}.{index}."
            module = _layer(plan, decoder, index, device, rounded=True)
            weights = {f"{name}.weight" for name in source.family.linears}
            dense = [name for name in decoder.layers[index].state_dict() if name not in weights]
            layer = CalibratedLayer(
                module,
                source.family,
                source.config,
                {name: plan.schemes[prefix + name] for name in source.family.linears},
                {name: source.tensor(prefix + name).dtype for name in dense},
                source.dtype,
                inputs.arguments[index],
                stream,
                settings.batch_size,
                device,
            )
            _METHODS[type(settings)](layer, settings)
            error = _advance(layer, _layer(plan, decoder, index, device, rounded=False))
            write(
                index,
                {
                    prefix + name: (stored, dequantize(stored, layer.schemes[name]))
                    for name, stored in layer.stored.items()
                },
                {prefix + name: tensor for name, tensor in layer.changed.items()},
            )
            reports.append(LayerReport(index, error, layer.linears, layer.scales))
            progress.layer_quantized(reports[-1], source.num_layers)
    finally:
        stream.close()
    return reports


def _layer(plan: Plan, decoder: Decoder, index: int, device: torch.device, rounded: bool) -> nn.Module:
    """A layer with what the model computes while it runs: rotations and, if `rounded`, the rounding in attention."""
    layer = decoder.layer(index)
    insert_rotation(layer, index, plan.source.family, plan.rotations)
    if rounded:
        round_layer(layer, index, plan.source.family, plan.scheme.kv_bits, plan.rotations)
    return layer.to(device)


def _advance(layer: CalibratedLayer, original: nn.Module) -> float | None:
    """The stream passes through the quantized layer. Returns the relative squared error of its output."""
    error = norm = 0.0

    def step(hidden: Tensor) -> Tensor:
        nonlocal error, norm
        out = layer(hidden)
        wanted = original(hidden, **layer.arguments)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        error += (out - wanted).square().sum().item()
        norm += wanted.square().sum().item()
        return out

    layer.stream.walk(step, layer.device, layer.batch_size)
    return quotient(error, norm)
