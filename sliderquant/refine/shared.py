"""What linears with one input do once for all of them."""

import torch
from torch import Tensor

from sliderquant.quantizer.fake_quantize import fake_quantize_activations
from sliderquant.refine.activation_clipping import ActivationClipping
from sliderquant.schemes import Scheme

__all__ = ["SharedInput"]


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
