"""Refining rows of several weights and rounding them in one compiled pass over memory.

Computes what `weights` does step by step, the rounded rows bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from sliderquant.quantizer.compiled_function import compiled_function
from sliderquant.quantizer.fake_quantize import Grid, grid_functions

__all__ = ["adjacent", "fused_functions", "joined", "low_rank_sum", "owners"]


def low_rank_sum(b: Tensor, a: Tensor) -> Tensor:
    """B A / r, term by term, which rounds the same whoever computes it; a product of matrices does not.

    Args:
        b: fp32 `[rows, rank]`.
        a: fp32 `[rank, in]`, or one for each row, `[rows, rank, in]`.
    """
    total = b[:, 0, None] * a[..., 0, :]
    for term in range(1, b.shape[1]):
        total = total + b[:, term, None] * a[..., term, :]
    return total * (1 / b.shape[1])


@lru_cache(maxsize=64)
def fused_functions(
    grid: Grid, ends: Literal["range", "clipped", "free"], dtype: torch.dtype, group_size: int | None, whole: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiled, like `fake_quantize.grid_functions`, but from the weights as they were, joined.

    The first maps them to the rounded rows `[rows, in]` in the dtype, and what is kept per row. The second maps the
    gradient of the rounded rows, what the first was given and what it kept, to the gradients of the refined rows, of B,
    and of the ends of the ranges. Both are given: how many columns pass (not if `whole`); the weight; which one each
    row is of; A of each, `[weights, rank, in]`; B `[rows, rank]`; and what the ends need. Contiguous, and fp32 but for
    the gradient.

    Args:
        ends: of the range of a group, see `grid_functions`.
        group_size: columns of a group; None: one for each row.
        whole: all columns pass.
    """
    rounded, straight_through = grid_functions(grid, ends, False, dtype)

    def of_b(grad: Tensor, which: Tensor, a: Tensor) -> Tensor:
        found = [(grad * a[which][:, term]).sum(-1) for term in range(a.shape[1])]
        return torch.stack(found, dim=1) * (1 / a.shape[1])

    if whole:

        def forward(weight: Tensor, which: Tensor, a: Tensor, b: Tensor, *clips: Tensor) -> Any:
            x = weight + low_rank_sum(b, a[which])
            value, *of_rows = rounded(x.view(-1, group_size or x.shape[1]), *clips)
            return value.view(x.shape), *of_rows

        def gradients(grad: Tensor, weight: Tensor, which: Tensor, a: Tensor, b: Tensor, *clips: Tensor) -> Any:
            x = weight + low_rank_sum(b, a[which])
            rows = x.view(-1, group_size or x.shape[1])
            of_refined, *of_clips = straight_through(grad.view(rows.shape), rows, *clips)
            of_refined = of_refined.view(x.shape)
            return of_refined, of_b(of_refined, which, a), *of_clips

    else:

        def forward(  # type: ignore[misc]
            passed: int, weight: Tensor, which: Tensor, a: Tensor, b: Tensor, *clips: Tensor
        ) -> Any:
            x = weight + low_rank_sum(b, a[which])
            part = x[:, :passed] if group_size is None else x
            value, *of_rows = rounded(part.reshape(-1, group_size or passed), *clips)
            value = value.view(part.shape)[:, :passed]
            return torch.cat((value, x[:, passed:].to(dtype)), dim=1), *of_rows

        def gradients(  # type: ignore[misc]
            passed: int, grad: Tensor, weight: Tensor, which: Tensor, a: Tensor, b: Tensor, *clips: Tensor
        ) -> Any:
            x = weight + low_rank_sum(b, a[which])
            of_part, of_rest = grad[:, :passed].float(), grad[:, passed:].float()
            if group_size is not None:
                of_part = torch.cat((of_part, torch.zeros_like(of_rest)), dim=1)
            part = x[:, :passed] if group_size is None else x
            rows = part.reshape(-1, group_size or passed)
            of_x, *of_clips = straight_through(of_part.reshape(rows.shape), rows, *clips)
            of_x = of_x.view(part.shape)
            if group_size is not None:
                of_rest = of_rest + of_x[:, passed:]
            of_refined = torch.cat((of_x[:, :passed], of_rest), dim=1)
            return of_refined, of_b(of_refined, which, a), *of_clips

    return compiled_function(forward), compiled_function(gradients)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other, `[rows, ...]`, without gradient; if they lie so, without a copy."""
    if len(tensors) == 1:
        return tensors[0].detach()
    if not adjacent(tensors):
        return torch.cat(list(tensors)).detach()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return tensors[0].detach().as_strided((rows, *tensors[0].shape[1:]), tensors[0].stride())


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie one after the other, contiguous, in the same memory."""
    storage, offset = tensors[0].untyped_storage().data_ptr(), tensors[0].storage_offset()
    for tensor in tensors:
        here = tensor.untyped_storage().data_ptr() == storage and tensor.storage_offset() == offset
        if not here or not tensor.is_contiguous():
            return False
        offset += tensor.numel()
    return True


@lru_cache(maxsize=64)
def owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of the tensors of so many rows each row is of, int64 `[rows]`."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device))
