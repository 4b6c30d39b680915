"""Learned channel scales: factors that a layer computes the same without, and that make it easier to round.

What comes before a linear is divided by alpha, the columns that read it are multiplied, in five places:

    norm -> q, k, v             the norm's weight / alpha
    norm -> gate, up            the same
    v -> o                      rows of v / alpha; with grouped-query attention one alpha for each channel of a KV head
    up -> down                  rows of up / alpha; not where a rotation stands before down_proj
    q, k                        rows of q / alpha, rows of k * alpha: not read by a linear, but by attention

q and k pass through RoPE, which mixes the two channels of a pair: these share one alpha, as do the query heads that
read a KV head. Where q and k have norms (Qwen3), alpha goes into the norms' weights, which all heads share.

Weights of norms and biases are stored in 16 bits. They are rounded while learning already, straight through, so that
what is learned is what is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["ChannelScale", "ScaledNorm", "Spread", "rounded_to"]

_SMALLEST = 1e-4


class ChannelScale(nn.Module):
    """alpha, fp32 `[size]`, of a site; 1 at first.

    Attributes:
        parameter: alpha itself, or its logarithm.
        log: which.
    """

    def __init__(self, size: int, log: bool, device: torch.device) -> None:
        super().__init__()
        self.log = log
        self.parameter = nn.Parameter((torch.zeros if log else torch.ones)(size, device=device))

    def forward(self) -> Tensor:
        """alpha."""
        return self.parameter.exp() if self.log else self.parameter.clamp(min=_SMALLEST)

    @torch.no_grad()
    def start(self, alpha: Tensor) -> None:
        """Begin with these values."""
        alpha = torch.where(alpha.isfinite() & (alpha > _SMALLEST), alpha, 1.0)
        self.parameter.copy_(alpha.log() if self.log else alpha)


@dataclass(frozen=True)
class Spread:
    """alpha as a linear or norm sees it.

    Attributes:
        index: of the alpha of each channel, int64; None: they are the same.
        inverse: 1 / alpha.
    """

    scale: ChannelScale
    index: Tensor | None = None
    inverse: bool = False

    def __call__(self) -> Tensor:
        alpha = self.scale()
        alpha = alpha if self.index is None else alpha[self.index]
        return 1 / alpha if self.inverse else alpha


class ScaledNorm(nn.Module):
    """A norm whose weight is divided by alpha, in the norm's place.

    Attributes:
        norm: the original.
        scaled: False: it computes what the original does.
    """

    def __init__(self, norm: nn.Module, spread: Spread, stored_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.stored_dtype, self.scaled = norm, stored_dtype, True
        self._spread = spread

    def weight(self) -> Tensor:
        """As it is stored, fp32 `[size]`."""
        original: Tensor = self.norm.weight  # type: ignore[assignment]
        return rounded_to(original / self._spread(), self.stored_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.scaled:
            return self.norm(x)
        return functional_call(self.norm, {"weight": self.weight()}, (x,))


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x fp32, rounded to the values of `dtype`; gradients pass straight through."""
    return x + (x.detach().to(dtype).float() - x.detach())
