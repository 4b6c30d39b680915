"""Keys and values of a generation in buffers that do not move, so that a CUDA graph can be replayed over them.

transformers' `DynamicCache` concatenates, which gives its tensors a new address with every token. A `Slot` holds the
buffers of one generation; `BoundLayer` shows them to transformers as the layer of a `DynamicCache`, and `GraphLayer` to
the model while its step is captured.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

__all__ = ["BoundLayer", "GraphLayer", "Slot", "length_for", "release"]

# The graph of a step attends over a number of positions that doubles: few graphs, and at most twice the work.
SHORTEST = 256


def length_for(tokens: int) -> int:
    """The positions over which a step attends that has `tokens` of them to see: 256, 512, 1024, ..."""
    return SHORTEST << max((tokens - 1) // SHORTEST, 0).bit_length()


class Slot:
    """Buffers for the keys and values of a batch, and what a step reads and writes on the device.

    Attributes:
        batch: number of sequences.
        capacity: positions in the buffers.
        length: positions that are filled; the host's copy of `index`.
        keys, values: for every layer `[batch, heads, capacity, head_dim]`.
        mask: of the keys' dtype, `[batch, 1, 1, capacity]`: 0 where a position may be seen, minus infinity elsewhere.
        ids, positions: int64 `[batch, 1]`, the input of a step.
        index: int64 `[1]`, where a step writes.
        graphs: by the positions that they attend over.
        intact: False once a layer of the cache was replaced.
        lent: whether somebody was given the keys or values themselves; no other generation may write there then.
    """

    def __init__(self, layers: list[Any], capacity: int) -> None:
        """
        Args:
            layers: of a `DynamicCache`, filled.
            capacity: positions.
        """
        self.capacity, self.length, self.intact, self.lent = capacity, 0, False, False
        self.graphs: dict[int, Any] = {}
        self._bound: weakref.WeakSet[BoundLayer] = weakref.WeakSet()
        first = layers[0].keys
        self.batch, device = first.shape[0], first.device
        # Not inference tensors, whatever mode `generate` is called in first: the next call may be in another one.
        with torch.inference_mode(False):
            self.keys = [_buffer(layer.keys, capacity) for layer in layers]
            self.values = [_buffer(layer.values, capacity) for layer in layers]
            self.mask = first.new_full((self.batch, 1, 1, capacity), -math.inf)
            self.ids = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros_like(self.ids)
            self.index = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Of the buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def free(self) -> bool:
        """Whether no layer of a cache is left that shows these buffers, and nobody else has them."""
        return not self._bound and not self.lent

    def fits(self, layers: list[Any]) -> bool:
        """Whether the buffers are those of this batch and these layers."""
        return len(layers) == len(self.keys) and all(
            _is_like(buffer, tensor)
            for layer, keys, values in zip(layers, self.keys, self.values, strict=True)
            for buffer, tensor in ((keys, layer.keys), (values, layer.values))
        )

    def bind(self, cache: Cache, seen: Tensor | None) -> None:
        """Take over what a cache holds, and become its layers.

        Args:
            seen: `[batch, tokens]`, nonzero where a token of the cache may be seen; None: everywhere.
        """
        tokens, first = cache.layers[0].get_seq_length(), self.keys[0]
        self.lent = False
        for index, layer in enumerate(cache.layers):
            self.keys[index][:, :, :tokens].copy_(layer.keys)
            self.values[index][:, :, :tokens].copy_(layer.values)
        self.mask.fill_(-math.inf)
        seen = first.new_ones(self.batch, tokens) if seen is None else seen[:, :tokens]
        self.mask[..., :tokens].masked_fill_(seen[:, None, None].bool(), 0)
        self.index.fill_(tokens)
        self.length, self.intact = tokens, True
        for index, layer in enumerate(cache.layers):
            cache.layers[index] = BoundLayer(self, index, layer)
            self._bound.add(cache.layers[index])

    def leave(self, layer: BoundLayer) -> None:
        """A layer no longer shows these buffers."""
        self.intact = False
        self._bound.discard(layer)

    def grow(self) -> None:
        """Double the capacity, and drop the graphs of the buffers before. Without memory nothing has changed."""
        before, capacity = self.capacity, 2 * self.capacity
        with torch.inference_mode(False):
            grown = [_buffer(old, capacity) for old in (*self.keys, *self.values)]
            mask = self.mask.new_full((*self.mask.shape[:-1], capacity), -math.inf)
        for new, old in zip([*grown, mask.mT], [*self.keys, *self.values, self.mask.mT], strict=True):
            new[:, :, :before].copy_(old)
        layers = len(self.keys)
        self.keys, self.values, self.mask, self.capacity = grown[:layers], grown[layers:], mask, capacity
        self.graphs.clear()

    def graph_cache(self, length: int) -> Cache:
        """The cache that the model's step is called with: it writes at `index` and shows `length` positions."""
        return Cache(layers=[GraphLayer(self, index, length) for index in range(len(self.keys))])


