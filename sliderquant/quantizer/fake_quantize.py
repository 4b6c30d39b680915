"""Fake quantization and its straight-through gradient: the hot loop of learning.

A row is a group of a weight, a token of activations, or a head of a query, key or value. With s its scale, z its
zero-point, t = x / s and q the clamped code, x^ = (q - z) s, and

    dx^/dx    1 inside the range, 0 where the code was clamped
    dx^/ds    (q - z) - t inside, q - z outside
    dx^/dz    0 inside, -s outside

With z = lowest - bottom / s, scale and zero-point pass their gradients to the ends of the range, and those to the
clipping (OmniQuant's, arXiv 2308.13137, eq. 2) and to the elements that are the minimum and the maximum of their row.
Rounding of x, of the scale and of the zero-point passes gradients straight through. Weights have a clipping for every
row, activations one for all rows: a factor is what is stored of it, so the sigmoid is taken once, outside.

All of it is bound by memory. The backward pass keeps x and what there is per row, and computes t and q again. Masks are
numbers, because on a CPU PyTorch's operations with booleans are slow. `python -m benchmarks step` shows what compiling
brings, with and without `--compile never`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sliderquant.quantizer.compiled_function import compiled_function
from sliderquant.quantizer.grids import find_grid, free_ends, in_groups
from sliderquant.schemes import Scheme

__all__ = ["Grid", "fake_quantize", "fake_quantize_activations", "grid_functions"]


def fake_quantize(
    weight: Tensor,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Tensor:
    """The dequantized weight `[out, in]`, differentiable in `weight` and in the clipping.

    The range of a group is `[sigmoid(clip_low) * min, sigmoid(clip_high) * max]`, min and max those of the current
    weight; the grid is that of `grids.clipped_grid`.

    Args:
        weight: fp32 `[out, in]`.
        clip_low, clip_high: fp32 `[out, groups]` before the sigmoid; None: no clipping.
        dtype: in which the scale is stored.
        compiled: by torch.compile; of use where the same shapes come many times, see `refine.compiling.can_compile`.
    """
    rows = in_groups(weight, scheme).flatten(0, 1)
    clips = (None, None) if clip_low is None or clip_high is None else (clip_low.flatten(), clip_high.flatten())
    grid = Grid(0, scheme.levels, scheme.symmetric, (scheme, dtype))
    return _FakeQuantize.apply(rows, *clips, grid, compiled).view_as(weight)


def fake_quantize_activations(
    x: Tensor, bits: int, symmetric: bool, compiled: bool = False, clip: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x `[..., in]` with every row rounded to the grid of its own range, in fp32, then in the dtype of x.

    On a CPU equal bit for bit to `sliderquant_kernels.quantize_activations(x, ...).dequantize(x.dtype)`.
    Differentiable in x and in the clipping; the range is that of the current x.

    Args:
        x: a row is the input of a linear for a token, or a query, key or value of a head.
        bits: 4 or 8.
        symmetric: without zero-points.
        compiled: as in `fake_quantize`.
        clip: factors in (0, 1] on the lower and the upper end of every row's range, fp32 `[]`; None: 1.
    """
    grid = Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, symmetric, None)
    low, high = (None, None) if clip is None else clip
    return _FakeQuantize.apply(x.reshape(-1, x.shape[-1]), low, high, grid, compiled).view(x.shape)


class Grid(NamedTuple):
    """Codes from `lowest` to `highest`; `stored`: the scheme of a weight and the dtype of its scales, or None."""

    lowest: int
    highest: int
    symmetric: bool
    stored: tuple[Scheme, torch.dtype] | None

    @property
    def levels(self) -> int:
        return self.highest - self.lowest


class _FakeQuantize(torch.autograd.Function):
    """Of rows `[rows, in]`; clip_low, clip_high: fp32 `[rows]` before the sigmoid, factors fp32 `[]`, or None."""

    @staticmethod
    def forward(ctx, rows, clip_low, clip_high, grid, compiled):
        forward, ctx.gradients = grid_functions(grid, _kind(clip_low), compiled)
        inputs = [tensor for tensor in (rows, clip_low, clip_high) if tensor is not None]
        value, *ctx.of_rows = forward(*_plain(inputs))
        ctx.save_for_backward(*inputs)
        return value

    @staticmethod
    def backward(ctx, grad):
        gradients = ctx.gradients(*_plain((grad, *ctx.saved_tensors)), *ctx.of_rows)
        return *gradients, *[None] * (5 - len(gradients))


