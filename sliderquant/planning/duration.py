"""How long a run will take: its operations counted, divided by how fast the device does them.

A learning step of one decoder layer with W quantized weights, on T tokens of a batch:

    products    6 T W FLOP: forward, gradient of the input, gradient of the weight
    attention   14 T seqlen A FLOP in fp32, A = heads x head size: forward 4, backward 10
    updates     UPDATES_OF_WEIGHTS W + UPDATES_OF_TOKENS T hidden: what else takes time, quantizers, hardening, norms,
                activation functions, counted as AdamW's updates of so many parameters
    calls       CALLS_OF_LAYER, whatever their size

Windows that match logits multiply with the head as well. Before a window is learned its targets are computed, and its
first layers are left behind by both streams: forward passes in fp32. The constants come from a profile of SmolLM2-135M.
The result is an estimate from rates that are measured in a second; once the first window is done, its time says more.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from sliderquant.planning.plan import Plan
from sliderquant.planning.precision import matmul_dtype

__all__ = ["Speed", "expected_seconds", "measured_speed"]

UPDATES_OF_WEIGHTS = 3.4
UPDATES_OF_TOKENS = 9.0
CALLS_OF_LAYER = 500


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Attributes:
        learning: FLOP/s of matrix products in the dtype of learning.
        fp32: FLOP/s of matrix products in fp32.
        updates: fp32 parameters that AdamW updates, not fused: in passes over memory, as what is counted in them.
        calls: operations on a few values.
    """

    learning: float
    fp32: float
    updates: float
    calls: float


def measured_speed(plan: Plan, device: torch.device) -> Speed:
    """Measure the device on tensors of the sizes that the plan's layers have; half a second on a CPU."""
    tokens = min(plan.learning.batch_size * plan.seqlen, 4096)
    source = plan.source
    shapes = (source.shape(layer, name) for layer in source.layers for name in layer.linears)
    out_features, in_features = max(shapes, key=math.prod)
    learning, rates = matmul_dtype(plan.learning, device, plan.source.config.hidden_size), {}
    for dtype in {learning, torch.float32}:
        x = torch.randn(tokens, in_features, device=device).to(dtype)
        weight = torch.randn(out_features, in_features, device=device).to(dtype)
        flop = 2 * tokens * in_features * out_features
        rates[dtype] = flop / _seconds(partial(F.linear, x, weight), device)
    parameter = torch.nn.Parameter(torch.ones(out_features, in_features, device=device))
    parameter.grad = torch.ones_like(parameter)
    few = torch.ones(8, device=device)
    return Speed(
        learning=rates[learning],
        fp32=rates[torch.float32],
        updates=parameter.numel() / _seconds(torch.optim.AdamW([parameter]).step, device),
        calls=1 / _seconds(lambda: few.add_(1.0), device, times=200),
    )


def expected_seconds(plan: Plan, speed: Speed) -> float:
    """Seconds of learning, of a plan with windows; reading, packing and writing are not in it."""
    settings, config, weights = plan.learning, plan.source.config, plan.layer_weights
    attention = plan.source.layers[0].attention
    heads, head_size = attention.heads, attention.head_dim
    tokens = settings.batch_size * plan.seqlen
    step = (
        6 * tokens * weights / speed.learning
        + 14 * tokens * plan.seqlen * heads * head_size / speed.fp32
        + (UPDATES_OF_WEIGHTS * weights + UPDATES_OF_TOKENS * tokens * config.hidden_size) / speed.updates
        + CALLS_OF_LAYER / speed.calls
    )
    forward = 2 * tokens * weights / speed.fp32 + 4 * tokens * plan.seqlen * heads * head_size / speed.fp32
    batches = math.ceil(plan.samples / settings.batch_size)
    passes = sum(map(len, plan.windows)) + 2 * plan.windows[-1].start
    sweeps = len(settings.stages) if settings.stage_order == "sweep" else 1
    return plan.work * step + sweeps * batches * passes * forward


def _seconds(call: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Of one call: the least of several, for what else the machine does only adds."""
    best = math.inf
    for attempt in range(4):
        start = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:  # the first one allocates
            best = min(best, (time.perf_counter() - start) / times)
    return best
