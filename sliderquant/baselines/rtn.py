"""Round to nearest: every group over its full range, nothing learned, no calibration text."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sliderquant.models.source import ModelSource
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, round_to_nearest
from sliderquant.schemes import Scheme

__all__ = ["rtn_layer"]


def rtn_layer(
    source: ModelSource, layer: int, schemes: Mapping[str, Scheme], device: torch.device
) -> dict[str, tuple[QuantizedWeight, Tensor]]:
    """Quantize the linears of one decoder layer.

    Args:
        schemes: by full name of the linear.

    Returns:
        by full name, the weight as it is stored and its value, fp32 `[out, in]`.
    """
    quantized = {}
    for name in source.layers[layer].full_linears:
        weight = source.weight(f"{name}.weight", device)
        stored = round_to_nearest(weight, schemes[name], source.dtype)
        quantized[name] = (stored, dequantize(stored, schemes[name]))
    return quantized
