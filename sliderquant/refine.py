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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.activation_clipping import ActivationClipping
from sliderquant.fake_quantize import fake_quantize_activations
from sliderquant.fused_weights import adjacent
from sliderquant.quantizer import (
    Grid,
    QuantizedWeight,
    clipped_grid,
    dequantize,
    find_grid,
    free_ends,
    quantize,
    ranges,
)
from sliderquant.refined_weights import LearnedWeight, effective_weights, refined_weight
from sliderquant.scales import ChannelScale, ScaledNorm, Spread, rounded_to
from sliderquant.schemes import Scheme
from sliderquant.settings import Settings

__all__ = [
    "RefinedLinear",
    "SharedInput",
    "WeightGroup",
    "generator_for",
    "learned_parameters",
    "learned_state",
    "merged_layer",
    "refined_linears",
    "restore_learned",
]


_STARTED = ("step", "low", "high")
_KINDS = {
    "offset": "weights",
    "low_rank_a": "low_rank",
    "low_rank_b": "low_rank",
    "clip_low": "clipping",
    "clip_high": "clipping",
}


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A CPU generator of its own for each named use of the seed, so that no use depends on the order of the others."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (seed, *what))).encode()))


class SharedInput:
    """Linears that read the same tensor round it once: the first one does, the others take what it made.

    What is kept is let go with the last of them, and is never taken for that of another tensor.

    Attributes:
        clipping: of the input's range; None: none.
    """

    def __init__(self, readers: int = 1, clipping: ActivationClipping | None = None) -> None:
        self.readers, self.clipping = readers, clipping
        self._kept: tuple[Tensor, float, Tensor] | None = None
        self._left = 0

    def rounded(self, x: Tensor, scheme: Scheme, fraction: float, compiled: bool) -> Tensor:
        """x `[..., in]` with the first `fraction` of its channels rounded, each row over the range of these."""
        if self._kept is None or self._kept[0] is not x or self._kept[1] != fraction:
            bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
            passed = round(fraction * x.shape[-1])
            clip = None if self.clipping is None else self.clipping()
            rounded = fake_quantize_activations(x[..., :passed], bits, symmetric, compiled, clip)
            if passed < x.shape[-1]:
                rounded = torch.cat((rounded, x[..., passed:]), dim=-1)
            self._kept, self._left = (x, fraction, rounded), self.readers
        rounded, self._left = self._kept[2], self._left - 1
        if self._left == 0:
            self._kept = None
        return rounded


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
        for name in _STARTED:
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


def refined_linears(module: nn.Module) -> dict[str, RefinedLinear]:
    """The refined linears inside `module`, by the names in it of the linears whose places they take."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, RefinedLinear)}
    # Behind an online rotation it is the child `linear` of what stands in its place.
    return {name.removesuffix(".linear"): child for name, child in found.items()}


def learned_parameters(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What is learned inside `module`: by kind, named as its learning rate, and by name."""
    kinds = ("weights", "low_rank", "clipping", "scales", "activation_clipping")
    found: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in kinds}
    for name, child in module.named_modules():
        for own, parameter in child.named_parameters(recurse=False):
            if isinstance(child, RefinedLinear):
                found[_KINDS[own]][f"{name}.{own}"] = parameter
            elif isinstance(child, ChannelScale):
                found["scales"][f"{name}.{own}"] = parameter
            elif isinstance(child, ActivationClipping):
                found["activation_clipping"][f"{name}.{own}"] = parameter
    return found


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what was learned inside `module`, and of what it is counted from, by name; `restore_learned` takes it
    back."""
    kinds = learned_parameters(module).values()
    state = {name: parameter.detach().clone() for kind in kinds for name, parameter in kind.items()}
    for name, child in module.named_modules():
        if isinstance(child, RefinedLinear):
            started = ((own, getattr(child, own)) for own in _STARTED)
            state |= {f"{name}.{own}": tensor.clone() for own, tensor in started if tensor is not None}
    return state


@torch.no_grad()
def restore_learned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `learned_state` returned."""
    for kind in learned_parameters(module).values():
        for name, parameter in kind.items():
            parameter.copy_(state[name])
    for name, child in module.named_modules():
        if isinstance(child, RefinedLinear):
            for own in _STARTED:
                tensor = state.get(f"{name}.{own}")
                setattr(child, own, None if tensor is None else tensor.clone())


@torch.no_grad()
def merged_layer(layer: nn.Module) -> tuple[dict[str, tuple[QuantizedWeight, Tensor]], dict[str, Tensor]]:
    """What is stored of a refined decoder layer: by name of the linear, what `merge` returns; and by name of the
    tensor, the norms and biases that channel scales were merged into, fp32, with values that their dtypes hold."""
    linears = refined_linears(layer)
    dense = {f"{name}.weight": child.weight() for name, child in layer.named_modules() if isinstance(child, ScaledNorm)}
    for name, linear in linears.items():
        bias = linear.effective_bias()
        if linear.row is not None and bias is not None:
            dense[f"{name}.bias"] = bias
    return {name: linear.merge() for name, linear in linears.items()}, dense
