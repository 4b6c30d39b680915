"""What attention multiplies, rotated (R3) and rounded: queries and keys after RoPE, and values.

The attention modules of transformers hand their keys, after RoPE, and their values to the `update` of their cache, and
their queries to the attention function that their configuration names. `insert_rounding` steps in at both places, so
that the modules' own code runs unchanged, with whatever cache and attention function the model uses:

- a hook on the module puts a `_RoundedWrites` before the cache of every call, or in its place where there is none. Keys
  and values are rotated and rounded when they are written, once; the cache holds them in the dtype of the model.
- the module's configuration, a copy of the model's, names `sliderquant` as attention function. That takes care of the
  queries and calls the function that the model's own configuration names.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sliderquant.errors import InputError
from sliderquant.fake_quantize import fake_quantize_activations
from sliderquant.models.family import Family
from sliderquant.modules.rotated import OnlineRotation
from sliderquant.rotation import Rotations
from sliderquant_kernels import quantize_activations

__all__ = ["AttentionRounding", "cache_keyword", "insert_rounding", "round_attention", "round_layer"]

_NAME = "sliderquant"


class AttentionRounding(nn.Module):
    """Rotates and rounds queries, keys and values; a child of the attention module that it belongs to.

    Attributes:
        bits: of the grid of each head of each token, with zero-points: 4 or 8; 16: not rounded.
        rotation: R3, of size head_dim, for queries and keys; or None.
        enabled: False: everything passes as it is.
        compiled: whether rounding with gradients is, see `fake_quantize.can_compile`.
    """

    rotation: OnlineRotation | None

    def __init__(
        self, bits: int, rotation: OnlineRotation | None, config: PretrainedConfig, eager: Any, cache_keyword: str
    ) -> None:
        """
        Args:
            config: that of the model, which names the attention function to call.
            eager: the function that `"eager"` means for this kind of attention module.
            cache_keyword: the name of its argument for the cache.
        """
        super().__init__()
        self.bits, self.rotation, self.enabled = bits, rotation, True
        self.compiled = False
        self._config, self._eager = config, eager
        self.cache_keyword = cache_keyword

    def query(self, x: Tensor) -> Tensor:
        """Queries or keys `[batch, heads, tokens, head_dim]` -> the same shape and dtype."""
        return self._rounded(x, self.rotation)

    key = query

    def value(self, x: Tensor) -> Tensor:
        """Values `[batch, heads, tokens, head_dim]` -> the same shape and dtype."""
        return self._rounded(x, None)

    def _rounded(self, x: Tensor, rotation: OnlineRotation | None) -> Tensor:
        if not self.enabled:
            return x
        # The projections wrote the heads of a token next to each other: so there is nothing to copy.
        rows = x.transpose(1, 2)
        if self.bits == 16:
            rows = rows if rotation is None else rotation(rows)
        elif x.requires_grad:
            rows = rows if rotation is None else rotation(rows)
            rows = fake_quantize_activations(rows, self.bits, symmetric=False, compiled=self.compiled)
        elif rotation is None:
            rows = quantize_activations(rows, self.bits, symmetric=False).dequantize(x.dtype)
        else:
            rows = rotation.quantize(rows, self.bits, symmetric=False).dequantize(x.dtype)
        return rows.transpose(1, 2)

    def attention(self) -> Any:
        """The attention function that the model is set to."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)

    def extra_repr(self) -> str:
        return "queries, keys and values as they are" if self.bits == 16 else f"bits={self.bits}"


class _RoundedWrites:
    """The cache of one call of an attention module, or none, with keys and values rounded when they are written."""

    def __init__(self, cache: Any, rounding: AttentionRounding) -> None:
        self._cache, self._rounding = cache, rounding

    def update(self, key: Tensor, value: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        key, value = self._rounding.key(key), self._rounding.value(value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name by which a model or attention module of transformers takes its cache: `cache` from 5.24 on, before that
    `past_key_values`.

    Raises:
        InputError: it takes none.
    """
    names = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise InputError(
        f"{forward.__qualname__}: expected an argument `cache` or `past_key_values`, found {', '.join(names)}: what "
        "it multiplies cannot be rounded; use a scheme without KV, and no rotation R3"
    )


def insert_rounding(attention: nn.Module, bits: int, rotation: OnlineRotation | None) -> None:
    """Make an attention module of transformers rotate and round what it multiplies, in place.

    Raises:
        InputError: there is one already, or the module takes no cache.
    """
    if isinstance(getattr(attention, "rounding", None), AttentionRounding):
        raise InputError("attention: its queries, keys and values are rounded already")
    keyword = cache_keyword(attention.forward)
    eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    config: Any = attention.config
    attention.rounding = AttentionRounding(bits, rotation, config, eager, keyword)
    attention.config = config = copy.copy(config)
    config._attn_implementation = _NAME
    attention.register_forward_pre_hook(_round_writes, with_kwargs=True)


def round_attention(model: nn.Module, family: Family, bits: int, rotations: Rotations | None) -> None:
    """`round_layer` with every layer of a model."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        round_layer(layer, index, family, bits, rotations)


def round_layer(layer: nn.Module, index: int, family: Family, bits: int, rotations: Rotations | None) -> None:
    """`insert_rounding` in decoder layer `index` of a model that quantizes queries, keys and values, or has the
    rotation R3.

    Args:
        bits: 4 or 8; 16: none.
    """
    rotation = None if rotations is None else rotations.query_key(index)
    if bits == 16 and rotation is None:
        return
    online = None if rotation is None else OnlineRotation(rotation)
    insert_rounding(layer.get_submodule(family.attention), bits, online)


def _round_writes(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    rounding: AttentionRounding = module.rounding  # type: ignore[assignment]
    keyword = rounding.cache_keyword
    if len(arguments) > 3:
        raise TypeError(f"attention: {keyword} is expected as a keyword argument")
    return arguments, {**keywords, keyword: _RoundedWrites(keywords.get(keyword), rounding)}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> Any:
    rounding: AttentionRounding = module.rounding  # type: ignore[assignment]
    return rounding.attention()(module, rounding.query(query), key, value, attention_mask, **keywords)


AttentionInterface.register(_NAME, _attention)
