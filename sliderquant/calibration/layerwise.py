"""A model that runs one decoder layer at a time, over streams of hidden states: the whole of it is never in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sliderquant.calibration.streams import ActivationStream
from sliderquant.models.decoder import Decoder
from sliderquant.models.layer import LayerSpec, first_output
from sliderquant.modules.attention import round_layer
from sliderquant.modules.rotated import RotatedLinear, insert_rotation
from sliderquant.rotations.transforms import Rotations

__all__ = ["LayerwiseModel", "RunningLayer"]


@dataclass(frozen=True)
class RunningLayer:
    """A decoder layer on the device, with all that it is called with besides hidden states.

    Attributes:
        spec: what it is made of.
        module: in fp32.
        arguments: keyword arguments for a batch of 1, which broadcast over a batch.
    """

    spec: LayerSpec
    module: nn.Module
    arguments: Mapping[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[batch, seqlen, hidden]` -> the layer's output, the same shape."""
        return first_output(self.module(hidden, **self.arguments))

    def linear(self, name: str) -> nn.Module:
        """The linear itself, also where an online rotation stands before it."""
        found = self.module.get_submodule(name)
        return found.linear if isinstance(found, RotatedLinear) else found


class LayerwiseModel:
    """A model, layer by layer, on blocks of tokens.

    Attributes:
        arguments: what each layer is called with besides hidden states.
    """

    def __init__(self, decoder: Decoder, blocks: Tensor, rotations: Rotations | None = None, kv_bits: int = 16) -> None:
        """
        Args:
            blocks: tokens int64 `[blocks, seqlen]`.
            rotations: of which the online ones are computed.
            kv_bits: queries, keys and values are rounded to so many bits; 16: they are not.
        """
        self.decoder, self.device = decoder, decoder.device
        self._rotations, self._kv_bits, self._shape = rotations, kv_bits, blocks.shape
        self._embedded, inputs = decoder.embed(blocks)
        self.arguments = inputs.arguments

    def stream(self, memory_limit: float) -> ActivationStream:
        """The hidden states before the first layer; they can be asked for once.

        Args:
            memory_limit: bytes beyond which they are kept in a file.
        """
        samples, seqlen = self._shape
        stream = ActivationStream(samples, seqlen, self.decoder.source.config.hidden_size, memory_limit)
        try:
            stream.fill(self._embedded)
        except BaseException:
            stream.close()
            raise
        return stream

    def layer(
        self, index: int, prepare: Callable[[nn.Module], None] | None = None, rounded: bool = True
    ) -> RunningLayer:
        """Decoder layer `index` with what the model computes while it runs: online rotations, and the rounding of
        queries, keys and values.

        Args:
            prepare: called with the layer first; it may put other modules into the places of its linears.
            rounded: whether queries, keys and values are rounded.
        """
        spec = self.decoder.source.layers[index]
        module = self.decoder.layer(index)
        if prepare is not None:
            prepare(module)
        insert_rotation(module, spec, self._rotations)
        if rounded:
            round_layer(module, spec, self._kv_bits, self._rotations)
        return RunningLayer(spec, module.to(self.device), self.arguments[index])
