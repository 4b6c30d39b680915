"""The texts of a run: read, checked and cut into blocks of tokens before any long work starts."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sliderquant.baselines.enough_text import too_little_text
from sliderquant.calibration.blocks import sample
from sliderquant.calibration.text import check_source, downloaded, read_text
from sliderquant.calibration.tokens import vocabulary_of
from sliderquant.evaluation.perplexity import evaluation_blocks
from sliderquant.planning.plan import Plan
from sliderquant.progress import Progress

__all__ = ["TextBlocks", "calibration_in_words", "needed_texts", "read_blocks", "say", "try_texts"]

_TRIED_SAMPLES = 1024
"""Of calibration samples, those that show whether a text is of use."""


@dataclass(frozen=True)
class TextBlocks:
    """Token ids int64 `[blocks, seqlen]`.

    Attributes:
        calibration: None: the run needs no calibration text.
        evaluation: None: perplexity is not measured.
        notes: what the user should know about the texts.
    """

    calibration: Tensor | None
    evaluation: Tensor | None
    notes: tuple[str, ...]


def needed_texts(plan: Plan) -> tuple[str | None, str | None]:
    """The sources of the calibration text, and of the text that perplexity is measured on; None: not needed.

    Raises:
        InputError: one that is needed is not there.
    """
    calibration, evaluation = plan.request.calibration, plan.request.perplexity_on
    if plan.needs_text:
        check_source(calibration)
    if evaluation is not None:
        check_source(evaluation)
    return str(calibration) if plan.needs_text else None, str(evaluation) if evaluation else None


def calibration_in_words(settled: Plan, text: str) -> str:
    """For the model card, which a path of this machine has no place in."""
    return f"{Path(text).name}, {settled.samples} samples of {settled.seqlen} tokens"


def read_blocks(
    settled: Plan, tokenizer: Any, calibration: str | None, evaluation: str | None, seed: int
) -> TextBlocks:
    """Read the texts of a run.

    Args:
        calibration, evaluation: the sources; None: not needed.

    Raises:
        InputError: a text is not usable, is too short, or has tokens that the model does not have.
    """
    notes: list[str] = []
    vocabulary = vocabulary_of(settled.source)
    drawn = measured = None
    if calibration is not None:
        text = read_text(calibration, "calibration")
        drawn = sample(text, tokenizer, settled.samples, settled.seqlen, seed, vocabulary)
        warning = too_little_text(settled, drawn.distinct)
        notes += [*drawn.notes, *([warning] if warning else [])]
    if evaluation is not None:
        measured = evaluation_blocks(evaluation, tokenizer, settled.seqlen, vocabulary)
        notes += measured.notes
    return TextBlocks(
        None if drawn is None else drawn.tokens, None if measured is None else measured.tokens, tuple(notes)
    )


def try_texts(
    settled: Plan, tokenizer: Any, calibration: str | None, evaluation: str | None, seed: int
) -> tuple[str, ...]:
    """The notes of `read_blocks`, for a plan that is only shown: texts that are downloaded are not read.

    Raises:
        InputError: as `read_blocks`.
    """
    samples = min(settled.samples, _TRIED_SAMPLES)
    settled = replace(settled, request=replace(settled.request, samples=samples))
    here, measured = (None if text is None or downloaded(text) else text for text in (calibration, evaluation))
    notes = read_blocks(settled, tokenizer, here, measured, seed).notes
    warning = None
    if calibration is not None and here is None:
        warning = too_little_text(settled, settled.samples * settled.seqlen)
    return (*notes, *([warning] if warning else []))


def say(notes: Iterable[str], progress: Progress | None) -> None:
    """Tell the user: the progress or, where there is none, by Python's warnings."""
    for note in notes:
        if progress is None:
            warnings.warn(note.removeprefix("warning: "), stacklevel=4)
        else:
            progress.message(note)