def _buffer(like: Tensor, capacity: int) -> Tensor:
    # Zeros: a position that may not be seen is multiplied by a probability of 0, and must not be NaN.
    return like.new_zeros(*like.shape[:2], capacity, like.shape[3])


def _is_like(buffer: Tensor, tensor: Tensor) -> bool:
    return (
        buffer.dtype == tensor.dtype
        and buffer.device == tensor.device
        and buffer.shape[:2] == tensor.shape[:2]
        and buffer.shape[3] == tensor.shape[3]
    )


def release(cache: Cache) -> None:
    """Give the layers of a cache back what they were before they were bound, filled with all tokens."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is BoundLayer:
            cache.layers[index] = layer.unbound()


class BoundLayer(DynamicLayer):
    """A layer of a `DynamicCache` whose keys and values lie in a slot, until something replaces them.

    Whoever reads `keys` or `values` gets the buffers' filled part, which then serve no other generation. Whoever sets
    them, as cropping, reordering and steps without a graph do, makes the layer an ordinary one.
    """

    def __init__(self, slot: Slot, index: int, before: Any) -> None:
        """
        Args:
            before: the layer whose keys and values the slot has taken over.
        """
        self._slot: Slot | None = None
        super().__init__()
        self._slot, self._index = slot, index
        self.device, self.dtype = slot.keys[index].device, slot.keys[index].dtype
        self.is_initialized = True
        self._make: Callable[[], DynamicLayer] = _maker(before)

    @property
    def slot(self) -> Slot | None:
        """Where keys and values lie; None: in the layer itself."""
        return self._slot

    @property
    def keys(self) -> Tensor | None:
        return self._keys if self._slot is None else self._filled(self._slot.keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._leave()
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        return self._values if self._slot is None else self._filled(self._slot.values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._leave()
        self._values = value

    def _filled(self, buffers: list[Tensor]) -> Tensor:
        assert self._slot is not None
        self._slot.lent = True
        return buffers[self._index][:, :, : self._slot.length]

    def update(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        self._leave()
        return super().update(*arguments, **keywords)

    def unbound(self) -> DynamicLayer:
        """A layer of the kind that was bound, with all tokens."""
        layer = self._make()
        self._leave()
        if self._keys is not None:
            layer.update(self._keys, self._values)
        return layer

    def get_seq_length(self, *arguments: Any) -> int:
        return super().get_seq_length(*arguments) if self._slot is None else self._slot.length

    def reset(self) -> None:
        self._leave()
        self.keys = self.values = None
        self.is_initialized = False

    def _leave(self) -> None:
        if self._slot is not None:
            slot, self._slot = self._slot, None
            slot.leave(self)
            # Copies: the next generation takes the buffers.
            self._keys, self._values = (
                buffers[self._index][:, :, : slot.length].clone() for buffers in (slot.keys, slot.values)
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        slot, layer = self._slot, self._make()
        keys, values = self._keys, self._values
        if slot is not None:
            keys, values = (held[self._index][:, :, : slot.length] for held in (slot.keys, slot.values))
        if keys is not None and values is not None:
            layer.update(keys.clone(), values.clone())
        return layer

    def __reduce__(self) -> Any:
        copied = self.__deepcopy__({})
        return _itself, (copied,)


def _maker(layer: Any) -> Callable[[], DynamicLayer]:
    """Makes an empty layer of the kind of a layer."""
    if isinstance(layer, BoundLayer):
        return layer._make
    kind: Callable[..., DynamicLayer] = type(layer)
    window = getattr(layer, "sliding_window", None)
    return kind if window is None else partial(kind, sliding_window=window)


def _itself(layer: DynamicLayer) -> DynamicLayer:
    return layer


class GraphLayer(CacheLayerMixin):
    """A layer of the cache that a step is captured with."""

    is_compileable = True
    is_sliding = False

    def __init__(self, slot: Slot, index: int, length: int) -> None:
        super().__init__()
        self._keys_buffer, self._values_buffer = slot.keys[index], slot.values[index]
        self._index, self._length = slot.index, length
        self.is_initialized = True

    def lazy_initialization(self, *arguments: Any) -> None:
        """Nothing: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Keys and values `[batch, heads, 1, head_dim]` of the new token -> all `length` positions."""
        self._keys_buffer.index_copy_(2, self._index, key_states)
        self._values_buffer.index_copy_(2, self._index, value_states)
        return self._keys_buffer[:, :, : self._length], self._values_buffer[:, :, : self._length]

    def get_mask_sizes(self, *arguments: Any) -> tuple[int, int]:
        return self._length, 0

    def get_seq_length(self, *arguments: Any) -> int:
        # The mask and the positions are given: a model that asks for the length all the same cannot be captured.
        raise RuntimeError("the number of tokens in the cache is on the device alone")

    def get_max_cache_shape(self) -> int:
        return self._length

    get_max_length = get_max_cache_shape
