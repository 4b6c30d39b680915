"""One window: hidden states of two streams go in, refined layers come out.

The window is trained on the `quant` stream (what the layers before it, already quantized, put out) to match, by the
mean squared error of its last layer's output, the full-precision window applied to the `fp` stream. Every stage of
every window gets a fresh AdamW without weight decay whose learning rates fall linearly to 0.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.calibration.streams import ActivationStream
from sliderquant.errors import SliderQuantError
from sliderquant.methods import Settings
from sliderquant.refine import RefinedLinear, generator_for, refined_linears

__all__ = ["StageResult", "WindowLayers", "matmul_context", "train_stage"]


def matmul_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of matrix products while learning. `auto` is bfloat16 on GPUs that have it, else float32: on a CPU
    bfloat16 is little faster in a whole step, and at 3 and 4 bits its noise costs accuracy."""
    if settings.matmul != "auto":
        return torch.bfloat16 if settings.matmul == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32


def matmul_context(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Within it matrix products are done in `dtype`; everything else stays in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass
class WindowLayers:
    """Consecutive decoder layers and the keyword arguments that each is called with."""

    layers: Sequence[nn.Module]
    arguments: Sequence[dict[str, Any]]

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[batch, seqlen, hidden]` -> the last layer's output, the same shape."""
        for layer, arguments in zip(self.layers, self.arguments, strict=True):
            out = layer(hidden, **arguments)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def linears(self) -> list[RefinedLinear]:
        return [linear for layer in self.layers for linear in refined_linears(layer).values()]

    def set(self, quantized: bool, fraction: float = 1.0) -> None:
        """Switch every linear between the quantizer and the original weight."""
        for linear in self.linears():
            linear.quantized, linear.fraction = quantized, fraction

    def walk(
        self,
        stream: ActivationStream,
        batch_size: int,
        device: torch.device,
        into: ActivationStream | None = None,
    ) -> None:
        """Put the whole stream through the layers, without learning, in fp32: what is rounded here would be learned."""
        with ExitStack() as stack:
            for linear in self.linears():
                stack.enter_context(linear.frozen())
            stream.walk(self, device, batch_size, into)


@dataclass
class StageResult:
    """What happened in one stage of one window.

    Attributes:
        losses: mean loss of each epoch, in the order of the epochs; the last attempt's.
        retries: attempts thrown away because of a non-finite loss.
        rate_scale: factor on the learning rates in the last attempt.
        converged: False when every attempt met a non-finite loss and the window was left as it was.
    """

    losses: list[float] = field(default_factory=list)
    retries: int = 0
    rate_scale: float = 1.0
    converged: bool = True


def train_stage(
    window: WindowLayers,
    inputs: ActivationStream,
    targets: ActivationStream,
    fraction: float,
    epochs: int,
    settings: Settings,
    seed: int,
    label: str,
    device: torch.device,
    on_epoch: Callable[[int, float], None],
) -> StageResult:
    """Refine the window with the first `fraction` of the input channels quantized.

    A non-finite loss puts the window back to where it started, halves the learning rates and tries again.

    Args:
        inputs, targets: `[samples, seqlen, hidden]`, the quant stream before the window and the goal after it.
        label: names this stage of this window; with `seed` it decides the order of the samples.
        on_epoch: called after each epoch with the number of steps it took and its mean loss.
    """
    window.set(quantized=True, fraction=fraction)
    linears = window.linears()
    start = [linear.learned() for linear in linears]
    result = StageResult()
    while True:
        result.losses = []
        if _epochs(window, inputs, targets, epochs, settings, seed, label, device, on_epoch, result):
            return result
        for linear, learned in zip(linears, start, strict=True):
            linear.restore(learned)
        if result.retries == settings.retries:
            result.converged = False
            if not math.isfinite(_loss_without_learning(window, inputs, targets, settings, device)):
                raise SliderQuantError(
                    f"window {label}: the loss is not finite even before training; the model's weights or activations "
                    "hold values that are not finite: check the model with `sliderquant eval`"
                )
            return result
        result.retries += 1
        result.rate_scale /= 2


def _epochs(
    window: WindowLayers,
    inputs: ActivationStream,
    targets: ActivationStream,
    epochs: int,
    settings: Settings,
    seed: int,
    label: str,
    device: torch.device,
    on_epoch: Callable[[int, float], None],
    result: StageResult,
) -> bool:
    """One attempt; False: it met a non-finite loss."""
    rates = settings.learning_rates
    groups = [
        {"params": [p for linear in window.linears() for p in linear.low_rank_parameters()], "lr": rates.low_rank},
        {"params": [p for linear in window.linears() for p in linear.clipping_parameters()], "lr": rates.clipping},
    ]
    groups = [
        {**group, "lr": group["lr"] * settings.batch_size * result.rate_scale}  # type: ignore[operator]
        for group in groups
        if group["params"]
    ]
    samples = inputs.data.shape[0]
    steps = math.ceil(samples / settings.batch_size)
    if not groups:
        result.losses = [_loss_without_learning(window, inputs, targets, settings, device)] * epochs
        return math.isfinite(result.losses[0])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / (steps * epochs), 0.0))
    order = generator_for(seed, label, "order")
    dtype = matmul_dtype(settings, device)
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for rows in torch.randperm(samples, generator=order).split(settings.batch_size):
            with matmul_context(dtype, device):
                out = window(inputs.batch(rows, device))
            loss = F.mse_loss(out.float(), targets.batch(rows, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        mean = (total / samples).item()
        if not math.isfinite(mean):
            return False
        result.losses.append(mean)
        on_epoch(steps, mean)
    return all(bool(p.isfinite().all()) for linear in window.linears() for p in linear.parameters())


@torch.no_grad()
def _loss_without_learning(
    window: WindowLayers, inputs: ActivationStream, targets: ActivationStream, settings: Settings, device: torch.device
) -> float:
    total, samples = 0.0, inputs.data.shape[0]
    with matmul_context(matmul_dtype(settings, device), device):
        for rows in torch.arange(samples).split(settings.batch_size):
            out = window(inputs.batch(rows, device))
            total += F.mse_loss(out.float(), targets.batch(rows, device)).item() * len(rows)
    return total / samples
