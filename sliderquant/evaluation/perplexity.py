"""Perplexity, by the protocol of the published tables.

A running text (WikiText-2: the raw test lines joined by blank lines) is tokenized once with the tokenizer's defaults
and cut into non-overlapping blocks of `seqlen` tokens; the tail is dropped. Each block's loss is the mean cross-entropy
of its seqlen - 1 shifted tokens, and perplexity = exp(mean over the blocks). Text in documents (C4): 256 random crops
of `seqlen` tokens from documents that are long enough, seed 0; where none is, the documents joined are measured as one
running text.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sliderquant.calibration.blocks import Blocks, consecutive_blocks, document_blocks
from sliderquant.calibration.text import Text, read_text
from sliderquant.errors import InputError
from sliderquant.models.source import default_seqlen

__all__ = ["Perplexity", "check_seqlen", "evaluation_blocks", "perplexity"]

_LONGEST_BLOCK = 2048
_TOKENS_AT_ONCE = 2048  # logits of a batch are the largest tensor: tokens x vocabulary in fp32


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the protocol that it was measured by."""

    value: float
    dataset: str
    seqlen: int
    blocks: int
    tokens: int
    tokenizer: str
    dtype: str
    device: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def protocol(self) -> str:
        """One line that says how the value was measured."""
        return (
            f"{self.dataset}: {self.blocks} blocks of {self.seqlen} tokens ({self.tokens} tokens), tokenizer "
            f"{self.tokenizer}, {self.dtype} on {self.device}"
        )


def check_seqlen(config: Any, seqlen: int | None) -> int:
    """Tokens per block; None: `default_seqlen`. Raises InputError when the model does not take so many."""
    longest = int(config.max_position_embeddings)
    seqlen = default_seqlen(config) if seqlen is None else seqlen
    if not 2 <= seqlen <= longest:
        raise InputError(f"seqlen {seqlen}: expected 2 to {longest}, the longest that the model takes")
    return seqlen


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluation_blocks(source: str | Text, tokenizer: Any, seqlen: int, vocabulary: int | None = None) -> Blocks:
    """What is measured of a text source.

    Args:
        source: its name, or what was read of it.
        vocabulary: ids that the model has; None: not checked.

    Raises:
        InputError: the text is missing, or shorter than one block; the model does not have its tokens.
    """
    text = source if isinstance(source, Text) else read_text(source, "evaluation")
    take = consecutive_blocks if text.running else document_blocks
    return take(text, tokenizer, seqlen, vocabulary)


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    source: str,
    seqlen: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    blocks: Tensor | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text source (see `sliderquant.calibration.text`).

    Args:
        seqlen: tokens per block; None: `default_seqlen`.
        progress: called with (blocks done, blocks in all).
        blocks: those of the source, where they were made before; None: they are made here.

    Raises:
        InputError: the text is missing, or shorter than one block; seqlen is out of the model's range; the model does
            not have the text's tokens.
    """
    seqlen = check_seqlen(model.config, seqlen)
    if blocks is None:
        vocabulary = model.get_input_embeddings().num_embeddings
        blocks = evaluation_blocks(source, tokenizer, seqlen, vocabulary).tokens
    device = model.device
    losses: list[float] = []
    for batch in blocks.split(max(1, _TOKENS_AT_ONCE // seqlen)):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        token_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses += token_losses.view(len(ids), -1).double().mean(dim=1).tolist()
        progress(len(losses), len(blocks))
    return Perplexity(
        value=_exp(sum(losses) / len(losses)),
        dataset=source,
        seqlen=seqlen,
        blocks=len(blocks),
        tokens=blocks.numel(),
        tokenizer=f"{type(tokenizer).__name__} of {len(tokenizer)} tokens",
        dtype=str(model.dtype).removeprefix("torch."),
        device=device.type,
    )
