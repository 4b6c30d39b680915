"""The kernels that multiply 16-bit activations by quantized weights: ours, torch's, and those of others."""

from ...harness.case import Provider
from . import bitsandbytes, conch, dense, humming, mslk, ours, torch_int4, torchao

__all__ = ["BASELINE", "PROVIDERS"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for module in (dense, ours, torch_int4, humming, torchao, mslk, conch, bitsandbytes)
    for provider in module.PROVIDERS
}
BASELINE = {"cuda": dense.CUBLAS, "cpu": dense.ONEDNN}
