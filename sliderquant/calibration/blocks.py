"""Text -> blocks of token ids."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sliderquant.calibration.text import Text
from sliderquant.calibration.tokens import Tokens
from sliderquant.errors import InputError

__all__ = ["Blocks", "consecutive_blocks", "document_blocks", "random_blocks", "sample"]

_DOCUMENT_CROPS = 256


@dataclass(frozen=True)
class Blocks:
    """What is taken of a text.

    Attributes:
        tokens: int64 `[blocks, seqlen]`.
        distinct: places of the text that they cover; one that several blocks cover counts once.
        notes: what the user should know about how they were taken.
    """

    tokens: Tensor
    distinct: int
    notes: tuple[str, ...] = ()


def random_blocks(text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    """The tokens of `sample`, int64 `[samples, seqlen]`."""
    return sample(text, tokenizer, samples, seqlen, seed).tokens


def sample(text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int, vocabulary: int | None = None) -> Blocks:
    """Random crops for calibration: from the whole of a running text (they may overlap), or each from one document that
    is long enough. Where no document is, or so few that they cover less than half of the tokens that are drawn, from
    all documents joined.

    Args:
        vocabulary: ids that the model has; None: not checked.

    Raises:
        InputError: the text is shorter than one block; the model does not have its tokens.
    """
    generator = random.Random(seed)
    tokens = Tokens(text, tokenizer, vocabulary)
    if not text.running:
        crops = _document_crops(tokens, samples, seqlen, generator)
        if crops is not None and (2 * crops.distinct >= samples * seqlen or not _has_short(tokens, seqlen)):
            return crops
    ids, notes = _running(tokens, seqlen, samples)
    starts = [generator.randint(0, len(ids) - seqlen) for _ in range(samples)]
    blocks = torch.stack([ids[start : start + seqlen] for start in starts])
    return Blocks(blocks, _covered(starts, seqlen), notes)


def document_blocks(text: Text, tokenizer: Any, seqlen: int, vocabulary: int | None = None) -> Blocks:
    """256 random crops for evaluation, seed 0, each from one document that is long enough: the published protocol for
    C4. Where no document is, the documents joined are cut into blocks as a running text is.

    Raises:
        InputError: as `sample`.
    """
    tokens = Tokens(text, tokenizer, vocabulary)
    crops = _document_crops(tokens, _DOCUMENT_CROPS, seqlen, random.Random(0))
    return _cut(tokens, seqlen) if crops is None else crops


def consecutive_blocks(text: Text, tokenizer: Any, seqlen: int, vocabulary: int | None = None) -> Blocks:
    """Non-overlapping blocks of a running text in order, without the tail.

    Raises:
        InputError: as `sample`.
    """
    return _cut(Tokens(text, tokenizer, vocabulary), seqlen)


def _cut(tokens: Tokens, seqlen: int) -> Blocks:
    ids, notes = _running(tokens, seqlen)
    blocks = len(ids) // seqlen
    return Blocks(ids[: blocks * seqlen].view(blocks, seqlen), blocks * seqlen, notes)


def _has_short(tokens: Tokens, seqlen: int) -> bool:
    """Whether there are documents, with something in them, that are not longer than a block."""
    return any(0 < len(tokens.of(index)) <= seqlen for index in range(len(tokens.text.documents)))


def _running(tokens: Tokens, seqlen: int, wanted: int = 0) -> tuple[Tensor, tuple[str, ...]]:
    """The text as one running text, at least a block long, and what to say about it.

    Args:
        wanted: blocks that are drawn.
    """
    text = tokens.text
    ids = tokens.of(0) if text.running else tokens.joined()
    count = len(text.documents)
    if len(ids) < seqlen:
        of_what = "" if text.running else f"its {count} documents have "
        raise InputError(
            f"text {text.name!r}: {of_what}{len(ids)} tokens{'' if text.running else ' together, which'} are shorter "
            f"than one block of {seqlen}; use a longer text or a smaller --seqlen"
        )
    if text.running:
        return ids, text.notes
    long = sum(len(tokens.of(index)) > seqlen for index in range(count))
    which = "none" if not long else f"only {long}"
    few = f", too few for {wanted} blocks" if long else ""
    return ids, (
        *text.notes,
        f"text {text.name!r}: {which} of its {count} documents {'are' if long > 1 else 'is'} longer than one block of "
        f"{seqlen} tokens{few}: all are joined, in their order, into one text of {len(ids)} tokens",
    )


def _document_crops(tokens: Tokens, samples: int, seqlen: int, generator: random.Random) -> Blocks | None:
    """`samples` random crops, each from a random document with more than `seqlen` tokens; None: there is no such.

    A document may be drawn more than once. Draws follow the published protocol for C4: a document, then its crop.
    """
    crops: list[Tensor] = []
    starts: dict[int, list[int]] = {}
    too_short: set[int] = set()
    count = len(tokens.text.documents)
    while len(crops) < samples:
        index = generator.randrange(count)
        if index in too_short:
            continue
        ids = tokens.of(index)
        if len(ids) > seqlen:
            start = generator.randint(0, len(ids) - seqlen - 1)
            crops.append(ids[start : start + seqlen])
            starts.setdefault(index, []).append(start)
            continue
        too_short.add(index)
        if len(too_short) == count:
            return None
    distinct = sum(_covered(found, seqlen) for found in starts.values())
    return Blocks(torch.stack(crops), distinct, tokens.text.notes)


def _covered(starts: list[int], seqlen: int) -> int:
    """Places that blocks from these starts on cover."""
    covered = end = 0
    for start in sorted(starts):
        covered += start + seqlen - max(start, end)
        end = start + seqlen
    return covered
