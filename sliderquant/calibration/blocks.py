"""Text -> blocks of token ids."""

import random
from typing import Any

import torch
from torch import Tensor

from sliderquant.calibration.text import Text
from sliderquant.errors import InputError

__all__ = ["consecutive_blocks", "document_crops", "random_blocks", "tokenize"]


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids int64 `[tokens]` of the whole text, with the tokenizer's defaults."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def random_blocks(text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    """Random crops for calibration, int64 `[samples, seqlen]`: from the whole of a running text (they may overlap), or
    each from one document that is long enough.

    Raises:
        InputError: the text, or every document, is shorter than one block.
    """
    generator = random.Random(seed)
    if not text.running:
        return document_crops(text, tokenizer, samples, seqlen, generator)
    tokens = tokenize(text.documents[0], tokenizer)
    if len(tokens) < seqlen:
        raise InputError(
            f"text {text.name!r}: {len(tokens)} tokens are shorter than one block of {seqlen}; use a longer text or a "
            "smaller --seqlen"
        )
    starts = [generator.randint(0, len(tokens) - seqlen) for _ in range(samples)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def document_crops(text: Text, tokenizer: Any, samples: int, seqlen: int, generator: random.Random) -> Tensor:
    """`samples` random crops, each from a random document with at least `seqlen` tokens, int64 `[samples, seqlen]`.

    A document may be drawn more than once. Draws follow the published protocol for C4: a document, then its crop.
    """
    crops: list[Tensor] = []
    too_short: set[int] = set()
    while len(crops) < samples:
        index = generator.randrange(len(text.documents))
        tokens = tokenize(text.documents[index], tokenizer)
        if len(tokens) > seqlen:
            start = generator.randint(0, len(tokens) - seqlen - 1)
            crops.append(tokens[start : start + seqlen])
            continue
        too_short.add(index)
        if len(too_short) == len(text.documents):
            raise InputError(
                f"text {text.name!r}: none of its {len(text.documents)} documents is longer than one block of {seqlen} "
                "tokens; use longer documents or a smaller --seqlen"
            )
    return torch.stack(crops)


def consecutive_blocks(text: str, tokenizer: Any, seqlen: int, name: str) -> Tensor:
    """Non-overlapping blocks of a running text in order, without the tail, int64 `[blocks, seqlen]`.

    Raises:
        InputError: the text is shorter than one block.
    """
    tokens = tokenize(text, tokenizer)
    blocks = len(tokens) // seqlen
    if blocks == 0:
        raise InputError(
            f"text {name!r}: {len(tokens)} tokens are shorter than one block of {seqlen}; use a longer text or a "
            "smaller --seqlen"
        )
    return tokens[: blocks * seqlen].view(blocks, seqlen)