def _kind(clip_low: Tensor | None) -> Literal["range", "clipped", "shrunk"]:
    return "range" if clip_low is None else "clipped" if clip_low.ndim else "shrunk"


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, no views and without gradients: of everything else a compiled function would get a version each."""
    return [tensor.detach().contiguous() for tensor in tensors]


@lru_cache(maxsize=64)
def grid_functions(
    grid: Grid, ends: Literal["range", "clipped", "shrunk", "free"], compiled: bool, dtype: torch.dtype | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What fake quantization is made of, on this grid.

    The first maps rows `[rows, in]` to the rounded rows and, per row, scale and zero-point, and minimum and maximum
    where the ends depend on them. The second maps the gradient of the rounded rows, what the first was given and what
    it returned per row to the gradients of the first arguments of the first. Contiguous tensors without gradients.

    Args:
        ends: of the range of a row. `range`: its minimum and maximum. `clipped`: these times the sigmoid of two further
            arguments `[rows]`. `shrunk`: these times two further arguments `[]`. `free`: whatever the rows, the
            exponentials of two further arguments times two more, which stand in the places of minimum and maximum; they
            get no gradients.
        dtype: of the rounded rows; None: that of the rows.
    """
    if ends == "free":

        def forward(rows: Tensor, clip_low: Tensor, clip_high: Tensor, low: Tensor, high: Tensor) -> Any:
            bottom, top = free_ends(low, high, clip_low, clip_high)
            return _rounded(rows.float(), bottom, top, grid, dtype or rows.dtype)

        def gradients(
            grad: Tensor, rows: Tensor, clip_low: Tensor, clip_high: Tensor, low: Tensor, high: Tensor, *of_rows: Tensor
        ) -> Any:
            bottom, top = free_ends(low, high, clip_low, clip_high)
            grad_rows, grad_bottom, grad_top = _straight_through(grid, grad, rows, bottom, top, *of_rows)
            return grad_rows.to(rows.dtype), grad_bottom * bottom, grad_top * top

    elif ends == "clipped":

        def forward(rows: Tensor, clip_low: Tensor, clip_high: Tensor) -> Any:  # type: ignore[misc]
            return _forward(rows, clip_low, clip_high, grid, dtype)

        def gradients(  # type: ignore[misc]
            grad: Tensor, rows: Tensor, clip_low: Tensor, clip_high: Tensor, *of_rows: Tensor
        ) -> Any:
            return _gradients(grid, grad, rows, clip_low, clip_high, *of_rows)

    elif ends == "shrunk":

        def forward(rows: Tensor, shrink_low: Tensor, shrink_high: Tensor) -> Any:  # type: ignore[misc]
            x = rows.float()
            low, high = x.amin(dim=-1), x.amax(dim=-1)
            bottom, top = _ends(low, high, None, None)
            return *_rounded(x, bottom * shrink_low, top * shrink_high, grid, dtype or rows.dtype), low, high

        def gradients(  # type: ignore[misc]
            grad: Tensor,
            rows: Tensor,
            shrink_low: Tensor,
            shrink_high: Tensor,
            scale: Tensor,
            zero_point: Tensor,
            low: Tensor,
            high: Tensor,
        ) -> Any:
            bottom, top = _ends(low, high, None, None)
            grad_rows, grad_bottom, grad_top = _straight_through(
                grid, grad, rows, bottom * shrink_low, top * shrink_high, scale, zero_point
            )
            found = _through_ends(grad_rows, rows, low, high, grad_bottom * shrink_low, grad_top * shrink_high)
            return found.to(rows.dtype), (grad_bottom * bottom).sum(), (grad_top * top).sum()

    else:

        def forward(rows: Tensor) -> Any:  # type: ignore[misc]
            return _forward(rows, None, None, grid, dtype)

        def gradients(grad: Tensor, rows: Tensor, *of_rows: Tensor) -> Any:  # type: ignore[misc]
            return _gradients(grid, grad, rows, None, None, *of_rows)[:1]

    return (compiled_function(forward), compiled_function(gradients)) if compiled else (forward, gradients)


