"""One window: hidden states of two streams go in, refined layers come out.

The window is trained on the `quant` stream (what the layers before it, already quantized, put out) to match, by the
mean squared error of its last layer's output, the full-precision window applied to the `fp` stream. Every stage of
every window gets a fresh AdamW whose learning rates fall linearly to 0; nothing but offsets of weights may decay.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.calibration.layerwise import RunningLayer
from sliderquant.calibration.streams import ActivationStream
from sliderquant.errors import SliderQuantError
from sliderquant.modules.attention import AttentionRounding
from sliderquant.planning.precision import matmul_dtype
from sliderquant.planning.settings import Settings
from sliderquant.refine.hardening import Hardening
from sliderquant.refine.layer import learned_parameters, learned_state, refined_linears, restore_learned
from sliderquant.refine.linear import RefinedLinear, generator_for
from sliderquant.refine.scales import ScaledNorm

__all__ = ["Stage", "StageResult", "WindowLayers", "divergence", "matmul_context", "squared_error", "train_stage"]


def matmul_context(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Within it matrix products are done in `dtype`; everything else stays in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass
class WindowLayers:
    """Consecutive decoder layers."""

    layers: Sequence[RunningLayer]

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[batch, seqlen, hidden]` -> the last layer's output, the same shape."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def linears(self) -> list[RefinedLinear]:
        return [linear for layer in self.layers for linear in refined_linears(layer.module).values()]

    def learned_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is learned in the window, by kind."""
        found: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers:
            for kind, parameters in learned_parameters(layer.module).items():
                found.setdefault(kind, []).extend(parameters.values())
        return found

    def set(self, quantized: bool, fraction: float = 1.0) -> None:
        """Switch every linear between the quantizer and the original weight, norms to theirs, and attention between the
        rounding of what it multiplies and none."""
        for linear in self.linears():
            linear.quantized, linear.fraction = quantized, fraction
        for layer in self.layers:
            for module in layer.module.modules():
                if isinstance(module, AttentionRounding):
                    module.enabled = quantized
                elif isinstance(module, ScaledNorm):
                    module.scaled = quantized

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


@dataclass(frozen=True)
class Stage:
    """What a window is trained on in one intra-layer stage.

    Attributes:
        inputs, targets: `[samples, seqlen, hidden]`, the quant stream before the window and the goal after it.
        output: from hidden states `[batch, seqlen, hidden]` after the model's last layer to logits, where these are to
            match; None: the hidden states are.
        fraction: share of the input channels that is quantized.
        label: names this stage of this window; with `seed` it decides the order of the samples.
    """

    window: WindowLayers
    inputs: ActivationStream
    targets: ActivationStream
    fraction: float
    epochs: int
    settings: Settings
    seed: int
    label: str
    device: torch.device
    output: Callable[[Tensor], Tensor] | None = None

    @property
    def samples(self) -> int:
        return self.inputs.data.shape[0]

    def loss(self, rows: Tensor) -> Tensor:
        """Over the samples `rows`: `squared_error`, or of logits the divergence for a token."""
        targets = self.targets.batch(rows, self.device)
        dtype = matmul_dtype(self.settings, self.device, targets.shape[-1])
        with matmul_context(dtype, self.device):
            out = self.window(self.inputs.batch(rows, self.device))
            if self.output is None:
                return squared_error(out, targets, self.settings.relative_loss)
            with torch.no_grad():
                wanted = self.output(targets)
            return divergence(self.output(out), wanted)


