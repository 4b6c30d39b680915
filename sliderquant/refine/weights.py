"""What the linears of a layer multiply with while they are being refined, for several of them at once.

    W~ = (W * column) / row + step * V + (1/r) B A    column [in], row [out]: channel scales, or 1; V [out, in]
    W^ = fake_quantize(W~)                            the first `passed` columns; the rest stays as it is

Weights with equally many inputs are taken as one that lie one after the other, and that is cut into pieces: with small
layers it is the number of calls that takes the time, with large ones every pass over memory that no cache holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sliderquant.quantizer.fake_quantize import Grid, grid_functions
from sliderquant.refine.fused import fused_functions, joined, low_rank_sum, owners
from sliderquant.schemes import Scheme

__all__ = ["LearnedWeight", "effective_weights", "refined_weight"]


@dataclass(frozen=True)
class LearnedWeight:
    """A weight and what is learned for it.

    Attributes:
        weight: fp32 `[out, in]`, not learned.
        low_rank_a, low_rank_b: fp32 `[rank, in]` and `[out, rank]`, or None.
        clip_low, clip_high: fp32 `[out, groups]` before the sigmoid, or None.
        column, row: fp32 `[in]` and `[out]`, or None for 1.
        offset: V, fp32 `[out, in]`, or None.
        step: of V, fp32 `[out]`, not learned.
        low, high: fp32 `[out, groups]`, not learned: the range of each group is `grids.free_ends` of them and the
            clipping; or None: it is the clipped one of the current weight.
    """

    weight: Tensor
    low_rank_a: Tensor | None
    low_rank_b: Tensor | None
    clip_low: Tensor | None
    clip_high: Tensor | None
    column: Tensor | None = None
    row: Tensor | None = None
    offset: Tensor | None = None
    step: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the attributes."""
        return tuple(getattr(self, name) for name in _FIELDS)

    @property
    def ends(self) -> Literal["range", "clipped", "free"]:
        """What the ends of a group's range are, see `fake_quantize.grid_functions`."""
        return "free" if self.low is not None else "range" if self.clip_low is None else "clipped"


_FIELDS = tuple(field.name for field in fields(LearnedWeight))
_LEARNED = tuple(name for name in _FIELDS if name not in ("weight", "step", "low", "high"))
_ELEMENTS_AT_ONCE = 1 << 20  # few enough to stay in a cache while they are refined, rounded, and turned into gradients
_TERMS = 8  # of B A, at most, that are summed up one by one


def effective_weights(
    weights: Sequence[LearnedWeight], scheme: Scheme, dtype: torch.dtype, fraction: float = 1.0, compiled: bool = False
) -> tuple[Tensor, ...]:
    """W^ of each weight, `[out, in]` in fp32 or the dtype of autocast, differentiable in what is learned.

    Args:
        weights: of the same number of inputs, and with the same things learned. Compiled, what they were is best
            adjacent in memory, see `fused.joined`.
        dtype: in which scales are stored.
        fraction: the share of the columns that passes through the quantizer. Per channel, the range is that of the
            columns that pass; a group keeps its own.
        compiled: as in `fake_quantize`.
    """
    first = weights[0]
    grid = Grid(0, scheme.levels, scheme.symmetric, (scheme, dtype))
    passed = round(fraction * first.weight.shape[1])
    # Within autocast they would be cast first of all.
    device = first.weight.device.type
    result = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    settings = _Settings(scheme, passed, grid, first.ends, compiled, result)
    learned = [tensor for weight in weights for name in _LEARNED if (tensor := getattr(weight, name)) is not None]
    return _EffectiveWeights.apply(settings, weights, *learned)


@torch.no_grad()
def refined_weight(weight: LearnedWeight) -> Tensor:
    """W~, fp32 `[out, in]`."""
    return _refine(weight, None, torch.empty_like(weight.weight))


def _of(tensor: Tensor, rows: slice | None) -> Tensor:
    """Some rows; None: all. With small weights it is views without need that take the time."""
    return tensor if rows is None else tensor[rows]


