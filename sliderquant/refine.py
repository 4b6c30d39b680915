"""The learnable parts of one linear layer, and their merge into codes, scales and zero-points.

    W~ = W + (1/r) * B @ A        A [r, in] Kaiming-uniform with a = sqrt(5), B [out, r] zeros
    Y  = X @ Q(W~)^T + bias       Q: `fake_quantize` with a learned clipping of every group's range

With activations of 4 or 8 bits, Q_x(X) instead of X: `fake_quantize_activations`, of which nothing is learned.

Source: SliderQuant (arXiv 2603.25284); the clipping is OmniQuant's. Everything learned is merged: what remains after
`merge` is a quantized weight and nothing else.

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

from sliderquant.fake_quantize import fake_quantize, fake_quantize_activations
from sliderquant.methods import Settings
from sliderquant.quantizer import QuantizedWeight, clipped_grid, dequantize, quantize
from sliderquant.schemes import Scheme

__all__ = ["RefinedLinear", "SharedInput", "generator_for", "refined_linears"]


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A CPU generator of its own for each named use of the seed, so that no use depends on the order of the others."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (seed, *what))).encode()))


class SharedInput:
    """Linears that read the same tensor round it once: the first one does, the others take what it made.

    What is kept is let go with the last of them, and is never taken for that of another tensor.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self._kept: tuple[Tensor, float, Tensor] | None = None
        self._left = 0

    def rounded(self, x: Tensor, scheme: Scheme, fraction: float, compiled: bool) -> Tensor:
        """x `[..., in]` with the first `fraction` of its channels rounded, each row over the range of these."""
        if self._kept is None or self._kept[0] is not x or self._kept[1] != fraction:
            bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
            passed = round(fraction * x.shape[-1])
            rounded = fake_quantize_activations(x[..., :passed], bits, symmetric, compiled)
            if passed < x.shape[-1]:
                rounded = torch.cat((rounded, x[..., passed:]), dim=-1)
            self._kept, self._left = (x, fraction, rounded), self.readers
        rounded, self._left = self._kept[2], self._left - 1
        if self._left == 0:
            self._kept = None
        return rounded


class RefinedLinear(nn.Module):
    """A linear layer whose weight is being refined.

    Attributes:
        weight: the original weight, fp32 `[out, in]`; not learned.
        bias: fp32 `[out]` or None; not learned.
        low_rank_a, low_rank_b: fp32 `[rank, in]` and `[out, rank]`, or None.
        clip_low, clip_high: fp32 `[out, groups]` before the sigmoid, or None.
        quantized: whether `forward` uses the quantizers; False: the original layer.
        fraction: the share of the input channels that passes through the quantizers.
        compiled: whether the quantizers are, see `fake_quantize.can_compile`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        stored_dtype: torch.dtype,
        settings: Settings,
        generator: torch.Generator,
        shared: SharedInput | None = None,
    ) -> None:
        """
        Args:
            shared: of the linears that read the same input and have the same scheme; None: this one alone.
        """
        super().__init__()
        self._shared = shared or SharedInput()
        out_features, in_features = weight.shape
        self.scheme, self.stored_dtype = scheme, stored_dtype
        self.register_buffer("weight", weight.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.low_rank_a = self.low_rank_b = self.clip_low = self.clip_high = None
        if settings.rank > 0:
            bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
            start = torch.empty(settings.rank, in_features).uniform_(-bound, bound, generator=generator)
            self.low_rank_a = nn.Parameter(start.to(weight.device))
            self.low_rank_b = nn.Parameter(torch.zeros(out_features, settings.rank, device=weight.device))
        if settings.clipping:
            shape = (out_features, scheme.groups(in_features))
            self.clip_low = nn.Parameter(torch.full(shape, settings.clipping_start, device=weight.device))
            self.clip_high = nn.Parameter(torch.full(shape, settings.clipping_start, device=weight.device))
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

    def refined_weight(self) -> Tensor:
        """W~, fp32 `[out, in]`."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return self.weight
        return torch.addmm(self.weight, self.low_rank_b, self.low_rank_a, alpha=1 / self.low_rank_a.shape[0])

    def effective_weight(self) -> Tensor:
        """What `forward` multiplies with, fp32 `[out, in]`."""
        if not self.quantized:
            return self.weight
        refined = self.refined_weight()
        if self.fraction >= 1:
            return self._on_the_grid(refined)
        passed = round(self.fraction * refined.shape[1])
        # Per channel, the range is that of the channels that pass; a group keeps its own.
        values = self._on_the_grid(refined[:, :passed] if self.scheme.group_size is None else refined)
        return torch.cat((values[:, :passed], refined[:, passed:]), dim=1)

    def _on_the_grid(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.clip_low, self.clip_high, self.scheme, self.stored_dtype, self.compiled)

    def effective_input(self, x: Tensor) -> Tensor:
        """What `forward` multiplies x `[..., in]` as."""
        if not self.quantized or not self.scheme.quantizes_activations:
            return x
        return self._shared.rounded(x, self.scheme, self.fraction, self.compiled)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        weight = self.effective_weight() if self._frozen is None else self._frozen
        return F.linear(self.effective_input(x), weight, self.bias)

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
        refined = self.refined_weight()
        grid = clipped_grid(refined, self.clip_low, self.clip_high, self.scheme, self.stored_dtype)
        trained = self._on_the_grid(refined)
        quantized = quantize(refined, grid, self.scheme, self.stored_dtype)
        assert torch.equal(dequantize(quantized, self.scheme), trained), (
            "the stored weight differs from the trained one"
        )
        return quantized, trained

    def low_rank_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.low_rank_a, self.low_rank_b) if p is not None]

    def clipping_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.clip_low, self.clip_high) if p is not None]

    def learned(self) -> dict[str, Tensor]:
        """A copy of what was learned, by name; `restore` takes it back."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def restore(self, learned: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(learned[name])


def refined_linears(module: nn.Module) -> dict[str, RefinedLinear]:
    """The refined linears inside `module`, by the names in it of the linears whose places they take."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, RefinedLinear)}
    # Behind an online rotation it is the child `linear` of what stands in its place.
    return {name.removesuffix(".linear"): child for name, child in found.items()}
