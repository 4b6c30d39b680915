"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those not yet rounded make up for the error.

With H = X^T X of the inputs X and U upper triangular with U^T U = H^-1, column i is rounded and

    W[:, i+1:] -= (W[:, i] - W^[:, i]) / U[i, i] * U[i, i+1:]

Columns are worked on in blocks: what is right of a block is updated once for all of its columns.

Layer by layer, X is what the quantized layers before make of the calibration text, and within a layer what its already
quantized linears do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sliderquant.baselines.layer import CalibratedLayer
from sliderquant.planning.settings import GptqSettings
from sliderquant.quantizer.grids import Grid, QuantizedWeight, clipped_grid, quantize
from sliderquant.schemes import Scheme

__all__ = ["Compensated", "gptq", "gptq_layer", "inverse_factor"]

_BLOCK = 128
_RAISE = 10.0


class Compensated(NamedTuple):
    """What `gptq` makes of a weight.

    Attributes:
        stored: the quantized weight.
        damping: what was added to the Hessian's diagonal, a share of its mean; None: the Hessian was of no use, and the
            weights were rounded to nearest.
    """

    stored: QuantizedWeight
    damping: float | None


def gptq_layer(layer: CalibratedLayer, settings: GptqSettings) -> None:
    """Quantize the linears of a layer in the order of the data flow."""
    layer.round_inputs()
    for names in layer.input_groups:
        gram = layer.statistics(names[:1])[names[0]].gram
        for name in names:
            result = gptq(
                layer.weight(name), gram, layer.schemes[name], layer.scale_dtype, settings.damping, settings.act_order
            )
            trouble = {}
            if result.damping is None:
                trouble["trouble"] = "X^T X is not finite or 0, rounded to nearest"
            elif result.damping > settings.damping:
                trouble["trouble"] = f"damping raised to {result.damping:g} to make X^T X positive definite"
            layer.quantize(name, result.stored, gram, damping=result.damping, **trouble)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    damping: float = 0.01,
    act_order: bool = False,
    block: int = _BLOCK,
) -> Compensated:
    """Quantize one weight.

    The range of a group is that of the group's weights when its first column is reached, what was rounded before being
    made up for; with `act_order`, that of the original weights.

    Args:
        weight: fp32 `[out, in]`.
        hessian: X^T X of its inputs, fp32 `[in, in]`. An input that was always 0 takes no part: its column is rounded
            to nearest.
        scheme: how it is quantized.
        dtype: in which the scales are stored.
        damping: added to the diagonal, a share of its mean; raised tenfold while the sum is not positive definite.
        act_order: columns in descending order of the diagonal. Groups keep their places.
        block: columns; a multiple of the group size.
    """
    in_features = weight.shape[1]
    if scheme.group_size is not None and block % scheme.group_size:
        raise ValueError(f"block {block}: expected a multiple of the group size, {scheme.group_size}")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    factor, used = inverse_factor(hessian, damping)
    if factor is None:
        factor = torch.eye(in_features, device=weight.device)

    # Rows are columns of the weight: contiguous.
    columns = weight.T.clone() if order is None else weight.T[order]
    found = clipped_grid(weight, None, None, scheme, dtype)
    scale, zero_point = found.scale.T.clone(), found.zero_point.T.clone()
    group_size = scheme.group_size or in_features
    groups = torch.arange(in_features, device="cpu") // group_size
    group_of_column = (groups if order is None else groups[order.cpu()]).tolist()
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            group = group_of_column[i]
            if order is None and i % group_size == 0 and i > 0:
                own = clipped_grid(columns[i : i + group_size].T, None, None, scheme.per_channel(), dtype)
                scale[group], zero_point[group] = own.scale[:, 0], own.zero_point[:, 0]
            codes = torch.round(columns[i] / scale[group]).add_(zero_point[group]).clamp_(0, scheme.levels)
            errors[i - start] = (columns[i] - (codes - zero_point[group]) * scale[group]) / factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    compensated = torch.empty_like(columns)
    compensated[order if order is not None else slice(None)] = columns
    # Rounds to the same codes: the columns were not touched after their turn.
    grid = Grid(scale.T.contiguous(), zero_point.T.contiguous())
    return Compensated(quantize(compensated.T.contiguous(), grid, scheme, dtype), used)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """U, upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1, fp32 `[in, in]`, and the damping it took.

    Of the diagonal's mean, inputs that were always 0 are no part. In fp64 where fp32 does not do; with ten times the
    damping where that does not either. None, None: H is not finite, or has nothing but zeros.
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    if not hessian.isfinite().all() or not live.any():
        return None, None
    mean = diagonal[live].mean().item()
    while True:
        for dtype in (torch.float32, torch.float64):
            identity = torch.eye(len(hessian), dtype=dtype, device=hessian.device)
            damped = hessian.to(dtype) + damping * mean * identity
            # H = R R^T with R upper triangular is Cholesky's from the last row up, and U = R^-1.
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if info.item() == 0:
                factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
                if factor.isfinite().all() and (factor.diagonal() > 0).all():
                    return factor, damping
        damping *= _RAISE
        if damping > 1e6:
            return None, None
