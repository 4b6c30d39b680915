"""Compile and load what a model launches before anyone waits for it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel

from sliderquant.errors import InputError
from sliderquant.progress import Progress

__all__ = ["TOKENS", "WarmUp", "warm_up"]

# Between these the kernels' rules choose other tiles.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_DECODED = 6


@dataclass(frozen=True)
class WarmUp:
    """What `warm_up` did.

    Attributes:
        kernels: that were not compiled in this process yet.
        seconds: that it took.
        errors: a line for every kernel that could not be compiled.
    """

    kernels: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


@torch.no_grad()
def warm_up(
    model: PreTrainedModel,
    tokens: Sequence[int] = TOKENS,
    batches: Sequence[int] = (1,),
    processes: int | None = None,
    progress: Progress | None = None,
) -> WarmUp:
    """Compile every kernel that a model on CUDA launches, load it, and capture the graphs of decoding.

    While it records what is to be compiled, forwards of this thread compute nothing.

    Kernels are compiled in other processes, one for a few of them, into Triton's cache on disk, and only those that it
    has not. On a CPU nothing is to be done.

    Args:
        tokens: numbers of tokens that are computed at once: of a prompt, or of a batch that decodes.
        batches: sizes for which a step of `generate` is captured; empty: none.
        processes: at most; None: one for every core.

    Raises:
        InputError: an argument is not a positive number, or not a list of them.
    """
    # Not at the top: they import Triton, which a CPU does without.
    from sliderquant_kernels.tools.warming import compile_jobs, recorded_jobs

    for name, numbers in (
        ("tokens", tokens),
        ("batches", batches),
        ("processes", [1 if processes is None else processes]),
    ):
        if not isinstance(numbers, Sequence) or not all(type(number) is int and number > 0 for number in numbers):
            raise InputError(f"{name} {numbers!r}: expected whole numbers of 1 or more")
    device, start = model.device, time.perf_counter()
    if device.type != "cuda":
        return WarmUp()
    progress = progress or Progress()
    longest = getattr(model.config, "max_position_embeddings", None) or max(tokens)
    lengths = sorted({min(number, longest) for number in tokens})
    with recorded_jobs() as jobs:
        for length in lengths:
            _forward(model, length)
    major, minor = torch.cuda.get_device_capability(device)
    errors = compile_jobs(jobs, 10 * major + minor, processes, progress.kernels_compiled)
    for length in lengths:
        _forward(model, length)
    with _plain_generation(model):
        for batch in batches:
            ids = torch.zeros(batch, 2, dtype=torch.int64, device=device)
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_DECODED, min_new_tokens=_DECODED,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
    torch.cuda.synchronize(device)
    return WarmUp(len(jobs), time.perf_counter() - start, errors)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without what a model's own generation config asks for, such as beams or strings that stop it."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _forward(model: PreTrainedModel, length: int) -> None:
    model(torch.zeros(1, length, dtype=torch.int64, device=model.device), use_cache=False)
