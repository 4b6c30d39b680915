"""One decoder layer on its calibration inputs: what its linears multiply, and what takes the place of their weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.calibration.layerwise import RunningLayer
from sliderquant.calibration.streams import ActivationStream
from sliderquant.models.layer import LayerSpec
from sliderquant.quantizer.grids import QuantizedWeight, dequantize
from sliderquant.schemes import Scheme
from sliderquant_kernels import quantize_activations

__all__ = ["CalibratedLayer", "InputStatistics", "quotient", "relative_error", "storable"]


class _AllSeen(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


class InputStatistics:
    """Of what a linear is given, over all calibration tokens.

    Attributes:
        gram: X^T X, fp32 `[in, in]`.
        largest: max |x|, fp32 `[in]`.
        tokens: how many.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.largest = torch.zeros(in_features, device=device)
        self._sum = torch.zeros(in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x `[..., in]`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        magnitudes = rows.abs()
        self.gram.addmm_(rows.T, rows)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self._sum += magnitudes.sum(0)
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """Mean |x|, fp32 `[in]`."""
        return self._sum / self.tokens


@dataclass
class CalibratedLayer:
    """A decoder layer that is being quantized, and its inputs: the output of the quantized layers before it.

    Attributes:
        running: the decoder layer as it runs.
        schemes: by name of the linear in the layer.
        dtypes: by name in the layer, those in which norms and biases are stored.
        scale_dtype: in which the scales of weights are stored.
        stream: its inputs.
        stored: by name, the linears that are quantized already.
        changed: by name, norms and biases that are not the model's any more, fp32.
        linears: by name, what there is to report of them.
        scales: by site, what there is to report of channel scales.
    """

    running: RunningLayer
    schemes: Mapping[str, Scheme]
    dtypes: Mapping[str, torch.dtype]
    scale_dtype: torch.dtype
    stream: ActivationStream
    batch_size: int
    device: torch.device
    stored: dict[str, QuantizedWeight] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.running.module

    @property
    def spec(self) -> LayerSpec:
        return self.running.spec

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[batch, seqlen, hidden]` -> the layer's output, the same shape."""
        return self.running(hidden)

    def linear(self, name: str) -> nn.Module:
        """See `RunningLayer.linear`."""
        return self.running.linear(name)

    def weight(self, name: str) -> Tensor:
        """As it is now, fp32 `[out, in]`."""
        return self.linear(name).weight  # type: ignore[return-value]

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears in the order of the data flow, those that multiply the same tensor together."""
        return tuple(group.linears for group in self.spec.groups)

    def round_inputs(self) -> None:
        """From now on the linears round their inputs as the scheme says."""
        for name, scheme in self.schemes.items():
            if scheme.quantizes_activations:
                self.linear(name).register_forward_pre_hook(_rounding(scheme))

    def batches(self) -> Iterator[Tensor]:
        """The layer's inputs `[batch, seqlen, hidden]`."""
        for start in range(0, len(self.stream.data), self.batch_size):
            yield self.stream.batch(slice(start, start + self.batch_size), self.device)

    @torch.no_grad()
    def statistics(self, names: Sequence[str]) -> dict[str, InputStatistics]:
        """What these linears multiply, in the layer as it is now; in the order of the data flow."""
        found = {name: InputStatistics(self.weight(name).shape[1], self.device) for name in names}
        seen: set[str] = set()

        def watch(name: str) -> Any:
            def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                found[name].add(arguments[0])
                seen.add(name)
                if len(seen) == len(names):
                    raise _AllSeen

            return see

        hooks = [self.linear(name).register_forward_pre_hook(watch(name)) for name in names]
        try:
            for batch in self.batches():
                seen.clear()
                with suppress(_AllSeen):
                    self(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def calls(self, name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments and keyword arguments with which the layer calls its child `name`, batch by batch."""
        call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def see(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call.append((arguments, keywords))
            raise _AllSeen

        for batch in self.batches():
            # Before the hooks that are there: the caller passes the arguments to the same module, with its hooks.
            hook = self.module.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True, prepend=True)
            with suppress(_AllSeen):
                self(batch)
            hook.remove()
            yield call.pop()

    @torch.no_grad()
    def quantize(self, name: str, stored: QuantizedWeight, gram: Tensor, **report: Any) -> None:
        """Put a quantized weight in the place of the linear's.

        Args:
            gram: X^T X of what the linear multiplies now.
            report: what else there is to say.
        """
        weight, value = self.weight(name), dequantize(stored, self.schemes[name])
        self.linears[name] = {"error": relative_error(value - weight, weight, gram), **report}
        weight.copy_(value)
        self.stored[name] = stored

    @torch.no_grad()
    def scale_after_norm(self, norm: str, names: Sequence[str], scale: Tensor) -> Tensor:
        """Divide what a norm puts out by `scale` `[in]`, and multiply the columns that read it.

        Returns:
            the scale that the norm's weight, rounded to the dtype in which it is stored, implies: with it the layer
            computes what it did, up to fp32 rounding.
        """
        weight: Tensor = self.module.get_submodule(norm).weight  # type: ignore[assignment]
        merged, scale = storable(weight, scale, self.dtypes[f"{norm}.weight"])
        weight.copy_(merged)
        self.changed[f"{norm}.weight"] = merged
        for name in names:
            self.weight(name).mul_(scale)
        return scale

    @torch.no_grad()
    def scale_between(self, previous: str, following: str, scale: Tensor) -> Tensor:
        """Divide the outputs of a linear by `scale`, fp32 `[out]`, and multiply the columns of the next that read them:
        of v_proj, what each KV head puts out is read by all of its query heads.

        Returns:
            the scale of each column of the next, `[in]`, as `scale_after_norm`; the rows are not stored before they are
            quantized, a bias is.
        """
        linear = self.linear(previous)
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        if bias is not None:
            merged, scale = storable(bias, scale, self.dtypes[f"{previous}.bias"])
            bias.copy_(merged)
            self.changed[f"{previous}.bias"] = merged
        linear.weight.div_(scale[:, None])  # type: ignore[operator]
        columns = self.columns(previous, scale)
        self.weight(following).mul_(columns)
        return columns

    def columns(self, previous: str, per_output: Tensor) -> Tensor:
        """A value for each output of a linear -> for each input of the next."""
        if previous != self.spec.attention.value:
            return per_output
        heads, queries_per_value = self._heads
        return per_output.view(heads, 1, -1).expand(-1, queries_per_value, -1).flatten()

    def outputs(self, previous: str, per_column: Tensor) -> Tensor:
        """The mean over the inputs of the next linear that read the same output of this one."""
        if previous != self.spec.attention.value:
            return per_column
        return per_column.view(*self._heads, -1).mean(1).flatten()

    @property
    def _heads(self) -> tuple[int, int]:
        """KV heads, and query heads for each."""
        attention = self.spec.attention
        return attention.kv_heads, attention.heads // attention.kv_heads


def storable(old: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`old / scale` rounded to `dtype`, and the scale that leads to it exactly; fp32 of the same shape.

    Where the quotient is not representable at all, the old value and a scale of 1.
    """
    new = (old / scale).to(dtype).float()
    implied = old / new
    usable = implied.isfinite() & (implied > 0)
    return torch.where(usable, new, old), torch.where(usable, implied, torch.where(old == 0, scale, 1.0))


def relative_error(change: Tensor, weight: Tensor, gram: Tensor) -> float | None:
    """Squared norm of `change X` over that of `weight X`, from `gram` = X^T X; `[out, in]` and `[in, in]`, fp32."""
    norm = ((weight @ gram) * weight).sum().item()
    error = ((change @ gram) * change).sum().item()
    return quotient(error, norm)


def quotient(error: float, norm: float) -> float | None:
    """An error relative to a norm, for reports; None: not finite."""
    relative = error / norm if norm != 0 else 0.0
    return relative if math.isfinite(relative) else None


def _rounding(scheme: Scheme) -> Any:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = arguments
        rounded = quantize_activations(x, scheme.activation_bits, scheme.activation_symmetric)
        return (rounded.dequantize(x.dtype), *others)

    return hook