def _forward(
    rows: Tensor, clip_low: Tensor | None, clip_high: Tensor | None, grid: Grid, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rounded rows, and per row scale, zero-point, minimum and maximum."""
    x = rows.float()
    low, high = x.amin(dim=-1), x.amax(dim=-1)
    bottom, top = _ends(low, high, clip_low, clip_high)
    return *_rounded(x, bottom, top, grid, dtype or rows.dtype), low, high


def _rounded(x: Tensor, bottom: Tensor, top: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded rows, in this dtype, and per row scale and zero-point; x: the rows in fp32."""
    if grid.stored is not None:
        scale, zero_point = find_grid(bottom, top, *grid.stored)
    else:
        wide = torch.maximum(-bottom, top) / (grid.levels / 2) if grid.symmetric else (top - bottom) / grid.levels
        scale = torch.where(wide > 0, wide, 1.0)
        # Not round(-bottom / scale) + lowest: in fp32 the two may round differently.
        zero_point = torch.round(grid.lowest - bottom / scale).clamp_(grid.lowest, grid.highest)
        zero_point = torch.zeros_like(scale) if grid.symmetric else zero_point
    centred = _centred(x / scale[:, None], zero_point, grid)
    # torch.addcmul and the like would save a pass, but not the bits: keep x^ = (q - z) * s.
    return centred.mul_(scale[:, None]).to(dtype), scale, zero_point


def _gradients(
    grid: Grid,
    grad: Tensor,
    rows: Tensor,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the rows and of the clipping."""
    bottom, top = _ends(low, high, clip_low, clip_high)
    grad_rows, grad_bottom, grad_top = _straight_through(grid, grad, rows, bottom, top, scale, zero_point)
    grad_low = grad_high = None
    if clip_low is not None and clip_high is not None:
        shrink_low, shrink_high = torch.sigmoid(clip_low), torch.sigmoid(clip_high)
        grad_low, grad_high = grad_bottom * bottom * (1 - shrink_low), grad_top * top * (1 - shrink_high)
        grad_bottom, grad_top = grad_bottom * shrink_low, grad_top * shrink_high
    grad_rows = _through_ends(grad_rows, rows, low, high, grad_bottom, grad_top)
    return grad_rows.to(rows.dtype), grad_low, grad_high


def _through_ends(
    grad_rows: Tensor, rows: Tensor, low: Tensor, high: Tensor, grad_low: Tensor, grad_high: Tensor
) -> Tensor:
    """grad_rows with the gradients of minimum and maximum added to the elements that are these."""
    # The end of a range is the element at its minimum or maximum, unless the range was extended to hold 0.
    for end, grad_end in ((low, grad_low * (low < 0)), (high, grad_high * (high > 0))):
        there = _same(rows.float(), end[:, None])
        share = grad_end / there.sum(dim=-1)
        if torch.compiler.is_compiling():  # or it is computed again for every few elements of a row
            share = share.as_strided(share.shape, share.stride())
        grad_rows = grad_rows.addcmul_(there, share[:, None])
    return grad_rows


def _straight_through(
    grid: Grid, grad: Tensor, rows: Tensor, bottom: Tensor, top: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, fp32, without what they are to the ends of their range; and of the ends."""
    wide, steps = grad.float(), rows.float() / scale[:, None]
    centred = _centred(steps, zero_point, grid)
    grad_rows = wide * _same(torch.round(steps), centred)  # 0 where the code was clamped
    grad_scale = torch.linalg.vecdot(wide, centred) - torch.linalg.vecdot(grad_rows, steps)
    if grid.symmetric:
        per_end, high_wins = grad_scale / (grid.levels / 2), (top >= -bottom).float()
        return grad_rows, per_end * (high_wins - 1), per_end * high_wins
    grad_steps = (grad_rows - wide).sum(dim=-1)  # of z, divided by s
    grad_top = (grad_scale + grad_steps * bottom / scale) / grid.levels
    return grad_rows, -grad_top - grad_steps, grad_top


def _same(a: Tensor, b: Tensor) -> Tensor:
    """1 where a equals b, else 0, fp32: in the way that is faster, which on a CPU depends on the compiler."""
    if torch.compiler.is_compiling() or a.is_cuda:
        return (a == b).float()
    return (a - b).abs_().sign_().neg_().add_(1)


def _ends(low: Tensor, high: Tensor, clip_low: Tensor | None, clip_high: Tensor | None) -> tuple[Tensor, Tensor]:
    """The range of each row, extended to hold 0 and clipped."""
    bottom, top = low.clamp(max=0), high.clamp(min=0)
    if clip_low is None or clip_high is None:
        return bottom, top
    return bottom * torch.sigmoid(clip_low), top * torch.sigmoid(clip_high)


def _centred(steps: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The clamped codes less the zero-point."""
    zero_point = zero_point[:, None]
    return torch.round(steps).add_(zero_point).clamp_(grid.lowest, grid.highest).sub_(zero_point)
