"""The learnable parts of one linear layer, and their merge into codes, scales and zero-points.

    W~ = W * alpha + (1/r) * B @ A        A [r, in] Kaiming-uniform with a = sqrt(5), B [out, r] zeros
    Y  = (X / alpha) @ Q(W~)^T + bias     Q: `fake_quantize` with a learned clipping of every group's range

With activations of 4 or 8 bits, Q_x(X / alpha): `fake_quantize_activations`, its range clipped too if the settings say
so. alpha, where there is one, divides what comes before the linear: see `scales`.

Source: SliderQuant (arXiv 2603.25284); the clipping is OmniQuant's. Everything learned is merged: what remains is a
quantized weight, and of a clipping of activations two numbers.

In a stage of intra-layer sliding only the first `fraction` of the input channels passes through the quantizers, the
rest of W~ and X stays in full precision. Per channel and per token, the range of such a stage is that of the channels
that pass.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.planning.settings import Settings
from sliderquant.quantizer.grids import (
    Grid,
    QuantizedWeight,
    clipped_grid,
    dequantize,
    find_grid,
    free_ends,
    quantize,
    ranges,
)
from sliderquant.refine.activation_clipping import ActivationClipping
from sliderquant.refine.fused import adjacent
from sliderquant.refine.scales import Spread, rounded_to
from sliderquant.refine.shared import SharedInput
from sliderquant.refine.weights import LearnedWeight, effective_weights, refined_weight
from sliderquant.schemes import Scheme

__all__ = ["RefinedLinear", "WeightGroup", "generator_for"]


STARTED = ("step", "low", "high")


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A CPU generator of its own for each named use of the seed, so that no use depends on the order of the others."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (seed, *what))).encode()))


class WeightGroup:
    """Linears of a layer with equally many inputs: what they multiply with is computed once for all of them.

    The first one that is called in a forward pass of the layer does it, and the others take theirs; one that comes for
    the second time begins the next pass.
    """

    def __init__(self) -> None:
        self.linears: list[RefinedLinear] = []
        self._kept: dict[int, Tensor] = {}
        self._laid: Tensor | None = None

    def take(self, linear: "RefinedLinear") -> Tensor:
        """W^ of a linear of the group, fp32 `[out, in]`."""
        if id(linear) not in self._kept:
            first = linear
            if first.compiled:
                self._lay_together()
            weights = effective_weights(
                [other.learned_weight() for other in self.linears],
                first.scheme,
                first.stored_dtype,
                first.fraction,
                first.compiled,
            )
            self._kept = {id(other): weight for other, weight in zip(self.linears, weights, strict=True)}
        return self._kept.pop(id(linear))

    def _lay_together(self) -> None:
        """The weights as they were, one after the other in memory: they are read as one in every step."""
        if self.linears[0].weight is self._laid:
            return
        weights = [linear.weight for linear in self.linears]
        if not adjacent(weights):
            parts = torch.cat(weights).split([len(weight) for weight in weights])
            for linear, part in zip(self.linears, parts, strict=True):
                linear.weight = part
        self._laid = self.linears[0].weight


class RefinedLinear(nn.Module):
    """A linear layer whose weight is being refined.

    Attributes:
        weight: the original weight, fp32 `[out, in]`; not learned.
        offset: V, fp32 `[out, in]`, or None.
        step: of V: that of the row's grids at the start, on average, fp32 `[out]`; or None.
        low, high: fp32 `[out, groups]`: the ends of each group's range at the start, if they are free; or None.
        bias: fp32 `[out]` or None; not learned.
        low_rank_a, low_rank_b: fp32 `[rank, in]` and `[out, rank]`, or None.
        clip_low, clip_high: fp32 `[out, groups]`, before the sigmoid, or the exponential once the ends are free; or
            None.
        input_clipping: of the range of the input, shared by all linears that read it; or None.
        column, row: channel scales, which belong to the layer: its input comes divided by the one, its output and bias
            are to be divided by the other; or None.
        quantized: whether `forward` uses the quantizers; False: the original layer.
        fraction: the share of the input channels that passes through the quantizers.
        compiled: whether the quantizers are, see `compiling.can_compile`.
    """

    column: Spread | None = None
    row: Spread | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        stored_dtype: torch.dtype,
        settings: Settings,
        generator: torch.Generator,
        shared: SharedInput | None = None,
        group: WeightGroup | None = None,
    ) -> None:
        """
        Args:
            shared: of the linears that read the same input; None: this one alone.
            group: of linears of the same layer, number of inputs and scheme; None: this one alone.
        """
        super().__init__()
        self._shared, self._group = shared or SharedInput(), group or WeightGroup()
        self._group.linears.append(self)
        out_features, in_features = weight.shape
        self.scheme, self.stored_dtype = scheme, stored_dtype
        self.register_buffer("weight", weight.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.low_rank_a = self.low_rank_b = self.clip_low = self.clip_high = self.offset = None
        if settings.rank > 0:
            bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
            uniform = torch.empty(settings.rank, in_features).uniform_(-bound, bound, generator=generator)
            self.low_rank_a = nn.Parameter(uniform.to(weight.device))
            self.low_rank_b = nn.Parameter(torch.zeros(out_features, settings.rank, device=weight.device))
        if settings.clipping:
            shape = (out_features, scheme.groups(in_features))
            start = 4.0 if settings.clipping_start == "search" else settings.clipping_start
            self.clip_low = nn.Parameter(torch.full(shape, start, device=weight.device))
            self.clip_high = nn.Parameter(torch.full(shape, start, device=weight.device))
        self.input_clipping = self._shared.clipping
        if settings.weights:
            self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.free_grid = settings.grid == "free"
        for name in STARTED:
            self.register_buffer(name, None)
        self.quantized = True
        self.fraction = 1.0
        self.compiled = False
        self._frozen: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    weight: Tensor
    bias: Tensor | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None
    clip_low: nn.Parameter | None
    clip_high: nn.Parameter | None
    input_clipping: ActivationClipping | None
    offset: nn.Parameter | None
    step: Tensor | None
    low: Tensor | None
    high: Tensor | None

    @torch.no_grad()
    def start(self) -> None:
        """The grids of the weight, scaled and clipped as it is now, are those where learning starts: from here on the
        ends of the ranges are free, if they are to be, and V counts."""
        refined = refined_weight(self.learned_weight())
        if self.offset is not None:
            self.step = self.grid(refined).scale.mean(1)
        if self.free_grid and self.clip_low is not None and self.clip_high is not None:
            self.low, self.high = ranges(refined, self.scheme)
            for clip in (self.clip_low, self.clip_high):
                clip.copy_(F.logsigmoid(clip))

    def grid(self, refined: Tensor) -> Grid:
        """That of W~."""
        if self.low is None or self.high is None or self.clip_low is None or self.clip_high is None:
            return clipped_grid(refined, self.clip_low, self.clip_high, self.scheme, self.stored_dtype)
        ends = free_ends(self.low, self.high, self.clip_low, self.clip_high)
        return find_grid(*ends, self.scheme, self.stored_dtype)

    def learned_weight(self) -> LearnedWeight:
        """The weight and what is learned for it."""
        return LearnedWeight(
            self.weight,
            self.low_rank_a,
            self.low_rank_b,
            self.clip_low,
            self.clip_high,
            None if self.column is None else self.column(),
            None if self.row is None else self.row(),
            self.offset,
            self.step,
            self.low,
            self.high,
        )

    def effective_weight(self) -> Tensor:
        """What `forward` multiplies with, fp32 `[out, in]`."""
        return self._group.take(self) if self.quantized else self.weight

    def effective_bias(self) -> Tensor | None:
        """What `forward` adds, fp32 `[out]`: rounded to the dtype in which it is stored."""
        if self.bias is None or self.row is None or not self.quantized:
            return self.bias
        return rounded_to(self.bias / self.row(), self.stored_dtype)

    def effective_input(self, x: Tensor) -> Tensor:
        """What `forward` multiplies x `[..., in]` as."""
        if not self.quantized or not self.scheme.quantizes_activations:
            return x
        return self._shared.rounded(x, self.scheme, self.fraction, self.compiled)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        weight = self.effective_weight() if self._frozen is None else self._frozen
        return F.linear(self.effective_input(x), weight, self.effective_bias())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this context the effective weight is computed once: for passes over data without learning."""
        with torch.no_grad():
            self._frozen = self.effective_weight()
        try:
            yield
        finally:
            self._frozen = None

    @torch.no_grad()
    def merge(self) -> tuple[QuantizedWeight, Tensor]:
        """The weight as it is stored, and the weight that was trained, fp32 `[out, in]`: equal bit for bit."""
        learned = self.learned_weight()
        refined = refined_weight(learned)
        grid = self.grid(refined)
        (trained,) = effective_weights([learned], self.scheme, self.stored_dtype)
        quantized = quantize(refined, grid, self.scheme, self.stored_dtype)
        assert torch.equal(dequantize(quantized, self.scheme), trained), (
            "the stored weight differs from the trained one"
        )
        return quantized, trained