def _refine(learned: LearnedWeight, rows: slice | None, out: Tensor) -> Tensor:
    """Some rows of W~."""
    scaled = _of(learned.weight, rows)
    if learned.column is not None:
        scaled = torch.mul(scaled, learned.column, out=out)
    if learned.row is not None:
        scaled = torch.div(scaled, _of(learned.row, rows)[:, None], out=out)
    if learned.offset is not None and learned.step is not None:
        scaled = torch.addcmul(scaled, _of(learned.offset, rows), _of(learned.step, rows)[:, None], out=out)
    if learned.low_rank_a is not None and learned.low_rank_b is not None:
        a, b = learned.low_rank_a, _of(learned.low_rank_b, rows)
        if _by_terms(learned):
            return torch.add(scaled, low_rank_sum(b, a), out=out)
        return torch.addmm(scaled, b, a, alpha=1 / a.shape[0], out=out)
    return out if scaled is out else out.copy_(scaled)


def _by_terms(learned: LearnedWeight) -> bool:
    """Whether B A is summed up term by term, because what is compiled computes it so. Many terms, and what nothing
    fuses, a product of matrices sums faster."""
    a = learned.low_rank_a
    others = learned.column is not None or learned.row is not None or learned.offset is not None
    return a is not None and a.device.type == "cpu" and a.shape[0] <= _TERMS and not others


@dataclass(frozen=True)
class _Settings:
    scheme: Scheme
    passed: int
    grid: Grid
    ends: Literal["range", "clipped", "free"]
    compiled: bool
    dtype: torch.dtype  # of the result


