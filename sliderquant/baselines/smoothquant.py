"""SmoothQuant (arXiv 2211.10438): what makes activations hard to round moves into the weights, then round to nearest.

At the norms, where it costs nothing, channel j is divided by

    s_j = max |x_j|^ratio / max |w_j|^(1 - ratio)

the maxima over calibration tokens and over the rows of all linears that read the norm; their columns are multiplied.
"""

import torch

from sliderquant.baselines.layer import CalibratedLayer
from sliderquant.planning.settings import SmoothQuantSettings
from sliderquant.quantizer.grids import round_to_nearest

__all__ = ["smoothquant_layer"]

_SMALLEST = 1e-5


@torch.no_grad()
def smoothquant_layer(layer: CalibratedLayer, settings: SmoothQuantSettings) -> None:
    """Merge the scales of a layer into its norms and weights, and round those."""
    statistics = layer.statistics([names[0] for names in layer.input_groups])
    for norm, names in layer.spec.normed_groups:
        inputs = statistics[names[0]]
        weights = torch.stack([layer.weight(name).abs().amax(0) for name in names]).amax(0)
        scale = inputs.largest.clamp(min=_SMALLEST) ** settings.ratio
        scale = (scale / weights.clamp(min=_SMALLEST) ** (1 - settings.ratio)).clamp(min=_SMALLEST)
        scale = layer.scale_after_norm(norm, names, torch.where(scale.isfinite(), scale, 1.0))
        inputs.gram /= torch.outer(scale, scale)
        layer.scales[norm] = {"smallest": scale.min().item(), "largest": scale.max().item()}
    for names in layer.input_groups:
        for name in names:
            stored = round_to_nearest(layer.weight(name), layer.schemes[name], layer.scale_dtype)
            layer.quantize(name, stored, statistics[names[0]].gram)
    layer.round_inputs()
