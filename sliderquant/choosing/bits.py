"""Mixed precision: how many bits each linear gets, so that the model loses least within a budget.

What a linear loses at some number of bits is estimated to first order: with g the gradient of the model's
cross-entropy by its weight, on some calibration samples, and w^ the weight rounded to nearest with a searched clipping,

    loss = sum |g * (w^ - w)|

The bits are the choice with the least sum of losses within the budget, see `planning.allocation`. Linears that read the
same input get the same bits: they are merged into one product, by vLLM always.

The gradients take two walks over the model, one layer in memory at a time: forward, keeping the hidden states before
every layer, and backward, where each layer is computed again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.calibration.layerwise import LayerwiseModel, RunningLayer
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import ModelSource
from sliderquant.planning.allocation import Allocation, allocate, choices
from sliderquant.planning.memory import CHOOSING_STREAM_GB, CHOOSING_TOKENS_AT_ONCE
from sliderquant.planning.plan import Plan
from sliderquant.progress import Progress
from sliderquant.quantizer.grids import clipped_grid, dequantize, quantize
from sliderquant.quantizer.search import search_clipping

__all__ = ["choose_bits", "linear_losses", "linears_together"]


def choose_bits(
    plan: Plan, decoder: Decoder, blocks: Tensor, device: torch.device, progress: Progress | None = None
) -> Allocation:
    """Choose the bits of every linear of a plan with a budget.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`, of which the first are used.
    """
    assert plan.average_bits is not None
    samples = plan.measured_samples
    losses = linear_losses(plan, decoder, blocks[:samples], device, progress or Progress())
    sizes, together = plan.sizes, linears_together(plan.source)
    found = allocate(
        {names[0]: sum(sizes[name] for name in names) for names in together},
        {
            names[0]: {bits: sum(losses[name][bits] for name in names) for bits in choices(plan.scheme.linear)}
            for names in together
        },
        plan.average_bits,
    )
    bits = {name: found[names[0]] for names in together for name in names}
    return Allocation(plan.average_bits, samples, {name: bits[name] for name in plan.schemes}, losses)


def linears_together(source: ModelSource) -> list[tuple[str, ...]]:
    """Full names of all linears, those together that read the same input."""
    return [tuple(map(layer.full, group.linears)) for layer in source.layers for group in layer.groups]


def linear_losses(
    plan: Plan, decoder: Decoder, blocks: Tensor, device: torch.device, progress: Progress
) -> dict[str, dict[int, float]]:
    """By full name of the linear, its estimated loss at each number of bits that it may get.

    Args:
        blocks: tokens int64 `[samples, seqlen]`.
    """
    return _Walk(plan, decoder, blocks, device, progress).losses()


class _Walk:
    """Forward through the model, and back."""

    def __init__(self, plan: Plan, decoder: Decoder, blocks: Tensor, device: torch.device, progress: Progress) -> None:
        self.plan, self.decoder, self.blocks, self.device, self.progress = plan, decoder, blocks, device, progress
        self.layers = plan.source.num_layers
        self.model = LayerwiseModel(decoder, blocks, plan.rotations)
        first = self.model.stream(CHOOSING_STREAM_GB * 1e9 / (self.layers + 1))
        # The hidden states before each layer, and after the last.
        self.hidden = [first]
        self.importance: dict[str, Tensor] = {}
        self.passes = 0

    def losses(self) -> dict[str, dict[int, float]]:
        try:
            for index in range(self.layers):
                self._forward(index)
            self._head()
            found: dict[str, dict[int, float]] = {}
            for index in reversed(range(self.layers)):
                found = self._backward(index) | found
            return found
        finally:
            for stream in self.hidden:
                stream.close()

    def _layer(self, index: int) -> tuple[RunningLayer, dict[str, nn.Linear]]:
        """A decoder layer, and its linears by full name."""
        layer = self.model.layer(index)
        return layer, {layer.spec.full(name): layer.linear(name) for name in layer.spec.linears}  # type: ignore[misc]

    def _run(self, layer: RunningLayer, hidden: Tensor) -> Tensor:
        out = layer(hidden)
        self.passes += len(hidden)
        self.progress.layer_passed(self.passes, len(self.blocks) * (2 * self.layers + 1))
        return out

    @torch.no_grad()
    def _forward(self, index: int) -> None:
        layer, linears = self._layer(index)
        for name, linear in linears.items():
            self.importance[name] = torch.zeros(linear.in_features, device=self.device)
            linear.register_forward_pre_hook(self._squares(name))
        self.hidden.append(self.hidden[-1].like())
        self.hidden[-2].walk(lambda hidden: self._run(layer, hidden), self.device, 1, into=self.hidden[-1])

    def _squares(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2)
            self.importance[name] += rows.square().sum(0) / (len(self.blocks) * self.plan.seqlen)

        return hook

    def _head(self) -> None:
        """The hidden states after the last layer become the gradients by them."""
        norm, head = self.decoder.output()
        last, tokens = self.hidden[-1], self.blocks.to(self.device)
        predicted = len(self.blocks) * (self.plan.seqlen - 1)
        for row in range(len(self.blocks)):
            hidden = last.batch(slice(row, row + 1), self.device)[0].requires_grad_()
            following = tokens[row, 1:]
            for start in range(0, len(following), CHOOSING_TOKENS_AT_ONCE):
                part = slice(start, min(start + CHOOSING_TOKENS_AT_ONCE, len(following)))
                loss = F.cross_entropy(head(norm(hidden[part])), following[part], reduction="sum") / predicted
                loss.backward()
            assert hidden.grad is not None
            last.data[row].copy_(hidden.grad)
            self.passes += 1
            self.progress.layer_passed(self.passes, len(self.blocks) * (2 * self.layers + 1))

    def _backward(self, index: int) -> dict[str, dict[int, float]]:
        """The losses of a layer's linears; the gradients by what the layer puts out become those by what it reads."""
        layer, linears = self._layer(index)
        gradients, before = self.hidden.pop(), self.hidden[-1]
        for linear in linears.values():
            linear.weight.requires_grad_()
        for row in range(len(self.blocks)):
            rows = slice(row, row + 1)
            hidden = before.batch(rows, self.device).requires_grad_()
            self._run(layer, hidden).backward(gradients.batch(rows, self.device))
            assert hidden.grad is not None
            before.data[rows].copy_(hidden.grad)
        gradients.close()
        with torch.no_grad():
            return {name: self._losses(name, linear) for name, linear in linears.items()}

    def _losses(self, name: str, linear: nn.Linear) -> dict[int, float]:
        weight, gradient = linear.weight, linear.weight.grad
        assert gradient is not None
        found = {}
        for bits in choices(self.plan.scheme.linear):
            scheme, dtype = replace(self.plan.schemes[name], bits=bits), self.plan.source.dtype
            clipping = search_clipping(weight, self.importance[name], scheme, dtype)
            grid = clipped_grid(weight, clipping, clipping, scheme, dtype)
            error = dequantize(quantize(weight, grid, scheme, dtype), scheme).sub_(weight)
            found[bits] = error.mul_(gradient).abs_().sum(dtype=torch.float64).item()
        return found
