"""AWQ (arXiv 2306.00978): channels that see large activations are scaled up before their weights are rounded.

For linears that share an input, the scale of channel j is `mean |x_j|^ratio`, normalised so that the largest and the
smallest lie around 1; the ratio is searched by the error of the output of the block that they feed: the attention, the
MLP, or a single linear. Inverse scales are merged into what makes the input: a norm, v_proj for o_proj, up_proj for
down_proj. Then the range of every group is clipped where that lowers the error of the group's contribution to the
output, and weights are rounded to nearest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sliderquant.baselines.layer import CalibratedLayer, quotient
from sliderquant.models.layer import first_output
from sliderquant.modules.rotated import RotatedLinear
from sliderquant.planning.settings import AwqSettings
from sliderquant.quantizer.grids import QuantizedWeight, dequantize, find_grid, quantize, round_to_nearest
from sliderquant.schemes import Scheme

__all__ = ["awq_layer", "candidates", "clipped"]

_SMALLEST = 1e-4


@torch.no_grad()
def awq_layer(layer: CalibratedLayer, settings: AwqSettings) -> None:
    """Search and merge the scales of a layer, then the clipping, and round its weights."""
    spec, normed = layer.spec, layer.spec.normed_groups
    statistics = layer.statistics([names[0] for names in layer.input_groups])
    grams = {name: statistics[names[0]].gram for names in layer.input_groups for name in names}

    def search(site: str, mean: Tensor, errors_of: Callable[[list[Tensor]], Tensor]) -> Tensor:
        tried = candidates(mean, settings.ratios)
        errors = errors_of(tried).nan_to_num(nan=torch.inf)
        best = _first_of_the_least(errors)
        layer.scales[site] = {
            "ratio": best / settings.ratios,
            "error": quotient(errors[best].item(), errors[0].item()),
        }
        return tried[best]

    # All are searched in the original layer: a scale of one site leaves what the others see as it is.
    found: list[Tensor] = []
    for _, names in normed:
        block = names[0].rpartition(".")[0]
        found.append(search(block, statistics[names[0]].mean, partial(_block_errors, layer, block, names)))
    between: list[tuple[str, str, Tensor]] = []
    for previous, following in spec.feeds:
        if isinstance(layer.module.get_submodule(following), RotatedLinear):
            continue  # its inputs are not the outputs of the linear before it, but mixtures of all of them
        mean = layer.outputs(previous, statistics[following].mean)
        errors_of = partial(_linear_errors, layer, previous, following, grams[following])
        between.append((previous, following, search(following, mean, errors_of)))

    for (norm, names), scale in zip(normed, found, strict=True):
        _divide(grams[names[0]], layer.scale_after_norm(norm, names, scale))
    for previous, following, scale in between:
        _divide(grams[following], layer.scale_between(previous, following, scale))

    # What q and k make is multiplied with each other: the error of each alone says little about the attention's.
    unclipped = {spec.attention.query, spec.attention.key}
    for name in spec.linears:
        weight, scheme = layer.weight(name), layer.schemes[name]
        if settings.clipping and name not in unclipped:
            stored, share = clipped(
                weight, grams[name], scheme, layer.scale_dtype, settings.clip_steps, settings.clip_at_most
            )
            layer.quantize(name, stored, grams[name], clipped=share)
        else:
            layer.quantize(name, round_to_nearest(weight, scheme, layer.scale_dtype), grams[name])


def candidates(mean: Tensor, ratios: int) -> list[Tensor]:
    """The scales to try, fp32 of the shape of mean |x|, for the ratios 0, 1/n, ..., (n-1)/n; the first is 1, as is one
    that would not be finite."""
    tried = []
    for i in range(ratios):
        scale = mean.pow(i / ratios).clamp(min=_SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        tried.append(scale if scale.isfinite().all() else torch.ones_like(mean))
    return tried


def clipped(
    weight: Tensor, gram: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int, at_most: float
) -> tuple[QuantizedWeight, float]:
    """Round a weight with the range of each group clipped to `1 - i/steps` of its largest magnitude, whichever i gives
    the group's contribution to the output the least squared error.

    Args:
        weight: fp32 `[out, in]`.
        gram: X^T X of its inputs, fp32 `[in, in]`.
        at_most: the largest share that is tried to clip.

    Returns:
        the quantized weight, and the share of the groups that were clipped.
    """
    out_features, in_features = weight.shape
    groups = scheme.groups(in_features)
    size = in_features // groups
    grouped = weight.view(out_features, groups, size)
    low, high = grouped.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    largest = torch.maximum(-low, high)
    # The block of each group on the diagonal: [groups, size, size].
    own = torch.stack([gram[i : i + size, i : i + size] for i in range(0, in_features, size)])
    best_error = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for step in range(int(at_most * steps + 1e-6) + 1):
        bound = largest * (1 - step / steps)
        tried_low, tried_high = torch.maximum(low, -bound), torch.minimum(high, bound)
        stored = quantize(weight, find_grid(tried_low, tried_high, scheme, dtype), scheme, dtype)
        difference = (dequantize(stored, scheme) - weight).view(out_features, groups, size).transpose(0, 1)
        error = ((difference @ own) * difference).sum(-1).T
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, tried_low, best_low), torch.where(better, tried_high, best_high)
    share = ((best_low != low) | (best_high != high)).float().mean().item()
    return quantize(weight, find_grid(best_low, best_high, scheme, dtype), scheme, dtype), share


def _rounded(weight: Tensor, scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The weight, rounded to nearest while its columns are scaled."""
    return dequantize(round_to_nearest(weight * scale, scheme, dtype), scheme) / scale


def _linear_errors(
    layer: CalibratedLayer, previous: str, following: str, gram: Tensor, scales: Sequence[Tensor]
) -> Tensor:
    """Squared error of a linear's output with its weight rounded under each of the scales, which the outputs of the
    linear before it are divided by; `[scales]`."""
    weight, scheme = layer.weight(following), layer.schemes[following]
    errors = []
    for scale in scales:
        change = _rounded(weight, layer.columns(previous, scale), scheme, layer.scale_dtype) - weight
        errors.append(((change @ gram) * change).sum())
    return torch.stack(errors)


def _block_errors(layer: CalibratedLayer, block: str, names: Sequence[str], scales: Sequence[Tensor]) -> Tensor:
    """Squared error of the block's output with these of its linears rounded under each of the scales, `[scales]`."""
    module = layer.module.get_submodule(block)
    weights = {name: layer.weight(name) for name in names}
    originals = {name: weight.clone() for name, weight in weights.items()}
    errors = torch.zeros(len(scales), device=layer.device)

    def output(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        return first_output(module(*arguments, **keywords))

    for arguments, keywords in layer.calls(block):
        wanted = output(arguments, keywords)
        for i, scale in enumerate(scales):
            for name, weight in weights.items():
                weight.copy_(_rounded(originals[name], scale, layer.schemes[name], layer.scale_dtype))
            errors[i] += (output(arguments, keywords) - wanted).square().sum()
        for name, weight in weights.items():
            weight.copy_(originals[name])
    return errors


def _first_of_the_least(errors: Tensor) -> int:
    values = errors.tolist()
    return values.index(min(values))


def _divide(gram: Tensor, scale: Tensor) -> None:
    """X^T X of inputs that are divided by `scale`, in place: linears that share it see it once."""
    gram /= torch.outer(scale, scale)
