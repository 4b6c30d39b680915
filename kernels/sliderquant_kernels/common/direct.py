"""A product with one packed weight, whose tensors were checked once instead of on every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class DirectLinear(Protocol):
    """A linear whose packed weight and bias were checked before."""

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is what the op would compute with these tensors, outside of gradients and tracing."""

    def parts(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """The first `sizes[0]` outputs, the next, and so on, each `[..., size]`; on CUDA slices of one product."""

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, contiguous."""