def squared_error(out: Tensor, targets: Tensor, relative: float) -> Tensor:
    """The mean squared error, each token weighted by its mean square to the power `-relative`, with weights of mean 1.

    A token that collects attention may have hidden states so large that nearly all of the error is its own. It must be
    kept well, for every other token attends to it, but so must they: docs/recipe.md has what a power of 1/4 brings.

    Args:
        out, targets: `[batch, seqlen, hidden]`.
    """
    if relative == 0:
        return F.mse_loss(out.float(), targets)
    energy = targets.square().mean(-1)
    weights = (energy + 1e-12 * energy.mean() + torch.finfo(energy.dtype).tiny).pow(-relative)
    return ((out.float() - targets).square().mean(-1) * weights).mean() / weights.mean()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(logits)), mean over the tokens.

    Args:
        logits, wanted: `[..., vocabulary]`.
    """
    size = logits.shape[-1]
    found, goal = (F.log_softmax(x.reshape(-1, size).float(), dim=-1) for x in (logits, wanted))
    return F.kl_div(found, goal, log_target=True, reduction="batchmean")


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


def train_stage(stage: Stage, on_epoch: Callable[[int, float], None]) -> StageResult:
    """Refine the window.

    A non-finite loss puts the window back to where it started, halves the learning rates and tries again.

    Args:
        on_epoch: called after each epoch with the number of steps it took and its mean loss.

    Raises:
        SliderQuantError: the loss is not finite without any training.
    """
    stage.window.set(quantized=True, fraction=stage.fraction)
    start = [learned_state(layer.module) for layer in stage.window.layers]
    result = StageResult()
    while True:
        losses = _epochs(stage, result.rate_scale, on_epoch)
        if losses is not None:
            result.losses = losses
            return result
        for layer, learned in zip(stage.window.layers, start, strict=True):
            restore_learned(layer.module, learned)
        if result.retries == stage.settings.retries:
            untrained = _loss_without_learning(stage)
            if not math.isfinite(untrained):
                raise SliderQuantError(
                    f"window {stage.label}: the loss is not finite even before training; the model's weights or "
                    "activations hold values that are not finite: check the model with `sliderquant eval`"
                )
            result.losses, result.converged = [untrained], False
            return result
        result.retries += 1
        result.rate_scale /= 2


def _epochs(stage: Stage, rate_scale: float, on_epoch: Callable[[int, float], None]) -> list[float] | None:
    """One attempt: the mean loss of each epoch; None: one was not finite."""
    settings, rates = stage.settings, stage.settings.learning_rates
    kinds = stage.window.learned_parameters()
    steps = math.ceil(stage.samples / settings.batch_size)
    total_steps = steps * stage.epochs
    groups = []
    for kind, found in kinds.items():
        rate = getattr(rates, kind) * settings.batch_size * rate_scale
        decay = 0.0
        if kind == "weights" and rate > 0:
            # AdamW takes rate x decay of an offset in a step, and the rates of all steps sum up to
            # rate x (steps + 1) / 2. With hardly any steps no more than all of it, or it would change its sign.
            decay = min(2 * settings.weights_decay / (total_steps + 1), 1.0) / rate
        if found:
            groups.append({"params": found, "lr": rate, "weight_decay": decay})
    if not groups:
        loss = _loss_without_learning(stage)
        return [loss] * stage.epochs if math.isfinite(loss) else None
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total_steps, 0.0))
    hardening = Hardening(stage.window.linears() if settings.hardening else [], total_steps)
    order = generator_for(stage.seed, stage.label, "order")
    losses = []
    for _ in range(stage.epochs):
        total = torch.zeros((), device=stage.device)
        for rows in torch.randperm(stage.samples, generator=order).split(settings.batch_size):
            loss_of_batch = stage.loss(rows)
            optimizer.zero_grad(set_to_none=True)
            loss_of_batch.backward()
            optimizer.step()
            hardening.after_step()
            schedule.step()
            total += loss_of_batch.detach() * len(rows)
        mean = (total / stage.samples).item()
        if not math.isfinite(mean):
            return None
        losses.append(mean)
        on_epoch(steps, mean)
    finite = all(bool(parameter.isfinite().all()) for found in kinds.values() for parameter in found)
    return losses if finite else None


@torch.no_grad()
def _loss_without_learning(stage: Stage) -> float:
    batches = torch.arange(stage.samples).split(stage.settings.batch_size)
    return sum(stage.loss(rows).item() * len(rows) for rows in batches) / stage.samples