class _Piece:
    """Some rows of the buffer: of one weight, of a part of one, or of several."""

    def __init__(self, sizes: Sequence[int], start: int, stop: int) -> None:
        self.rows = slice(start, stop)
        first = 0
        # Index of the weight and its rows, None for all; and how many these are.
        self.parts: list[tuple[int, slice | None]] = []
        self.sizes: list[int] = []
        for index, rows in enumerate(sizes):
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                self.parts.append((index, None if high - low == rows else slice(low - first, high - first)))
                self.sizes.append(high - low)
            first += rows

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows of this piece, of tensors that lie one after the other."""
        found = [_of(tensors[index], rows) for index, rows in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)


@lru_cache(maxsize=64)
def _pieces(sizes: tuple[int, ...], rows: int) -> list[_Piece]:
    """Of weights of so many rows each, as many rows at once."""
    total = sum(sizes)
    return [_Piece(sizes, start, min(start + rows, total)) for start in range(0, total, rows)]


class _Fused:
    """Refines, rounds, and computes gradients, in one pass each."""

    def __init__(self, settings: _Settings, weights: Sequence[LearnedWeight]) -> None:
        whole = settings.passed == weights[0].weight.shape[1]
        group_size = settings.scheme.group_size
        self.functions = fused_functions(settings.grid, settings.ends, settings.dtype, group_size, whole)
        self.before = () if whole else (settings.passed,)
        weight, b = joined([w.weight for w in weights]), joined([w.low_rank_b for w in weights])  # type: ignore[misc]
        self.of_rows = (weight, owners(tuple([w.weight.shape[0] for w in weights]), weight.device), b)
        self.a = torch.stack([w.low_rank_a for w in weights])  # type: ignore[misc]

    def _inputs(self, piece: _Piece, clips: Sequence[Tensor]) -> tuple[Tensor, ...]:
        weight, which, b = (tensor[piece.rows] for tensor in self.of_rows)
        return weight, which, self.a, b, *clips

    def round(self, piece: _Piece, clips: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Rows of W^; what the gradients need besides the clips."""
        value, *kept = self.functions[0](*self.before, *self._inputs(piece, clips))
        return value, kept

    def gradients(
        self, piece: _Piece, clips: Sequence[Tensor], kept: Sequence[Tensor], grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """Of rows of W~, of B if it is known, and of the clips."""
        found = self.functions[1](*self.before, grad.contiguous(), *self._inputs(piece, clips), *kept)
        return found[0], found[1], found[2:]


class _Stepwise:
    """As `_Fused`, one thing after the other."""

    def __init__(self, settings: _Settings, weights: Sequence[LearnedWeight], pieces: int) -> None:
        self.settings, self.weights, self.pieces = settings, weights, pieces
        self.total = sum(weight.weight.shape[0] for weight in weights)
        self.functions = grid_functions(settings.grid, settings.ends, settings.compiled, settings.dtype)
        self.buffer: Tensor | None = None

    def _refined(self, piece: _Piece) -> Tensor:
        """Of several pieces one after the other is in the same memory."""
        if self.buffer is None or len(self.buffer) < len(piece):
            self.buffer = self.weights[0].weight.new_empty(len(piece), self.weights[0].weight.shape[1])
        out = self.buffer[: len(piece)]
        for (index, rows), here in zip(piece.parts, out.split(piece.sizes), strict=True):
            _refine(self.weights[index], rows, here)
        return out

    def _rows(self, refined: Tensor) -> Tensor:
        """What is quantized of rows of W~: a group whole, also where only its first columns pass."""
        scheme = self.settings.scheme
        part = refined[:, : self.settings.passed].contiguous() if scheme.group_size is None else refined
        return part.view(-1, part.shape[1] // scheme.groups(part.shape[1]))

    def round(self, piece: _Piece, clips: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        refined, passed = self._refined(piece), self.settings.passed
        value, *kept = self.functions[0](self._rows(refined), *clips)
        value = value.view(refined.shape[0], -1)
        if passed < refined.shape[1]:
            value = torch.cat((value[:, :passed], refined[:, passed:].to(value.dtype)), dim=1)
        if piece.rows.stop == self.total:  # until the backward pass
            self.buffer = None
        # Of one piece W~ is kept, of several it is computed again: it would come from memory either way.
        return value, [*kept, *([refined] if self.pieces == 1 else [])]

    def gradients(
        self, piece: _Piece, clips: Sequence[Tensor], kept: Sequence[Tensor], grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        passed, grouped = self.settings.passed, self.settings.scheme.group_size is not None
        if self.pieces == 1:
            *kept, refined = kept
        else:
            refined = self._refined(piece)
        of_part = grad
        if passed < grad.shape[1]:
            grad = grad.float()
            of_part = grad[:, :passed].contiguous()
            if grouped:
                of_part = torch.cat((of_part, torch.zeros_like(grad[:, passed:])), dim=1)
        rows = self._rows(refined)
        of_refined, *of_clips = self.functions[1](of_part.view(rows.shape), rows, *clips, *kept)
        of_refined = of_refined.view(of_part.shape)
        if of_refined.shape[1] < grad.shape[1]:
            of_refined = torch.cat((of_refined, grad[:, passed:]), dim=1)
        elif passed < grad.shape[1]:
            of_refined[:, passed:] += grad[:, passed:]
        return of_refined, None, of_clips


class _EffectiveWeights(torch.autograd.Function):
    """With G the gradient of W~: dA = B^T G / r, dB = G A^T / r, dV = step * G, d column = sum over rows of
    G * W / row, d row = minus the sum over columns of G * W * column / row^2. Neither W~ nor G is ever there as a
    whole."""

    @staticmethod
    def forward(ctx, settings, weights, *learned):
        ctx.weights = weights
        sizes, columns = [weight.weight.shape[0] for weight in weights], weights[0].weight.shape[1]
        ctx.pieces = pieces = _pieces(tuple(sizes), max(_elements_at_once(settings, weights[0]) // columns, 1))
        ctx.method = method = _method(settings, weights, pieces)
        ctx.clips = [_clips(weights, piece) for piece in pieces]
        if len(pieces) == 1:
            result, stored = method.round(pieces[0], ctx.clips[0])
        else:
            result, stored = weights[0].weight.new_empty(sum(sizes), columns, dtype=settings.dtype), []
            for piece, clips in zip(pieces, ctx.clips, strict=True):
                result[piece.rows], kept = method.round(piece, clips)
                stored += kept
        ctx.learned = len(learned)
        # What is learned, so that autograd notices when it was changed in between.
        ctx.save_for_backward(*learned, *stored)
        return result.split(sizes)

    @staticmethod
    def backward(ctx, *grads):
        stored = ctx.saved_tensors[ctx.learned :]
        gradients, each = [_Gradients(weight) for weight in ctx.weights], len(stored) // len(ctx.pieces)
        for number, (piece, clips) in enumerate(zip(ctx.pieces, ctx.clips, strict=True)):
            kept = stored[each * number :][:each]
            of_refined, of_b, of_clips = ctx.method.gradients(piece, clips, kept, piece.gather(grads))
            found = [of_refined, *([] if of_b is None else [of_b]), *(part.view(len(piece), -1) for part in of_clips)]
            by_part = zip(*(part.split(piece.sizes) for part in found), strict=True)
            for (index, rows_of_weight), (here, *others) in zip(piece.parts, by_part, strict=True):
                gradients[index].add(rows_of_weight, here, None if of_b is None else others.pop(0), others)
        return None, None, *(tensor for found in gradients for tensor in found.tensors())


def _elements_at_once(settings: _Settings, weight: LearnedWeight) -> int:
    """On a GPU what is compiled reads and writes them once, so that it is calls that are to be few."""
    return _ELEMENTS_AT_ONCE * (16 if settings.compiled and weight.weight.is_cuda else 1)


def _method(settings: _Settings, weights: Sequence[LearnedWeight], pieces: Sequence[_Piece]) -> _Fused | _Stepwise:
    if settings.compiled and all(map(_by_terms, weights)):
        return _Fused(settings, weights)
    return _Stepwise(settings, weights, len(pieces))


class _Gradients:
    """Of the tensors of one weight, piece by piece: those of its columns are summed, those of its rows filled in.

    Attributes:
        found: by the names of a LearnedWeight's attributes.
    """

    def __init__(self, weight: LearnedWeight) -> None:
        self.weight = weight
        self.found: dict[str, Tensor] = {}

    def add(self, rows: slice | None, grad: Tensor, of_b: Tensor | None, of_clips: Sequence[Tensor]) -> None:
        """grad: of these rows of W~; of_b: of these of B, None: to be computed."""
        weight = self.weight
        if weight.low_rank_a is not None and weight.low_rank_b is not None:
            share = 1 / weight.low_rank_a.shape[0]
            b = _of(weight.low_rank_b, rows)
            if "low_rank_a" in self.found:
                self.found["low_rank_a"].addmm_(b.T, grad, alpha=share)
            else:
                self.found["low_rank_a"] = (b.T @ grad).mul_(share)
            self._fill("low_rank_b", rows, (grad @ weight.low_rank_a.T).mul_(share) if of_b is None else of_b)
        for name, of_clip in zip(("clip_low", "clip_high"), of_clips, strict=False):
            self._fill(name, rows, of_clip)
        if weight.offset is not None and weight.step is not None:
            self._fill("offset", rows, grad * _of(weight.step, rows)[:, None])
        if weight.column is None and weight.row is None:
            return
        product = grad * _of(weight.weight, rows)
        if weight.column is not None:
            of_column = product.sum(0) if weight.row is None else (1 / _of(weight.row, rows)) @ product
            self.found["column"] = self.found["column"].add_(of_column) if "column" in self.found else of_column
        if weight.row is not None:
            sums = product.sum(1) if weight.column is None else product @ weight.column
            self._fill("row", rows, sums.div_(_of(weight.row, rows).square()).neg_())

    def _fill(self, name: str, rows: slice | None, values: Tensor) -> None:
        if rows is None:
            self.found[name] = values
            return
        if name not in self.found:
            self.found[name] = values.new_empty(self.weight.weight.shape[0], *values.shape[1:])
        self.found[name][rows] = values

    def tensors(self) -> list[Tensor | None]:
        """Of what is learned, in the order of a LearnedWeight's attributes."""
        return [self.found.get(name) for name in _LEARNED if getattr(self.weight, name) is not None]


def _clips(weights: Sequence[LearnedWeight], piece: _Piece) -> list[Tensor]:
    return [
        piece.gather([getattr(weight, name) for weight in weights]).flatten()
        for name in ("clip_low", "clip_high", "low", "high")
        if getattr(weights[0], name) is not None
    ]
