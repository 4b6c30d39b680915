"""Whether the quantizers can be compiled where this runs."""

import logging
from functools import lru_cache

import torch

from sliderquant.quantizer.fake_quantize import fake_quantize, fake_quantize_activations
from sliderquant.refine.weights import LearnedWeight, effective_weights
from sliderquant.schemes import Scheme

__all__ = ["can_compile"]

_logger = logging.getLogger(__name__)


@lru_cache(maxsize=16)
def can_compile(device_type: str, dtype: torch.dtype) -> bool:
    """Whether fake quantization compiles here and computes, bit for bit, what it does uncompiled: tried once, which
    takes some seconds. A CPU needs a C++ compiler, CUDA a release of torch that can divide exactly.

    Args:
        dtype: in which scales are stored.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        weight, a, b = (
            torch.randn(shape, generator=generator).to(device_type) for shape in ((48, 96), (4, 96), (48, 4))
        )
        clip = torch.rand(48, 1, generator=generator).to(device_type) * 4
        factors = torch.tensor(0.93, device=device_type), torch.tensor(0.87, device=device_type)
        for x, function in (
            (weight, lambda compiled: fake_quantize(weight, clip, clip / 2, Scheme(3), dtype, compiled)),
            (weight, lambda compiled: fake_quantize_activations(weight, 4, False, compiled)),
            (weight, lambda compiled: fake_quantize_activations(weight, 4, False, compiled, factors)),
            (a, lambda compiled: _effective_weight(LearnedWeight(weight, a, b, clip, clip / 2), dtype, compiled)),
        ):
            x.requires_grad_()
            plain, compiled = function(False), function(True)
            if not torch.equal(plain, compiled):
                _logger.warning("compiled fake quantization does not compute the same bits: it runs uncompiled")
                return False
            torch.autograd.grad(compiled.sum(), x)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        _logger.warning("fake quantization runs uncompiled: %s: %s", type(error).__name__, reason)
        return False
    return True


def _effective_weight(weight: LearnedWeight, dtype: torch.dtype, compiled: bool) -> torch.Tensor:
    return effective_weights([weight], Scheme(3), dtype, compiled=compiled)[0]
