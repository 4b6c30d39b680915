"""The attention of a step that is captured: one token over the buffers of a slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sliderquant.decoding.cache import Slot
from sliderquant_kernels.attention import op as decode_attention

__all__ = ["attend_over"]

_ATTENTION = "sliderquant_decode"


@contextmanager
def attend_over(slot: Slot, model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend over a slot while its step is run and captured."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    _current.index = slot.index
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _current.index = None


# Where the step of this thread writes, for `_one_query`, which transformers calls.
_current = threading.local()


def _one_query(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """`sdpa` of one token over a slot, whose length the device knows."""
    index = getattr(_current, "index", None)
    special = keywords.get("softcap") or keywords.get("position_bias") is not None
    if index is None or query.shape[2] != 1 or special:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **keywords)
    scale = query.shape[3] ** -0.5 if keywords.get("scaling") is None else keywords["scaling"]
    if decode_attention.fits(query, key, value, attention_mask):
        return decode_attention.decode_attention(query, key, value, index, attention_mask, scale), None
    # The query heads that share keys are the rows of one product: no key is copied.
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    out = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scale)
    return out.reshape(batch, 1, heads, value.shape[3]), None


AttentionInterface.register(_ATTENTION, _one_query)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
