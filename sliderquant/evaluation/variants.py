"""Variants of a model, each quantized in some places, measured together in one walk over the layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sliderquant.calibration.layerwise import LayerwiseModel, RunningLayer
from sliderquant.calibration.streams import ActivationStream
from sliderquant.models.decoder import Decoder
from sliderquant.modules.attention import AttentionRounding
from sliderquant.planning.plan import Plan
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme
from sliderquant_kernels import quantize_activations

__all__ = ["Study", "Sums", "Variant", "switched_kinds"]

# Logits, a log-probability for every token and word, are the largest tensors; three of them are held at once.
_TOKENS_AT_ONCE = 1024

# For every layer, what in it is quantized: linears, and the attention module, which stands for queries, keys and
# values. The first layers of a variant name the hidden states after them.
Variant = tuple[frozenset[str], ...]


def switched_kinds(plan: Plan) -> tuple[str, ...]:
    """What can be quantized in a layer of the plan's scheme: see `Variant`."""
    kinds = dict.fromkeys(name for layer in plan.source.layers for name in layer.linears)
    if plan.scheme.quantizes_attention:
        kinds |= dict.fromkeys(layer.attention.module for layer in plan.source.layers)
    return tuple(kinds)


class _Switched(nn.Module):
    """A linear layer that is the original, or, when `enabled`, rounded to nearest: its weight, and its input."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, stored_dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.enabled = scheme, False
        self.weight, self.bias, self.in_features = linear.weight, linear.bias, linear.in_features
        self.rounded = dequantize(round_to_nearest(linear.weight, scheme, stored_dtype), scheme)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if self.scheme.quantizes_activations:
            codes = quantize_activations(x, self.scheme.activation_bits, self.scheme.activation_symmetric)
            x = codes.dequantize(x.dtype)
        return F.linear(x, self.rounded, self.bias)


@dataclass
class Sums:
    """Sums over the blocks of text, of one variant: `loss` of each block's mean cross-entropy, `divergence` of each
    block's mean KL divergence, `error` and `energy` of the squared error and the squares of the last hidden states."""

    blocks: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    @property
    def perplexity(self) -> float:
        return exp(self.loss / self.blocks)

    @property
    def output_error(self) -> float:
        return self.error / self.energy

    @property
    def kl_divergence(self) -> float:
        return self.divergence / self.blocks


class Study:
    """The walk of all variants over the model."""

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        blocks: Tensor,
        variants: Sequence[Variant],
        memory_bytes: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            blocks: tokens int64 `[blocks, seqlen]`.
            variants: all different, the original first.
        """
        self.plan, self.decoder, self.blocks, self.device = plan, decoder, blocks, device
        self.variants = variants
        self.stored_dtype = plan.source.dtype
        # The hidden states after each layer: as many as there are different beginnings of variants.
        self.prefixes = [
            list(dict.fromkeys(variant[:depth] for variant in variants)) for depth in range(plan.source.num_layers + 1)
        ]
        self.hidden = int(plan.source.config.hidden_size)
        self.memory_of_stream = memory_bytes / (max(map(len, self.prefixes)) + 1)
        fitting = int(self.memory_of_stream // (plan.seqlen * self.hidden * 4))
        self.blocks_at_once = min(max(fitting, 1), len(blocks))

    @property
    def passes(self) -> int:
        """Passes of the whole text through one layer."""
        return sum(map(len, self.prefixes[1:]))

    @property
    def reads(self) -> int:
        """How often every layer is read and rounded."""
        return -(-len(self.blocks) // self.blocks_at_once)

    def run(self, on_pass: Callable[[int, int], None]) -> dict[Variant, Sums]:
        """
        Args:
            on_pass: called with (passes done, passes in all), of a block of text through a layer or the head.
        """
        measured = {variant: Sums() for variant in self.variants}
        total = len(self.blocks) * (self.passes + len(self.variants))
        done = 0

        def passed(blocks: int) -> None:
            nonlocal done
            done += blocks
            on_pass(done, total)

        for tokens in self.blocks.split(self.blocks_at_once):
            streams: dict[Variant, ActivationStream] = {}
            try:
                self._walk(tokens, streams, passed)
                self._measure(tokens, streams, measured, passed)
            finally:
                for stream in streams.values():
                    stream.close()
        return measured

    def _walk(self, tokens: Tensor, streams: dict[Variant, ActivationStream], passed: Callable[[int], None]) -> None:
        """Fill `streams` with the hidden states of every variant after the last layer."""
        model = LayerwiseModel(self.decoder, tokens, self.plan.rotations, self.plan.scheme.kv_bits)
        streams[()] = model.stream(self.memory_of_stream)
        for index in range(self.plan.source.num_layers):
            layer, switches = self._switched(model, index)
            for prefix in self.prefixes[index]:
                before = streams[prefix]
                for after in self.prefixes[index + 1]:
                    if after[:-1] == prefix:
                        for name, switch in switches.items():
                            switch.enabled = name in after[-1]
                        streams[after] = before.like()
                        before.walk(layer, self.device, self._batch_size(2 * _TOKENS_AT_ONCE), into=streams[after])
                        passed(len(tokens))
                streams.pop(prefix).close()

    def _switched(
        self, model: LayerwiseModel, index: int
    ) -> tuple[RunningLayer, dict[str, _Switched | AttentionRounding]]:
        """A layer with linears that can be switched in the places of its own; and by name, what can be switched."""
        spec = self.plan.source.layers[index]
        switches: dict[str, _Switched | AttentionRounding] = {}

        def prepare(module: nn.Module) -> None:
            for name in spec.linears:
                scheme = self.plan.schemes[spec.full(name)]
                linear = _Switched(module.get_submodule(name), scheme, self.stored_dtype)  # type: ignore[arg-type]
                module.set_submodule(name, linear)
                switches[name] = linear

        # R4 cannot be switched: its inverse is in the weight. R3 is with the rounding; neither changes anything alone.
        layer = model.layer(index, prepare)
        if self.plan.scheme.quantizes_attention:
            attention = layer.module.get_submodule(spec.attention.module)
            switches[spec.attention.module] = attention.rounding  # type: ignore[assignment]
        return layer, switches

    def _measure(
        self,
        tokens: Tensor,
        streams: dict[Variant, ActivationStream],
        measured: dict[Variant, Sums],
        passed: Callable[[int], None],
    ) -> None:
        """Add what the head makes of the last hidden states of every variant to `measured`."""
        norm, head = self.decoder.output()
        size = self._batch_size(_TOKENS_AT_ONCE)
        for rows in (slice(start, start + size) for start in range(0, len(tokens), size)):
            following = tokens[rows, 1:, None].to(self.device)
            original = norm(streams[self.variants[0]].batch(rows, self.device))
            logs_original = head(original).log_softmax(dim=-1)
            energy = original.double().square().sum().item()
            for variant, sums in measured.items():
                hidden = norm(streams[variant].batch(rows, self.device))
                logs = head(hidden).log_softmax(dim=-1)
                losses = -logs[:, :-1].gather(-1, following).squeeze(-1)
                sums.blocks += len(losses)
                sums.loss += losses.double().mean(dim=1).sum().item()
                divergence = F.kl_div(logs, logs_original, reduction="none", log_target=True).sum(dim=-1)
                sums.divergence += divergence.double().mean(dim=1).sum().item()
                sums.error += (hidden - original).double().square().sum().item()
                sums.energy += energy
                passed(len(losses))

    def _batch_size(self, tokens: int) -> int:
        return max(1, tokens // self.plan.seqlen)
