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

from sliderquant.checkpoint.clips import Clip, clip_from, clip_tensor
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.family import Family
from sliderquant.models.layer import LayerSpec, model_layers
from sliderquant.modules.rotated import OnlineRotation
from sliderquant.rotations.transforms import Rotations
from sliderquant_kernels import quantize_activations

__all__ = ["AttentionRounding", "cache_keyword", "insert_rounding", "round_attention", "round_layer"]

_NAME = "sliderquant"
_CHILD = "rounding."


class AttentionRounding(nn.Module):
    """Rotates and rounds queries, keys and values; a child of the attention module that it belongs to.

    Attributes:
        bits: of the grid of each head of each token, with zero-points: 4 or 8; 16: not rounded.
        rotation: R3, of size head_dim, for queries and keys; or None.
        enabled: False: everything passes as it is.
        clips: of `query`, `key` and `value`, the factors on the ends of their ranges; empty: they are not clipped.
    """

    rotation: OnlineRotation | None
    clips: dict[str, Clip]

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
        self.clips = {}
        self._config, self._eager = config, eager
        self.cache_keyword = cache_keyword

    def query(self, x: Tensor) -> Tensor:
        """Queries `[batch, heads, tokens, head_dim]` -> the same shape and dtype."""
        return self._rounded(x, self.rotation, "query")

    def key(self, x: Tensor) -> Tensor:
        """Keys `[batch, heads, tokens, head_dim]` -> the same shape and dtype."""
        return self._rounded(x, self.rotation, "key")

    def value(self, x: Tensor) -> Tensor:
        """Values `[batch, heads, tokens, head_dim]` -> the same shape and dtype."""
        return self._rounded(x, None, "value")

    def _rounded(self, x: Tensor, rotation: OnlineRotation | None, site: str) -> Tensor:
        if not self.enabled:
            return x
        # The projections wrote the heads of a token next to each other: so there is nothing to copy.
        rows = x.transpose(1, 2)
        if self.bits == 16:
            rows = rows if rotation is None else rotation(rows)
        else:
            rows = self._round(rows, rotation, site)
        return rows.transpose(1, 2)

    def _round(self, rows: Tensor, rotation: OnlineRotation | None, site: str) -> Tensor:
        """rows `[batch, tokens, heads, head_dim]`, rotated and rounded."""
        clip = self.clip(site)
        if rotation is None:
            return quantize_activations(rows, self.bits, symmetric=False, clip=clip).dequantize(rows.dtype)
        return rotation.quantize(rows, self.bits, False, clip).dequantize(rows.dtype)

    def clip(self, site: str) -> Clip | None:
        """The factors of `query`, `key` or `value`; None: it is not clipped."""
        return self.clips.get(site)

    # As in the checkpoint, the factors are tensors of the attention module itself.
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for site, clip in self.clips.items():
            destination[f"{prefix.removesuffix(_CHILD)}{site}_clip"] = clip_tensor(clip)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        for site in self.clips:
            name = f"{prefix.removesuffix(_CHILD)}{site}_clip"
            tensor = rest.pop(f"{prefix}{site}_clip", None)
            if tensor is None:
                missing_keys.append(name)
                continue
            try:
                self.clips[site] = clip_from(tensor, name)
            except CheckpointError as error:
                error_msgs.append(str(error))
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def attention(self) -> Any:
        """The attention function that the model is set to."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)

    def extra_repr(self) -> str:
        clips = [f"{site}_clip=({low:.4g}, {high:.4g})" for site, (low, high) in self.clips.items()]
        return "queries, keys and values as they are" if self.bits == 16 else ", ".join([f"bits={self.bits}", *clips])


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
    attention.register_load_state_dict_pre_hook(_hand_down_clips)


def round_attention(model: nn.Module, family: Family, bits: int, rotations: Rotations | None) -> None:
    """`round_layer` with every layer of a model."""
    for layer, module in model_layers(model, family):
        round_layer(module, layer, bits, rotations)


def round_layer(module: nn.Module, layer: LayerSpec, bits: int, rotations: Rotations | None) -> None:
    """`insert_rounding` in a decoder layer of a model that quantizes queries, keys and values, or has the
    rotation R3.

    Args:
        bits: 4 or 8; 16: none.
    """
    rotation = None if rotations is None else rotations.query_key(layer.index)
    if bits == 16 and rotation is None:
        return
    online = None if rotation is None else OnlineRotation(rotation)
    insert_rounding(module.get_submodule(layer.attention.module), bits, online)


def _hand_down_clips(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the factors the names under which the child looks for them."""
    for site in module.rounding.clips:  # type: ignore[union-attr]
        key = f"{prefix}{site}_clip"
        if key in state_dict:
            state_dict[f"{prefix}{_CHILD}{site}_clip"] = state_dict.pop(key)


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
